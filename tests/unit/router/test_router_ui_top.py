"""`vllm-suite top`: the page's state in a terminal."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import sys

import msgspec
import pytest
from rich.console import Console
from ui_fleet import document, member, pool, showing

from vllm_suite.cli.main import main
from vllm_suite.fleet.live import screen
from vllm_suite.router.ui import document as doc

COMMAND = (sys.executable, "-m", "vllm_suite.cli.main", "top")


async def top(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Piped, as in a script: standard output is no terminal here."""
    code = await asyncio.to_thread(main, ["top", *words])
    said = capsys.readouterr()
    return code, said.out + said.err


def drawn(state: doc.Live, width: int = 120) -> str:
    console = Console(width=width, force_terminal=False, no_color=True)
    with console.capture() as captured:
        console.print(screen(state))
    return captured.get()


def test_it_says_what_the_page_says() -> None:
    text = " ".join(drawn(document()).split())
    for said in (
        "DEGRADED 1 of 2 prefill not ready", "12.34 requests/s · 17 in flight", "96.1 % ttft within 300 ms", "2 failed",
        "prefill 1/3", "llm-prefill-1 does not answer", "llm-decode-2 closing to prefill", "85.0 %",
        "KV blocks 55.8 MB/s, 10.7 pulls/s", "embeddings 1.2 MB/s", "prefill 96 ms 214 ms 3,239",
        "ttft p99 320 ms 280 ms to 380 ms 431 ms slower", "decode retry disconnect 7 llm-decode-1 a1b2c3d4e5f6",
    ):  # fmt: skip
        assert said in text, said


def test_names_from_outside_are_text_and_a_large_fleet_is_cut() -> None:
    answer = document(0, 2, 80)
    answer.pools[1].members[0] = member("prefill", 0, instance="[bold red]p[/]")
    answer = msgspec.structs.replace(answer, pools=[*answer.pools[1:], pool("any", [])], transfers=document().transfers)
    text = drawn(answer)
    assert "[bold red]p[/]" in text
    assert "18 more" in text


async def test_piped_it_prints_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_SUITE_CONTROL_KEY", raising=False)
    monkeypatch.setenv("VLLM_SUITE_API_KEY", "sesame")
    async with showing(document(), key="sesame") as served:
        code, text = await top(capsys, "--url", served.url)
        assert (code, served.state.asked) == (0, 1)
        assert "llm-decode-2" in text
        assert "\x1b" not in text
        monkeypatch.setenv("VLLM_SUITE_API_KEY", "wrong")
        code, text = await top(capsys, "--url", served.url)
        assert code == 1
        assert "set VLLM_SUITE_API_KEY or VLLM_SUITE_CONTROL_KEY" in text
        served.state.answer = document(health="down")
        monkeypatch.setenv("VLLM_SUITE_CONTROL_KEY", "sesame")
        code, text = await top(capsys, "--url", served.url, "--json", "-")
        assert code == 1
        assert json.loads(text)["pools"][2]["role"] == "decode"
    code, text = await top(capsys, "--url", served.url)
    assert code == 1
    assert "gives no answer" in text


async def test_on_a_terminal_it_redraws_until_q() -> None:
    ours, its = pty.openpty()
    loop, seen, more = asyncio.get_running_loop(), bytearray(), asyncio.Event()

    def read() -> None:
        seen.extend(os.read(ours, 1 << 16))
        more.set()

    async def until(*words: bytes) -> None:
        async with asyncio.timeout(60):
            while not any(word in seen for word in words):
                more.clear()
                await more.wait()

    loop.add_reader(ours, read)
    try:
        async with showing(document()) as served:
            process = await asyncio.create_subprocess_exec(
                *COMMAND, "--url", served.url, "--interval", "0.1", stdin=its, stdout=its, stderr=its,
                env={**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"},
            )  # fmt: skip
            await until(b"DEGRADED")
            served.state.answer = document(health="ok", headline="All is well")
            await until(b"All is well")
        await until(b"cannot be reached since")
        os.write(ours, b"q")
        assert await asyncio.wait_for(process.wait(), 60) == 1
    finally:
        loop.remove_reader(ours)
        os.close(ours)
        os.close(its)
