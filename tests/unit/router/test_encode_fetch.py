"""Media behind URLs: what is fetched, and what a client cannot make the router reach."""

from __future__ import annotations

import asyncio
import base64
import socket

import pytest
from aiohttp import web
from encoders import chat, fleet, image, parts_of, png, wav
from scripted import free_port

from vllm_suite.router.encode.addresses import Addresses
from vllm_suite.router.encode.config import Fetch
from vllm_suite.router.encode.fetch import Fetcher
from vllm_suite.router.encode.refusal import BadMedia

CHAT = "/v1/chat/completions"
LOOPBACK = "127.0.0.1/32"


class Files:
    """A web server on loopback; `pages` are its answers by path, `seen` what it was asked."""

    def __init__(self):
        self.pages = {}
        self.seen = []
        self.aborted = asyncio.Event()
        self.port = free_port()

    async def start(self, host="127.0.0.1"):
        app = web.Application()
        app.router.add_get("/{name:.*}", self._page)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, self.port).start()
        return self

    async def stop(self):
        await self._runner.cleanup()

    def url(self, name, host="127.0.0.1"):
        return f"http://{host}:{self.port}/{name}"

    async def _page(self, request):
        self.seen.append(request)
        page = self.pages[request.match_info["name"]]
        if page == "hang":
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                self.aborted.set()
                raise
        if callable(page):
            return await page(request)
        return web.Response(**page)


@pytest.fixture
async def files():
    made = await Files().start()
    made.pages["x.png"] = {"body": png(), "content_type": "image/png"}
    yield made
    await made.stop()


@pytest.fixture
def names(monkeypatch):
    """Names and what they resolve to, one list of addresses after the other; the last one stays."""
    table: dict[str, list[list[str]]] = {}
    asked = []

    async def resolve(host, port, *, family=0, type=0, **kwargs):
        asked.append(host)
        if host not in table:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        answers = table[host]
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        kinds = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in found]
        return [(kind, socket.SOCK_STREAM, 6, "", (address, port)) for kind, address in zip(kinds, found, strict=True)]

    async def install():
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
        return table, asked

    return install


def fetcher(files, **more):
    return Fetcher(Fetch(**{"enabled": True, "ports": (files.port,), "allowed_networks": (LOOPBACK,), **more}), 1000)


async def refused(made, url, modality="image"):
    with pytest.raises(BadMedia) as caught:
        await made.get(url, modality)
    await made.close()
    return caught.value.reason


async def test_media_are_fetched_once_and_travel_on_as_data(instance, encoder, serve, files):
    es, p, _, router = await fleet(
        instance,
        encoder,
        serve,
        settings={"fetch": {"enabled": True, "ports": [files.port], "allowed_networks": [LOOPBACK]}},
    )
    part = {"type": "image_url", "image_url": {"url": files.url("x.png")}}
    headers = {"Authorization": "Bearer client", "Cookie": "a=b", "X-Mine": "1"}
    assert (await router.post(chat(part, part, image(seed=1)), path=CHAT, headers=headers))[0] == 200
    assert len(files.seen) == 1
    assert not {"Authorization", "Cookie", "X-Mine", "X-Request-Id"} & set(files.seen[0].headers)
    sent = [one for e in es for seen in e.seen for one in parts_of(seen.body)]
    assert len(sent) == 2
    url = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    assert url in [one["image_url"]["url"] for one in sent]
    assert files.url("x.png") not in p.seen[0].raw.decode()
    assert router.value("encode_fetched_bytes_total", modality="image") == len(png())
    # The same picture sent as data is the same item.
    assert (await router.post(chat(image()), path=CHAT))[0] == 200
    assert sum(len(e.seen) for e in es) <= 2


async def test_a_client_that_leaves_ends_its_downloads(instance, encoder, serve, files):
    _, _, _, router = await fleet(
        instance,
        encoder,
        serve,
        settings={"fetch": {"enabled": True, "ports": [files.port], "allowed_networks": [LOOPBACK]}},
    )
    files.pages["slow"] = "hang"
    part = {"type": "image_url", "image_url": {"url": files.url("slow")}}
    task = asyncio.create_task(router.post(chat(part), path=CHAT))
    await router.until(lambda: bool(files.seen))
    task.cancel()
    async with asyncio.timeout(3):
        await files.aborted.wait()


async def test_the_failing_item_is_named(instance, encoder, serve, files):
    fetch = {"enabled": True, "ports": [files.port], "allowed_networks": [LOOPBACK]}
    _, _, d, router = await fleet(instance, encoder, serve, settings={"fetch": fetch})
    files.pages["gone"] = {"status": 404}
    part = {"type": "image_url", "image_url": {"url": files.url("gone")}}
    status, answer = await router.post(chat(image(), part), path=CHAT)
    assert (status, answer["error"]["message"]) == (400, "item 1 (image_url): its URL answered 404")
    assert not d.seen


ADDRESSES = [
    ("8.8.8.8", True),
    ("93.184.216.34", True),
    ("2606:2800:220:1:248:1893:25c8:1946", True),
    ("127.0.0.1", False),
    ("127.8.8.8", False),
    ("10.1.2.3", False),
    ("172.16.0.1", False),
    ("192.168.1.1", False),
    ("169.254.169.254", False),
    ("168.63.129.16", False),
    ("100.100.100.200", False),
    ("0.0.0.0", False),
    ("255.255.255.255", False),
    ("224.0.0.1", False),
    ("240.0.0.1", False),
    ("192.0.0.192", False),
    ("198.18.0.1", False),
    ("192.88.99.1", False),
    ("fec0::1", False),
    ("100::1", False),
    ("2001:4:112::1", False),
    ("::", False),
    ("::1", False),
    ("::ffff:127.0.0.1", False),
    ("::ffff:169.254.169.254", False),
    ("::ffff:8.8.8.8", True),
    ("::127.0.0.1", False),
    ("64:ff9b::7f00:1", False),
    ("64:ff9b::808:808", False),
    ("2002:7f00:1::", False),
    ("2001:0:7f00:1::", False),
    ("fe80::1", False),
    ("fe80::1%eth0", False),
    ("fc00::1", False),
    ("fd00:ec2::254", False),
    ("ff02::1", False),
    ("2001:db8::1", False),
    ("2130706433", False),
    ("127.1", False),
    ("0177.0.0.1", False),
    ("localhost", False),
    ("", False),
]


@pytest.mark.parametrize(("address", "may"), ADDRESSES)
def test_addresses(address, may):
    assert Addresses(()).may(address) is may


def test_networks_of_one_s_own_may_be_allowed():
    some = Addresses(("10.0.0.0/8", "fd00::/8"))
    assert some.may("10.1.2.3")
    assert some.may("::ffff:10.1.2.3")
    assert some.may("fd00::1")
    assert not some.may("192.168.0.1")
    assert not some.may("127.0.0.1")


URLS = [
    ("http://127.0.0.2:{port}/x.png", "forbidden_address"),
    ("http://[::1]:{port}/x.png", "forbidden_address"),
    ("http://[::ffff:127.0.0.2]:{port}/x.png", "forbidden_address"),
    ("http://[::ffff:a9fe:a9fe]:{port}/", "forbidden_address"),
    ("http://2130706434:{port}/x.png", "forbidden_address"),
    ("http://127.2:{port}/x.png", "forbidden_address"),
    ("http://0177.0.0.2:{port}/x.png", "forbidden_address"),
    ("http://0x7f.0.0.2:{port}/x.png", "fetch_failed"),
    ("http://127.0.0.2.:{port}/x.png", "forbidden_address"),
    ("http://１２７.0.0.2:{port}/x.png", "forbidden_address"),
    ("http://user@127.0.0.1:{port}/x.png", "bad_url"),
    ("http://user:word@127.0.0.1:{port}/x.png", "bad_url"),
    ("http://127.0.0.1:22/x.png", "bad_url"),
    ("http://127.0.0.1/x.png", "bad_url"),
    ("ftp://127.0.0.1:{port}/x.png", "bad_url"),
    ("file:///etc/passwd", "bad_url"),
    ("gopher://127.0.0.1:{port}/", "bad_url"),
    ("//127.0.0.1:{port}/x.png", "bad_url"),
    ("http://", "bad_url"),
    ("http://[::1", "bad_url"),
    ("http://127.0.0.1:{port}/" + "x" * 9000, "bad_url"),
    ("", "bad_url"),
]


@pytest.mark.parametrize(("url", "reason"), URLS)
async def test_urls_that_are_not_fetched(files, names, url, reason):
    await names()
    assert await refused(fetcher(files), url.format(port=files.port)) == reason
    assert not files.seen


@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.2"], ["10.0.0.1"], ["169.254.169.254"], ["::1"], ["::ffff:10.0.0.1"], ["127.0.0.1", "10.0.0.1"]],
)
async def test_names_of_forbidden_addresses(files, names, addresses):
    table, _ = await names()
    table["pictures.test"] = [addresses]
    assert await refused(fetcher(files), files.url("x.png", "pictures.test")) == "forbidden_address"
    assert not files.seen


async def test_a_name_that_rebinds_is_resolved_once_a_hop(files, names):
    """The second answer would lead elsewhere; the connection goes to the address that was checked."""
    table, asked = await names()
    table["rebind.test"] = [["127.0.0.1"], ["10.0.0.1"]]
    made = fetcher(files)
    assert (await made.get(files.url("x.png", "rebind.test"), "image"))[1] == png()
    assert asked == ["rebind.test"]
    assert files.seen[0].headers["Host"].startswith("rebind.test")
    assert await refused(made, files.url("x.png", "rebind.test")) == "forbidden_address"
    assert len(files.seen) == 1


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://169.254.169.254/latest/meta-data", "bad_url"),  # a port that is not allowed, checked first
        ("http://10.0.0.1:{port}/", "forbidden_address"),
        ("http://inside.test:{port}/", "forbidden_address"),
        ("file:///etc/passwd", "bad_url"),
        ("http://u@127.0.0.1:{port}/x.png", "bad_url"),
        ("", "bad_redirect"),
        ("loop", "bad_redirect"),
    ],
)
async def test_redirects_are_checked_again(files, names, location, reason):
    table, _ = await names()
    table["inside.test"] = [["10.0.0.1"]]
    files.pages["loop"] = {"status": 302, "headers": {"Location": location.format(port=files.port)}}
    assert await refused(fetcher(files), files.url("loop")) == reason


async def test_redirects_are_followed_so_far(files):
    for number in range(5):
        target = f"/r{number + 1}" if number < 4 else "/x.png"
        files.pages[f"r{number}"] = {"status": 307, "headers": {"Location": target}}
    made = fetcher(files)
    assert (await made.get(files.url("r2"), "image"))[0] == "image/png"
    assert await refused(made, files.url("r0")) == "bad_redirect"


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        ({"body": b"<html>", "content_type": "text/html"}, "wrong_type"),
        ({"body": wav(0.01), "content_type": "audio/wav"}, "wrong_type"),
        ({"body": bytes(1001), "content_type": "image/png"}, "item_too_large"),
        ({"status": 500}, "fetch_failed"),
        ({"status": 204}, "fetch_failed"),
        ({"body": b"x", "content_type": "image/png", "headers": {"Content-Encoding": "gzip"}}, "fetch_failed"),
        ("hang", "fetch_timeout"),
    ],
)
async def test_answers_that_are_not_taken(files, page, reason):
    files.pages["it"] = page
    assert await refused(fetcher(files, timeout_s=0.3), files.url("it")) == reason


async def test_a_body_of_unknown_length_is_cut_at_the_limit(files):
    sent = []

    async def endless(request):
        response = web.StreamResponse(headers={"Content-Type": "image/png"})
        await response.prepare(request)
        while True:
            sent.append(1)
            await response.write(bytes(500))

    files.pages["endless"] = endless
    assert await refused(fetcher(files), files.url("endless")) == "item_too_large"


async def test_untyped_media_pass(files):
    files.pages["raw"] = {"body": png(), "content_type": "binary/octet-stream"}
    made = fetcher(files)
    assert (await made.get(files.url("raw"), "image"))[1] == png()
    await made.close()


async def test_only_listed_hosts(files, names):
    table, _ = await names()
    for name in ("a.pictures.test", "pictures.test", "xpictures.test", "other.test"):
        table[name] = [["127.0.0.1"]]
    made = fetcher(files, hosts=(".pictures.test", "other.test"))
    for name in ("a.pictures.test", "A.Pictures.test", "other.test"):
        assert (await made.get(files.url("x.png", name), "image"))[1] == png()
    for name in ("pictures.test", "xpictures.test", "127.0.0.1", "other.test.evil"):
        assert await refused(made, files.url("x.png", name)) == "forbidden_address"


async def test_nothing_is_fetched_unless_allowed(files):
    made = Fetcher(Fetch(ports=(files.port,), allowed_networks=(LOOPBACK,)), 1000)
    assert await refused(made, files.url("x.png")) == "url_disabled"
    strict = Fetcher(Fetch(enabled=True, ports=(files.port,)), 1000)
    assert await refused(strict, files.url("x.png")) == "forbidden_address"
    assert not files.seen


async def test_so_many_at_a_time(files):
    running = peak = 0

    async def slow(request):
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(0.05)
        running -= 1
        return web.Response(body=png(), content_type="image/png")

    for number in range(8):
        files.pages[f"p{number}"] = slow
    made = fetcher(files, concurrency=2)
    await asyncio.gather(*(made.get(files.url(f"p{number}"), "image") for number in range(8)))
    assert peak == 2
    await made.close()
