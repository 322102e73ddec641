"""The router as an aiohttp application: routes, keys, limits, drain."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import aiohttp
import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from vllm_suite.handoff import fleet_key
from vllm_suite.router.auth import Keys, allowed
from vllm_suite.router.chain import Chain
from vllm_suite.router.config import RouterConfig
from vllm_suite.router.discovery import discoveries
from vllm_suite.router.encode.stage import EncodeStage
from vllm_suite.router.errors import error_response, unauthorized
from vllm_suite.router.guard import Watchdog
from vllm_suite.router.headers import REQUEST_ID
from vllm_suite.router.intake import announced, make_job, read_body
from vllm_suite.router.job import Job
from vllm_suite.router.lengths import OutputLengths
from vllm_suite.router.members import Pool
from vllm_suite.router.membership import Membership
from vllm_suite.router.metrics import Live, RouterMetrics
from vllm_suite.router.models import list_models
from vllm_suite.router.probe import StockProbe, SuiteProbe
from vllm_suite.router.prompt import Endpoint
from vllm_suite.router.relay import ClientGone
from vllm_suite.router.room import Room, Share
from vllm_suite.router.server_log import BadHttp
from vllm_suite.router.status import describe
from vllm_suite.router.targets import Targets
from vllm_suite.router.times import Times
from vllm_suite.router.tracing import Tracing
from vllm_suite.router.ui.history import STEP_S
from vllm_suite.router.ui.routes import PATHS as UI_PATHS
from vllm_suite.router.ui.routes import LiveRoutes
from vllm_suite.router.ui.state import LiveState
from vllm_suite.router.upstream import open_session

_PATHS = {
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/models",
    "/health",
    "/ready",
    "/metrics",
    "/suite/v1/instances",
    *UI_PATHS,
}


class Router:
    """The handlers and what they share. `create_app` wires one into an application."""

    def __init__(self, config: RouterConfig) -> None:
        self.config = config
        self.keys = Keys.resolve(config.auth)
        self._fleet_key = fleet_key()
        self.pool = Pool()
        room, cuts = Room(config.limits.total_body_bytes), config.disaggregation
        self.live = Live(cuts.min_prompt_tokens, cuts.bytes_per_token, room)
        targets = Targets.of(config)
        self.metrics = RouterMetrics(self.pool, self.live, targets)
        self.metrics.start_at_zero(but=_not_counted(config))
        self._times = Times(targets, self.pool, self.metrics)
        self.watchdog = Watchdog()
        self._membership: Membership | None = None
        self.ui = LiveState(
            self.pool,
            self.live,
            self.metrics,
            config.slo,
            config.predicted,
            lambda: self._membership.missing() if self._membership is not None else {},
        )
        self._tracing: Tracing | None = None
        self._chain: Chain | None = None
        self._session: aiohttp.ClientSession | None = None
        self._empty = asyncio.Event()
        self._empty.set()

    async def lifespan(self, app: web.Application) -> AsyncIterator[None]:
        """Start membership and the client session with the application, and end them with it."""
        config = self.config
        self.watchdog.start()
        async with open_session(config) as session:
            make = SuiteProbe if config.membership.state == "suite" else StockProbe
            if config.tracing is not None:
                self._tracing = Tracing(
                    config.tracing, lambda outcome, spans: self.metrics.add(spans, "trace_spans", outcome)
                )
            membership = Membership(
                config.membership,
                discoveries(config.membership),
                make(session, self.keys.state_header),
                self.pool,
                self.metrics,
                config.disaggregation.history_chunks,
            )
            encode = EncodeStage(config, self.pool, membership, session, self.metrics, self.live, self._fleet_key)
            lengths = OutputLengths(config.lengths, self.metrics) if config.lengths.learn else None
            if lengths is not None:
                lengths.load()
            self._chain = Chain(config, self.pool, membership, session, self.metrics, self.live, encode, lengths)
            self._session = session
            self._membership = membership
            bad_http = BadHttp(self.metrics)
            bad_http.install()
            await membership.start()
            ticking = asyncio.create_task(self._tick())
            try:
                yield
            finally:
                ticking.cancel()
                bad_http.remove()
                await membership.stop()
                await encode.close()
                if self._tracing is not None:
                    await self._tracing.close()
                if lengths is not None:
                    lengths.save()
                self.watchdog.stop()

    async def _tick(self) -> None:
        while True:
            self.ui.tick()
            await asyncio.sleep(STEP_S)

    # Drain

    def begin_drain(self) -> None:
        """From now on /ready and new requests answer 503; running ones go on."""
        self.live.draining = True

    async def drained(self, timeout_s: float) -> bool:
        """Wait until no request runs; False when some still did after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    # Generation

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions"""
        return await self._generate(request, "completions")

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions"""
        return await self._generate(request, "chat")

    async def _generate(self, request: web.Request, endpoint: Endpoint) -> web.StreamResponse:
        refusal = self._refusal(request)
        if refusal is not None:
            self.metrics.count("requests", endpoint, str(refusal.status))
            return refusal
        live, guard = self.live, self.watchdog.guard(self.config.timeouts.total_s)
        live.requests_in_flight += 1
        share = Share(live.room)
        self._empty.clear()
        job: Job | None = None
        code = "499"  # the client left; nginx's number for it
        try:
            body = await read_body(request, guard, share, self.config, self.metrics)
            if isinstance(body, web.Response):
                code = str(body.status)
                if body.status == 429:
                    self._times.failed()
                return body
            started = time.perf_counter()
            job = make_job(request, endpoint, body, guard, started, self.config, self.keys, self.metrics, share)
            if self._tracing is not None:
                job.trace = self._tracing.begin(endpoint, job.rid, request.headers)
            assert self._chain is not None
            response = await self._chain.run(job)
            if not response.prepared:
                response.headers[REQUEST_ID] = job.rid
            code = str(response.status)
            job.lap("decode")
            self.metrics.observe(job.lapped - started, "request_seconds", job.path)
            self._times.ended(job, response.status)
            return response
        except (ClientGone, asyncio.CancelledError) as exc:
            self.metrics.count("client_disconnects", job.stage if job is not None else "request")
            if isinstance(exc, ClientGone):
                raise asyncio.CancelledError from exc
            raise
        except Exception:
            # A defect of the router: the server answers 500 and logs it. It must not pass for a client that left.
            code = "500"
            self._times.failed()
            raise
        finally:
            self.metrics.count("requests", endpoint, code)
            if job is not None:
                job.trace.end(int(code), job.path, job.answer.broken if job.answer is not None else "")
            self.watchdog.release(guard)
            share.release()
            live.requests_in_flight -= 1
            if live.requests_in_flight == 0:
                self._empty.set()

    def _refusal(self, request: web.Request) -> web.Response | None:
        limits, live = self.config.limits, self.live
        if not allowed(request.headers.get("Authorization"), self.keys.client):
            self.metrics.count("rejected", "unauthorized")
            return unauthorized()
        if live.draining:
            self.metrics.count("rejected", "draining")
            return error_response(503, "the router is draining", retry_after_s=limits.retry_after_s)
        if live.requests_in_flight >= limits.outstanding_requests:
            self.metrics.count("rejected", "outstanding")
            self._times.failed()
            return error_response(429, "too many outstanding requests", retry_after_s=limits.retry_after_s)
        full = announced(request, live.room, self.config, self.metrics)
        if full is not None:
            self._times.failed()
        return full

    # Everything else

    def _locked(self, request: web.Request) -> web.Response | None:
        if allowed(request.headers.get("Authorization"), self.keys.client):
            return None
        self.metrics.count("rejected", "unauthorized")
        return unauthorized()

    async def models(self, request: web.Request) -> web.StreamResponse:
        """GET /v1/models: what the instances answer, merged where they serve different models."""
        locked = self._locked(request)
        if locked is not None:
            return locked
        assert self._session is not None
        authorization = self.keys.upstream_header
        if self.config.auth.forward_authorization:
            authorization = request.headers.get("Authorization")
        return await list_models(self.pool, self._session, authorization, self.config)

    async def health(self, request: web.Request) -> web.Response:
        """GET /health: this process serves."""
        return web.Response()

    async def ready(self, request: web.Request) -> web.Response:
        """GET /ready: new requests would be taken."""
        locked = self._locked(request)
        if locked is not None:
            return locked
        if self.live.draining:
            return error_response(503, "the router is draining")
        if not self.pool.eligible(("decode", "any"), None):
            return error_response(503, "no decode instance is ready")
        return web.Response()

    async def scrape(self, request: web.Request) -> web.Response:
        """GET /metrics in Prometheus' text format."""
        locked = self._locked(request)
        if locked is not None:
            return locked
        body = generate_latest(self.metrics.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def instances(self, request: web.Request) -> web.Response:
        """GET /suite/v1/instances: the members with what they say and what they have outstanding."""
        if not allowed(request.headers.get("Authorization"), self.keys.control):
            self.metrics.count("rejected", "unauthorized")
            return unauthorized()
        body = describe(self.pool, self.live, self.metrics)
        return web.Response(body=msgspec.json.encode(body), content_type="application/json")

    async def unknown(self, request: web.Request) -> web.Response:
        """Any other path or method, in the words of vLLM's server."""
        locked = self._locked(request)
        if locked is not None:
            return locked
        if request.path in _PATHS:
            return error_response(405, "Method Not Allowed")
        return error_response(404, "Not Found")


def _not_counted(config: RouterConfig) -> Iterator[str]:
    """Counters, as `RouterMetrics` names them, of what is switched off."""
    if not config.lengths.learn:
        yield from ("lengths", "length_state")
    if config.tracing is None:
        yield "trace_spans"


ROUTER = web.AppKey("router", Router)


def create_app(config: RouterConfig) -> web.Application:
    """An application ready for a runner. Raises `auth.KeyFileError`.

    Give the runner `handler_cancellation=True`: without it a client that leaves during prefill is noticed only
    when its answer is written. `server.serve` does.
    """
    router = Router(config)
    app = web.Application(client_max_size=config.limits.body_bytes)
    app[ROUTER] = router
    app.cleanup_ctx.append(router.lifespan)
    app.router.add_post("/v1/completions", router.completions)
    app.router.add_post("/v1/chat/completions", router.chat)
    app.router.add_get("/v1/models", router.models)
    app.router.add_get("/health", router.health)
    app.router.add_get("/ready", router.ready)
    app.router.add_get("/metrics", router.scrape)
    app.router.add_get("/suite/v1/instances", router.instances)
    LiveRoutes(router.ui, router.keys, router.metrics).add(app)
    app.router.add_route("*", "/{path:.*}", router.unknown)
    return app
