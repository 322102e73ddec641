"""Running the router as a process: listen, drain on SIGTERM or SIGINT, exit."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
from collections.abc import Callable

from aiohttp import web

from vllm_suite.router.app import ROUTER, create_app
from vllm_suite.router.config import RouterConfig

logger = logging.getLogger(__name__)


async def serve(config: RouterConfig, listening: Callable[[str], None] = lambda url: None) -> bool:
    """Serve until a signal, drain, and say whether every running request could finish.

    `listening` gets the URL once connections are accepted. A second signal ends the drain at once. Raises
    OSError where the address cannot be bound and `auth.KeyFileError`.
    """
    app = create_app(config)
    router = app[ROUTER]
    limits = config.limits
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        handle_signals=False,
        max_line_size=limits.header_bytes,
        max_field_size=limits.header_bytes,
        max_headers=limits.header_count,
        # Time for answers that are made and not yet written when the drain ends.
        shutdown_timeout=1.0,
    )
    await runner.setup()
    signals: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, signals.put_nowait, int(number))
        site = web.TCPSite(runner, config.host, config.port, backlog=1024)
        await site.start()
        # A request leaves few cycles behind, so collecting often only walks live objects again and again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)
        listening(f"http://{_address(runner, config)}")
        await signals.get()
        router.begin_drain()
        logger.info("draining for at most %g s", config.timeouts.drain_s)
        drained = asyncio.create_task(router.drained(config.timeouts.drain_s))
        impatient = asyncio.create_task(signals.get())
        await asyncio.wait((drained, impatient), return_when=asyncio.FIRST_COMPLETED)
        impatient.cancel()
        complete = drained.done() and drained.result()
        drained.cancel()
        if not complete:
            router.watchdog.cancel_all()
        return complete
    finally:
        await runner.cleanup()


def _address(runner: web.AppRunner, config: RouterConfig) -> str:
    host, port = config.host, config.port
    for address in runner.addresses:
        if isinstance(address, tuple):
            port = address[1]
            break
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
