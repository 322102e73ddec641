"""A headless Chromium, driven over its DevTools protocol with aiohttp alone."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp

BINARY = shutil.which("chromium") or shutil.which("chromium-browser")
MISSING = "Debian's package `chromium` is not installed"
# Its sandbox wants user namespaces and a user that is not root; what it opens here is our own page.
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-default-apps", "--disable-extensions",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-port=0", "about:blank",
)  # fmt: skip
_START_S = 60.0
_WAIT_S = 30.0


class Page:
    """One tab. `log` holds console messages and uncaught errors, `requests` the URLs asked for."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reader = asyncio.create_task(self._read())
        self.log: list[str] = []
        self.requests: list[tuple[str, str]] = []

    async def _read(self) -> None:
        async for message in self._socket:
            event = json.loads(message.data)
            params = event.get("params", {})
            match event.get("method"):
                case None:
                    future = self._waiting.pop(event["id"])
                    if not future.cancelled():
                        future.set_result(event)
                case "Runtime.consoleAPICalled":
                    self.log.append(f"{params['type']}: {[one.get('value') for one in params['args']]}")
                case "Runtime.exceptionThrown":
                    self.log.append(f"uncaught: {params['exceptionDetails']}")
                case "Log.entryAdded":
                    self.log.append(
                        f"{params['entry']['source']}: {params['entry']['text']} {params['entry'].get('url')}"
                    )
                case "Network.requestWillBeSent":
                    self.requests.append((params["request"]["method"], params["request"]["url"]))

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol; its result."""
        number = next(self._numbers)
        self._waiting[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        answer = await asyncio.wait_for(self._waiting[number], _WAIT_S)
        assert "error" not in answer, (method, answer["error"])
        result: dict[str, Any] = answer["result"]
        return result

    async def start(self) -> None:
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility", "DOM"):
            await self.call(f"{domain}.enable")

    async def open(self, url: str, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Load a page in a window of this size and colour scheme."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        await self.scheme(scheme)
        await self.call("Page.navigate", url=url)

    async def scheme(self, name: str) -> None:
        """Prefer light or dark from now on."""
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    async def js(self, expression: str) -> Any:
        """The value of an expression, promises awaited."""
        answer = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, expression: str, timeout_s: float = _WAIT_S) -> Any:
        """Wait until an expression is true; its value."""
        async with asyncio.timeout(timeout_s):
            while True:
                with contextlib.suppress(AssertionError):  # between two documents there is no body
                    if found := await self.js(expression):
                        return found
                await asyncio.sleep(0.05)

    async def type(self, text: str) -> None:
        await self.call("Input.insertText", text=text)

    async def press(self, key: str) -> None:
        codes = {"Enter": 13, "Tab": 9, " ": 32}
        text = {"Enter": "\r", " ": " "}.get(key, "")
        common = {"key": key, "windowsVirtualKeyCode": codes[key]}
        await self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    async def picture(self) -> bytes:
        """The whole page as PNG."""
        size = (await self.call("Page.getLayoutMetrics"))["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = await self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(shot["data"])

    async def tree(self) -> list[tuple[str, str]]:
        """Role and accessible name of everything that assistive technology is told of."""
        nodes = (await self.call("Accessibility.getFullAXTree"))["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node.get("ignored")
        ]

    async def close(self) -> None:
        self._reader.cancel()
        await self._socket.close()


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[str]:
    """A running browser with a new profile; gives the address of its DevTools."""
    assert BINARY is not None, MISSING
    process = subprocess.Popen(
        [BINARY, f"--user-data-dir={profile}", *_FLAGS],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        port = _port(profile / "DevToolsActivePort", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


@contextlib.asynccontextmanager
async def tab(devtools: str) -> AsyncIterator[Page]:
    """A tab of its own, with storage of its own."""
    async with aiohttp.ClientSession() as session:
        async with session.put(f"{devtools}/json/new?about:blank") as response:
            made = await response.json()
        page = Page(await session.ws_connect(made["webSocketDebuggerUrl"], max_msg_size=1 << 26))
        try:
            await page.start()
            yield page
        finally:
            await page.close()
            async with session.get(f"{devtools}/json/close/{made['id']}"):
                pass


def _port(path: Path, process: subprocess.Popen[bytes]) -> int:
    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        assert process.poll() is None, f"chromium ended with {process.returncode}"
        if path.exists() and (text := path.read_text()).count("\n"):
            return int(text.split("\n")[0])
        time.sleep(0.05)
    raise AssertionError(f"chromium did not open its DevTools in {_START_S:g} s")
