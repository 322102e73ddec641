"""Encoders that die, freeze and come back under real requests: no wrong answer, no hang, every recovery counted."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import random
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import prometheus
import pytest
from aiohttp import web
from epd_fleet import CHAT, alone, blind, counts, epd_spec, instance, look, pictures, since, through, until, working
from harness import KEY, Fleet, prompt, request, run_of_ports, running
from test_restart import restart

from vllm_suite.fleet.pictures_parts import Part, text_part
from vllm_suite.fleet.tiny_media import write
from vllm_suite.observability.capabilities import EPD

ENCODERS = ("encode-0", "encode-1")


@pytest.fixture(scope="module")
def files_port() -> int:
    """Of the web server that the fleet's router may fetch from."""
    return run_of_ports(1)


@pytest.fixture(scope="module")
def pictured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("qwen2_5_vl", tmp_path_factory.mktemp("media") / "qwen2_5_vl")


@pytest.fixture(scope="module")
def epd_process(
    pictured: Path, files_port: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Path]]:
    folder = tmp_path_factory.mktemp("epd-fleet")
    with running(folder, epd_spec(pictured, folder / "logs", files=files_port)) as process:
        yield process, folder / "logs"


@pytest.fixture
async def fleet(epd_process: tuple[Any, Path]) -> AsyncIterator[Fleet]:
    process, log_dir = epd_process
    async with aiohttp.ClientSession() as session:
        fleet = Fleet(process, log_dir, session)
        for name in (*ENCODERS, "prefill", "decode"):
            await fleet.ready(name)
        yield fleet
        for name in ("prefill", "decode"):
            await fleet.ready(name)
        await fleet.idle()


async def said(fleet: Fleet, bodies: list[dict[str, Any]], want: list[list[int]], **options: Any) -> None:
    """The router's answers are the wanted ones, each within its time."""
    assert [answer.tokens for answer in await through(fleet, bodies, **options)] == want


@contextlib.asynccontextmanager
async def web_server(port: int, files: dict[str, bytes]) -> AsyncIterator[list[str]]:
    """Serves PNG files on every address; gives the paths that were asked for."""
    asked: list[str] = []

    async def page(asking: web.Request) -> web.Response:
        asked.append(asking.path)
        return web.Response(body=files[asking.path], content_type="image/png")

    app = web.Application()
    app.router.add_get("/{name}", page)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "0.0.0.0", port).start()
    try:
        yield asked
    finally:
        await runner.cleanup()


def by_url(url: str) -> Part:
    return {"type": "image_url", "image_url": {"url": url}}


async def test_pictures_by_value_and_by_url_are_encoded_once_on_encoders(fleet: Fleet, files_port: int) -> None:
    shown = pictures(100, 3)
    file = base64.b64decode(shown[0]["image_url"]["url"].partition(",")[2])
    bodies = [look(shown[1]), look(shown[2], shown[1])]
    want = await alone(fleet, [look(shown[0]), *bodies])
    before = await counts(fleet)
    async with web_server(files_port, {"/a.png": file}) as asked:
        await said(fleet, [look(by_url(f"http://127.0.0.1:{files_port}/a.png"))], want[:1])
        assert asked == ["/a.png"]
        for body, tokens in zip(bodies, want[1:], strict=True):
            await said(fleet, [body], [tokens])
        # The same bytes under another name are the same item.
        await said(fleet, [look(shown[0])], want[:1])
        assert await since(fleet, before) == {"encoded": 3, "kept": 2, "stages": 4}
        # Only the one address was let through.
        for host in ("127.0.0.2", "0.0.0.0", "[::ffff:127.0.0.2]"):
            refused = await fleet.post(look(by_url(f"http://{host}:{files_port}/a.png")), path=CHAT)
            assert refused.status == 400, host
            assert refused.json["error"]["message"].startswith("item 0 (image_url)")
        assert asked == ["/a.png"]


async def test_the_dashboard_of_encoders_has_data(fleet: Fleet, tmp_path: Path) -> None:
    jobs = [prometheus.job("instances", *(fleet.url(name) for name in (*ENCODERS, "prefill", "decode")))]
    jobs += [prometheus.job("router", fleet.url("router"), honor_labels=True, authorization={"credentials": KEY})]
    with prometheus.running(tmp_path, run_of_ports(1), jobs) as server:
        server.until(server.targets_up, "a good scrape of every target")
        for seed in (150, 160):
            one = look(*pictures(seed + 5, 1))  # several are overlapped with prefill, and not waited for
            for body in (look(*pictures(seed, 2)), look(*pictures(seed, 2), salt="again"), one):
                assert (await fleet.post(body, path=CHAT)).status == 200
            await asyncio.sleep(1.5)  # the first point of what appeared now, before it grows
        # No fault of the encoder cache here that would have ended an engine.
        server.until_filled(EPD, {"vllm_suite_ec_contained_faults_total"})


async def test_an_encoder_dies_at_work_and_then_the_other(fleet: Fleet) -> None:
    bodies = [look(picture) for picture in pictures(200, 6)]
    texts = [request(prompt(60 + i, 200 + i)) for i in range(3)]
    want = await alone(fleet, [*bodies, *(look(picture) for picture in pictures(210, 3))])
    text_want = [(await fleet.post(text, "decode")).tokens for text in texts]
    before = await counts(fleet)
    fleet.freeze("encode-0")
    asking = asyncio.create_task(through(fleet, bodies))
    await until(lambda: working(fleet, "encode-0"))
    assert [(await fleet.post(text)).tokens for text in texts] == text_want
    fleet.signal("encode-0", signal.SIGKILL)
    assert [answer.tokens for answer in await asking] == want[:6]
    change = await since(fleet, before)
    assert change.pop("encode_retry") >= 1
    assert change == {"encoded": 6, "stages": 6}

    # Nobody is left to encode: prefill does it.
    before = await counts(fleet)
    fleet.signal("encode-1", signal.SIGKILL)
    await said(fleet, [look(picture) for picture in pictures(210, 3)], want[6:])
    assert [(await fleet.post(text)).tokens for text in texts] == text_want
    change = await since(fleet, before)
    assert change.pop("encode_local", 0) <= 3
    assert change == {"local": 3, "stages": 3, "prefill local_encodes": 3}


@pytest.mark.slow
async def test_encoders_that_were_restarted_on_their_ports(fleet: Fleet) -> None:
    old = pictures(300, 4)
    want = await alone(fleet, [look(picture) for picture in [*old, *pictures(310, 4)]])
    await said(fleet, [look(picture) for picture in old], want[:4])
    rows = {name: await instance(fleet, name) for name in ENCODERS}
    before = await counts(fleet)
    for name in ENCODERS:
        fleet.signal(name, signal.SIGKILL)
    # What the dead ones keep is not asked for; the pictures are made again, by prefill.
    await said(fleet, [look(picture) for picture in old], want[:4])
    for name, row in rows.items():
        assert row is not None
        await fleet.ready(name, row["epoch"])
        again = await instance(fleet, name)
        assert again is not None
        assert again["ec"] == row["ec"]
    assert (await since(fleet, before)).get("local") == 4
    before = await counts(fleet)
    await said(fleet, [look(picture) for picture in [*old, *pictures(310, 4)]], want)
    assert await since(fleet, before) == {"encoded": 8, "stages": 8}
    for name in ENCODERS:
        assert await fleet.metric(name, "vllm_suite_ec_encoded_items_total") > 0


@pytest.mark.slow
@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGSTOP])
async def test_an_encoder_goes_between_its_answer_and_the_read(fleet: Fleet, sig: signal.Signals) -> None:
    """Prefill has been told to read an item that cannot be read any more."""
    body = look(*pictures(400 + sig, 1))
    (want,) = await alone(fleet, [body])
    before = await counts(fleet)
    picks = {name: await picked(fleet, name) for name in ENCODERS}

    async def encoded() -> bool:
        return (await fleet.metric("router", "vllm_suite_router_encode_request_seconds_count")) > before["stages"]

    fleet.freeze("prefill")
    try:
        asking = asyncio.create_task(fleet.post(body, path=CHAT, timeout_s=30))
        await until(encoded)
        (maker,) = [name for name in ENCODERS if await picked(fleet, name) > picks[name]]
        fleet.signal(maker, sig)
    finally:
        fleet.thaw("prefill")
    try:
        assert (await asking).tokens == want
        change = await since(fleet, before)
        assert (change["media_sent"], change["encoded"]) == (1, 1)
        assert (change["prefill refused"], change["prefill failed_items"]) == (1, 1)
        assert (await fleet.post(request(prompt(50, 1)))).status == 200
    finally:
        if sig == signal.SIGSTOP:
            fleet.thaw(maker)


async def picked(fleet: Fleet, name: str) -> float:
    row = await instance(fleet, name)
    assert row is not None
    return await fleet.metric("router", "vllm_suite_router_picks_total", stage="encode", instance=row["instance_id"])


@pytest.mark.slow
async def test_a_frozen_encoder_is_worked_around_and_used_again(fleet: Fleet) -> None:
    bodies = [look(picture) for picture in pictures(500, 18)]
    want = await alone(fleet, bodies)
    before = await counts(fleet)
    row = await instance(fleet, "encode-1")
    fleet.freeze("encode-1")
    try:
        await said(fleet, bodies[:6], want[:6], timeout_s=15)

        async def forgotten() -> bool:
            found = await instance(fleet, "encode-1")
            return found is None or not found["ready"]

        await until(forgotten, 5)
        change = await since(fleet, before)
        assert change["encode_retry"] >= 1
        assert (change["encoded"], change.get("local", 0)) == (6, 0)
        # From now on it costs nothing.
        before = await counts(fleet)
        await said(fleet, bodies[6:12], want[6:12], timeout_s=15)
        assert await since(fleet, before) == {"encoded": 6, "stages": 6}
    finally:
        fleet.thaw("encode-1")
    await fleet.ready("encode-1")
    again = await instance(fleet, "encode-1")
    assert row is not None
    assert again is not None
    assert again["epoch"] == row["epoch"]
    await said(fleet, bodies[12:], want[12:])
    assert await picked(fleet, "encode-1") > 0


@pytest.mark.slow
async def test_mixed_requests_while_encoders_die_freeze_and_return(fleet: Fleet) -> None:
    """Faults at moments that nobody chose, the middle of a read among them. Nothing fails: prefill can encode."""
    rng = random.Random(5)
    shown = pictures(600, 8, 224)
    questions = [[rng.choice(shown) for _ in range(rng.randrange(1, 4))] for _ in range(10)]
    questions += [[text_part(f"Nothing to see here, {i} times.")] for i in range(4)]
    want = await alone(fleet, [look(*parts) for parts in questions])
    numbers = itertools.count()
    over = asyncio.Event()
    wrong: list[str] = []
    before = await counts(fleet)

    async def ask() -> None:
        while not over.is_set():
            number = next(numbers)
            which = number % len(questions)
            answer = await fleet.post(look(*questions[which], salt=f"run-{number}"), path=CHAT, timeout_s=40)
            if answer.status != 200 or answer.tokens != want[which]:
                wrong.append(f"{number}: {answer.status} {answer.text[:300]}")

    async def trouble() -> None:
        await asyncio.sleep(rng.uniform(0.5, 1.0))
        fleet.signal("encode-0", signal.SIGKILL)
        await asyncio.sleep(rng.uniform(1.0, 2.0))
        fleet.freeze("encode-1")
        await asyncio.sleep(rng.uniform(1.0, 4.0))
        fleet.thaw("encode-1")
        await asyncio.sleep(rng.uniform(0.5, 1.0))
        fleet.signal("encode-1", signal.SIGKILL)
        await asyncio.sleep(2.0)
        over.set()

    await asyncio.gather(trouble(), *(ask() for _ in range(6)))
    assert not wrong
    change = await since(fleet, before)
    assert change["encoded"] > 0
    assert change["local"] > 0
    assert change.get("encode_retry", 0) + change.get("encode_local", 0) > 0


@pytest.mark.slow
@pytest.mark.parametrize("fallback", ["local", "error"])
async def test_without_encoders_and_without_one_on_prefill_the_error_names_the_item(
    pictured: Path, tmp_path: Path, fallback: str
) -> None:
    wanted = blind(epd_spec(pictured, tmp_path / "logs", encoders=1, fallback=fallback))
    with running(tmp_path, wanted) as process:
        async with aiohttp.ClientSession() as session:
            fleet = Fleet(process, tmp_path / "logs", session)
            await fleet.ready("encode")
            first, second = (look(picture) for picture in pictures(700, 2))
            before = await counts(fleet)
            (good,) = await through(fleet, [first])
            # Several at once: prefill, which cannot take pictures, does not run ahead of the encoder with them.
            assert (await through(fleet, [look(*pictures(710, 2))]))[0].status == 200
            assert await since(fleet, before) == {"encoded": 3, "stages": 2}
            epoch = await fleet.epoch("encode")
            text = request(prompt(80, 3))
            said = (await fleet.post(text)).tokens
            fleet.signal("encode", signal.SIGKILL)
            (bad,) = await through(fleet, [second])
            assert bad.status in (502, 503)
            assert bad.json["error"]["message"].startswith("item 0 (image_url): ")
            assert (await fleet.post(text)).tokens == said
            await fleet.ready("encode", epoch)
            (again,) = await through(fleet, [first])
            assert again.tokens == good.tokens
            assert (await through(fleet, [second]))[0].status == 200


@pytest.mark.slow
async def test_an_encoder_that_is_restarted_waits_until_its_output_was_read(pictured: Path, tmp_path: Path) -> None:
    """Prefill has no encoder of its own and reads later than the encoder's last request ended: nothing may be lost."""
    wanted = blind(epd_spec(pictured, tmp_path / "logs"))
    wanted["router"]["membership"] = {"poll_timeout_s": 30.0, "forget_after_s": 60.0}
    wanted["router"]["timeouts"]["prefill_s"] = 60.0
    with running(tmp_path, wanted) as process:
        async with aiohttp.ClientSession() as session:
            fleet = Fleet(process, tmp_path / "logs", session)
            for name in (*ENCODERS, "prefill", "decode"):
                await fleet.ready(name)
            (picture,) = pictures(800, 1)
            (want,) = await through(fleet, [look(picture, salt="a")])
            before = await counts(fleet)
            picks = {name: await picked(fleet, name) for name in ENCODERS}

            async def encoded() -> bool:
                return (await fleet.metric("router", "vllm_suite_router_encode_request_seconds_count")) > before[
                    "stages"
                ]

            async def draining() -> bool:
                return bool(fleet.member(maker)["state"] == "draining")

            fleet.freeze("prefill")
            try:
                asking = asyncio.create_task(fleet.post(look(picture, salt="b"), path=CHAT, timeout_s=60))
                await until(encoded)
                (maker,) = [name for name in ENCODERS if await picked(fleet, name) > picks[name]]
                restarting = asyncio.create_task(restart(fleet, fleet.member(maker)["name"]))
                await until(draining)
                await asyncio.sleep(7.0)  # without requests it would have ended after three seconds
                assert await draining()
                assert await fleet.metric(maker, "vllm_suite_ec_leases_outstanding") == 1
            finally:
                fleet.thaw("prefill")
            assert (await asking).tokens == want.tokens
            status, said = await restarting
            assert status == 0, said
            change = await since(fleet, before)
            # A server that was stopped may close its idle connections first; then decode is who reads.
            change.pop("decode_alone", None)
            assert change == {"encoded": 1, "stages": 1}
