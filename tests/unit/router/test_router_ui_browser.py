"""The live page in a real headless Chromium."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import msgspec
import pytest
from ui_browser import BINARY, MISSING, Page, browser, tab
from ui_fleet import document, member, pool, showing

pytestmark = pytest.mark.skipif(BINARY is None, reason=MISSING)

DRAWN = "document.body?.dataset.drawn"
LOGIN = "document.getElementById('login')?.hidden === false"

# Contrast of every visible text with what is behind it, WCAG 2's formula; those below 4.5 with their colours.
FAINT = """
(() => {
  const parts = (text) => { const p = text.match(/[\\d.]+/g).map(Number); return p.length < 4 ? [...p, 1] : p; };
  const light = (c) => c.slice(0, 3).map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (node) => { for (; node; node = node.parentElement) {
    const c = parts(getComputedStyle(node).backgroundColor); if (c[3] > 0.99) return c; } return [255, 255, 255, 1]; };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const text = walk.currentNode, node = text.parentElement;
    if (!text.data.trim() || !node.checkVisibility({visibilityProperty: true})) continue;
    const [a, b] = [light(parts(getComputedStyle(node).color)), light(ground(node))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.push([text.data.trim().slice(0, 40), ratio]);
  }
  return found;
})()
"""


@pytest.fixture(scope="module")
def devtools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with browser(tmp_path_factory.mktemp("chromium")) as address:
        yield address


@pytest.fixture
async def page(devtools: str) -> AsyncIterator[Page]:
    async with tab(devtools) as opened:
        yield opened


async def test_it_shows_what_the_router_says(page: Page) -> None:
    answer = document()
    async with showing(answer) as served:
        await page.open(served.url + "/ui")
        await page.until(DRAWN)
        text = await page.js("document.body.innerText")
        for one in (row for part in answer.pools for row in part.members):
            assert one.instance in text
        for said in (
            "Degraded", answer.headline, "12.34", "87.5 % disaggregated", "96.1 % within 300 ms", "95.8 %",
            "99.3 % within 40 ms",
            "5 refused", "1 of 3 ready · 2 running · 1 waiting", "1 listed address gives no answer", "does not answer",
            "closing to prefill", "switched 3 ×", "55.8 MB/s · 10.7 pulls/s", "1.2 MB/s", "4 run · 2 wait", "KV 85 %",
            "first token 182 ms 431 ms 300 ms 96.1 %", "transfer and first token 38 ms 97 ms 3,702",
            "decode tried again × 7", "a1b2c3d4e5f6", "given up: error to the client × 2",
            "320 ms (280 ms to 380 ms) 431 ms slower", "the load is above it", "llm-prefill-0 llm-decode-2 KV 9.3 MB/s",
        ):  # fmt: skip
            assert said in " ".join(text.split()), said
        marks = "[...document.querySelectorAll('.band b')].map((mark) => mark.hidden)"
        assert await page.js(marks) == [row.measured is None for row in answer.plan.rows]
        # The next look shows the next state, and nothing of the one before.
        served.state.answer = msgspec.structs.replace(
            answer, health="ok", headline="All 3 instances ready", time=answer.time + 1, plan=None, events=[],
            transfers=msgspec.structs.replace(answer.transfers, pairs=[]),
            pools=[pool("any", [member("any", index) for index in range(3)])],
        )  # fmt: skip
        await page.until(f"{DRAWN} === '{answer.time + 1:.0f}'")
        text = await page.js("document.body.innerText")
        assert "All 3 instances ready" in text
        assert "llm-any-2" in text
        assert "no predicted section" in text
        assert not any(gone in text for gone in ("llm-decode", "Degraded", "slower", "gave no answer"))
        assert page.log == []
        assert {method for method, _ in page.requests} == {"GET"}
        assert [url for _, url in page.requests if not url.startswith(served.url + "/ui")] == []
        blocked = await page.js("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'blocked')")
        assert blocked == "blocked"
        assert any("Content Security Policy" in line for line in page.log)


async def test_a_key_is_asked_for_and_sent_to_the_router_alone(page: Page) -> None:
    async with showing(document(), key="sesame") as served:
        await page.open(served.url + "/ui")
        await page.until(LOGIN)
        assert served.state.asked == 0
        assert [url for _, url in page.requests if url.endswith("/state")] == []
        assert page.log == []
        assert await page.js("document.activeElement.id") == "key"
        await page.type("wrong")
        await page.press("Enter")
        await page.until("document.body.innerText.includes('does not take that key')")
        assert served.state.asked == 0
        await page.type("ключ")
        await page.press("Enter")
        await page.until("document.body.innerText.includes('cannot send a key with these characters')")
        await page.type("sesame")
        await page.press("Enter")
        await page.until(DRAWN)
        assert await page.js(LOGIN) is False
        assert "sesame" not in await page.js("document.documentElement.outerHTML + location.href + document.cookie")
        await page.js("window.before = 1")
        await page.call("Page.reload")
        await page.until(f"!window.before && {DRAWN}")
        await page.js("document.getElementById('forget').click()")
        await page.until(LOGIN)
        assert await page.js("Object.keys(sessionStorage).length + Object.keys(localStorage).length") == 0
        assert await page.js("document.getElementById('live').hidden")
        assert all(url.startswith(served.url + "/ui") and "sesame" not in url for _, url in page.requests)
        # Chromium itself notes the one refused answer; the page says nothing on the console.
        assert ["401" in line for line in page.log] == [True]
        async with aiohttp.ClientSession() as session, session.get(served.url + "/ui/state") as response:
            assert response.status == 401


async def test_it_says_since_when_the_router_is_away_and_comes_back(page: Page) -> None:
    async with showing(document()) as served:
        port = int(served.url.rpartition(":")[2])
        await page.open(served.url + "/ui")
        await page.until(DRAWN)
    alarm = "document.getElementById('alarm')"
    said = await page.until(f"!{alarm}.hidden && {alarm}.innerText")
    assert "cannot be reached since" in said
    assert "What is shown below is from" in said
    assert "Unreachable" in await page.js("document.title")
    assert ("alert", "") in await page.tree()
    async with showing(document(headline="back again"), port=port):
        await page.until(f"{alarm}.hidden")
        assert "back again" in await page.js("document.body.innerText")


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_text_stands_out_and_the_scheme_is_followed(page: Page, scheme: str) -> None:
    async with showing(document(), key="k") as served:
        await page.open(served.url + "/ui", scheme=scheme)
        await page.until(LOGIN)
        assert await page.js(FAINT) == []
        await page.type("k")
        await page.press("Enter")
        await page.until(DRAWN)
        assert await page.js(FAINT) == []
        ground = await page.js("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
        assert (sum(ground) > 600) is (scheme == "light")
    await page.until("!document.getElementById('alarm').hidden")
    assert await page.js(FAINT) == []


async def test_assistive_technology_gets_names_and_landmarks(page: Page) -> None:
    async with showing(document()) as served:
        await page.open(served.url + "/ui")
        await page.until(DRAWN)
        tree = await page.tree()
        assert {"banner", "main", "contentinfo", "status"} <= {role for role, _ in tree}
        headings = [name for role, name in tree if role == "heading"]
        assert headings[:2] == ["vllm-suite router", "Now"]
        assert {"Request path", "Encode", "Prefill", "Decode", "Recoveries and membership"} <= set(headings)
        regions = {name for role, name in tree if role == "region"}
        assert {"Request path", "Plan and measurement", "Transfers by pair", "Recoveries and membership"} <= regions
        wanted = {"button", "link", "textbox", "list", "columnheader", "rowheader", "group"}
        unnamed = [role for role, name in tree if role in wanted - {"list"} and not name.strip()]
        assert unnamed == []
        assert ("list", "Decode instances") in tree
        # By keyboard alone: past the head, and the pause that a page that moves has to have.
        await page.press("Tab")
        assert await page.js("document.activeElement.className") == "skip"
        await page.press("Tab")
        assert await page.js("document.activeElement.id") == "pause"
        await page.press(" ")
        assert await page.js("document.activeElement.getAttribute('aria-pressed')") == "true"
        assert "paused at" in await page.js("document.getElementById('updated').innerText")
        media = [{"name": "prefers-reduced-motion", "value": "reduce"}]
        wire = "getComputedStyle(document.querySelector('.link[data-flow=on] .wire'), '::before').animationName"
        assert await page.js(wire) == "flow"
        await page.call("Emulation.setEmulatedMedia", features=media)
        assert await page.js(wire) == "none"


@pytest.mark.parametrize("width", [360, 1920])
async def test_64_instances_fit(page: Page, width: int) -> None:
    odd = '<img src=x onerror="document.title=1">' + "x" * 90
    answer = document(1, 24, 40)
    answer.pools[0].members[0] = member("encode", 0, instance=odd)
    async with showing(answer) as served:
        await page.open(served.url + "/ui", width=width)
        await page.until(DRAWN)
        assert await page.js("document.querySelectorAll('.member').length") == 65
        assert await page.js("document.documentElement.scrollWidth") == width
        assert odd in await page.js("document.body.innerText")
        # What needs a look is in sight although the list scrolls.
        first = await page.js(
            "[...document.querySelectorAll('.dense .members')].map((l) => l.firstChild.dataset.state)"
        )
        assert first == ["away", "switching"]
        assert page.log == []


def test_pictures_of_the_page_are_small() -> None:
    pictures = sorted((Path(__file__).parents[3] / "docs" / "images").glob("ui-*.png"))
    assert [picture.name for picture in pictures] == ["ui-dark.png", "ui-light.png"]
    assert all(picture.stat().st_size < 200_000 for picture in pictures)
