"""Series of the router (`ROUTER`)."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

from vllm_suite.metrics.table import Label, SeriesSpec, one_of, within

PREFIX = "vllm_suite_router_"

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Bounds of the router's histograms of seconds that a request or a part of it takes."""

TTFT = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0, 300.0)
TPOT = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)

_STAGE = one_of("stage", "encode", "prefill", "decode")
_WHILE = one_of("stage", "request", "encode", "prefill", "decode", "stream")
_TIMED = one_of("stage", "client", "connect", "encode", "first_byte", "idle", "media", "prefill", "total", "wait")
# Kinds of a failed attempt, and stages whose deadline passed.
_KINDS = (
    "auth", "connect", "cut_off", "disconnect", "engine_dead", "no_encoder", "no_instance", "no_reference", "not_kept",
    "not_sliced", "protocol", "queue", "rejected", "role", "status", "timeout", "wrong_reference", "wrong_slices",
    *(stage for stage in _TIMED.values if stage != "connect"),
)  # fmt: skip
_KIND = one_of("kind", *_KINDS)
_PATH = one_of("path", "direct", "disaggregated")
_INSTANCE = within("instance", "ids of members; gone with the member")
_ROLE = one_of("role", "encode", "prefill", "decode", "any")
VERDICT = one_of("verdict", "good", "late", "slow", "failed", "unknown")
_MODEL = within("model", "models that members serve, and `other`")
_BAND = (one_of("share", "0.5", "0.99"), one_of("bound", "low", "middle", "high"))
_MODALITY = one_of("modality", "image", "video", "audio")
_WHOLE = (
    "prefill", "disabled", "short", "no_prefill", "cached", "unparsed", "malformed", "prompt_embeds", "batch",
    "several_sequences", "beam_search", "prompt_output", "output_limit", "reference_given", "other_version",
)  # fmt: skip
_MEDIA = (
    "ambiguous", "bad_base64", "bad_redirect", "bad_url", "broken", "empty", "fetch_failed", "fetch_timeout",
    "forbidden_address", "item_too_large", "malformed", "no_pixels", "not_json", "rejected", "request_too_large",
    "too_many_items", "too_many_pixels", "unavailable", "unencoded", "unsupported", "url_disabled", "wrong_type",
)  # fmt: skip
_REJECTED = (
    "unauthorized", "draining", "outstanding", "total_body_bytes", "body_too_large", "bad_body", "bad_http",
    *(f"media_{reason}" for reason in _MEDIA),
)  # fmt: skip
_EVENTS = (
    "admitted", "discovery_failed", "duplicate", "forgotten", "refused", "restarted", "suspect", "switched",
    "unreachable",
)  # fmt: skip
_STEPS = (
    "prefill_retry", "prefill_rejected", "decode_alone", "decode_retry", "reference_dropped", "error", "media_sent",
    "encode_local", "encode_retry", "encode_split",
)  # fmt: skip
# Of these kinds each stage can have a part.
_CALL = ("auth", "connect", "disconnect", "engine_dead", "protocol", "role", "status")
_PREFILL = (*_CALL, "prefill", "total")
_DECODE = (*_CALL, "first_byte", "total")
_ENCODE = (
    "connect", "disconnect", "no_reference", "not_kept", "not_sliced", "protocol", "role", "status", "timeout",
    "wrong_reference",
)  # fmt: skip
_FAILED = (
    *(("prefill", kind) for kind in _PREFILL),
    *(("decode", kind) for kind in _DECODE),
    *(("encode", kind) for kind in (*_ENCODE, "queue", "rejected")),
)
_RECOVERED = (
    *(("prefill_retry", kind) for kind in _PREFILL),
    ("prefill_rejected", "status"),
    *(("decode_alone", kind) for kind in (*_PREFILL, "no_instance", "no_reference")),
    *(("decode_retry", kind) for kind in _DECODE if kind != "total"),
    *(("reference_dropped", kind) for kind in _DECODE if kind not in ("connect", "role", "total")),
    ("reference_dropped", "other_version"),
    *(("error", kind) for kind in (*_DECODE, "no_instance", "prefill")),
    ("media_sent", "status"),
    *(("encode_local", kind) for kind in (*_ENCODE, "cut_off", "no_encoder", "queue", "wrong_slices")),
    *(("encode_retry", kind) for kind in _ENCODE),
    ("encode_split", "rejected"),
)
_CUT = ("client", "disconnect", "engine_dead", "idle", "protocol", "status", "total")
_DECIDED = (("disaggregated", "prefill"), *(("direct", reason) for reason in _WHOLE if reason != "prefill"))
# Codes of the router itself and of vLLM.
_CODES = ("200", "400", "401", "404", "408", "413", "429", "499", "500", "502", "503", "504")
_ENDPOINT = one_of("endpoint", "completions", "chat")


def _counter(name: str, text: str, *labels: Label, known: Iterable[tuple[str, ...]] = ()) -> SeriesSpec:
    return SeriesSpec(f"{PREFIX}{name}_total", "counter", text, labels, known=tuple(known))


def _gauge(name: str, text: str, *labels: Label) -> SeriesSpec:
    return SeriesSpec(PREFIX + name, "gauge", text, labels)


def _seconds(name: str, text: str, *labels: Label, buckets: tuple[float, ...] = SECONDS) -> SeriesSpec:
    return SeriesSpec(f"{PREFIX}{name}_seconds", "histogram", text, labels, buckets)


ROUTER: tuple[SeriesSpec, ...] = (
    _counter(
        "requests",
        "Requests answered, by status code.",
        _ENDPOINT,
        within("code", "HTTP status codes; 499: the client left"),
        known=product(_ENDPOINT.values, _CODES),
    ),
    _counter(
        "decisions",
        "Whether prefill ran on another instance, and why.",
        _PATH,
        one_of("reason", *_WHOLE),
        known=_DECIDED,
    ),
    _counter("picks", "Instances chosen.", _STAGE, _INSTANCE),
    _counter(
        "recoveries",
        "Steps taken after a failure.",
        one_of("step", *_STEPS),
        one_of("reason", *_KINDS, "other_version"),
        known=_RECOVERED,
    ),
    _counter("upstream_errors", "Failed attempts on instances.", _STAGE, _KIND, known=_FAILED),
    _counter("timeouts", "Deadlines passed.", _TIMED),
    _counter(
        "stream_errors",
        "Answers that broke off after their first byte.",
        one_of("reason", *_KINDS),
        known=((kind,) for kind in _CUT),
    ),
    _counter("client_disconnects", "Clients that left before the end.", _WHILE),
    _counter(
        "rejected",
        "Requests refused by the router itself.",
        one_of("reason", *_REJECTED),
    ),
    _counter(
        "stripped",
        "Fields and headers from outside that were not let through.",
        one_of(
            "what",
            "kv_transfer_params",
            "ec_transfer_params",
            "vllm_xargs.kv_transfer_params",
            "vllm_xargs.ec_transfer_params",
            "control_header",
        ),
    ),
    _counter("waits", "Requests that waited for a ready instance.", one_of("outcome", "found", "gave_up")),
    _counter("membership_events", "Changes of membership.", one_of("event", *_EVENTS)),
    _counter(
        "lengths",
        "Answers by whether their length was learned (with `lengths.learn`).",
        one_of("kind", "exact", "censored", "unknown"),
    ),
    _counter(
        "length_state",
        "Reads and writes of the file of learned lengths.",
        one_of("step", "load", "save"),
        one_of("outcome", "ok", "missing", "failed"),
    ),
    _counter(
        "encode_items",
        "Media items of requests by what became of them; left: the request ended first.",
        _MODALITY,
        one_of("outcome", "kept", "encoded", "local", "failed", "left"),
    ),
    _counter("encode_shared_items", "Items that were already being encoded for another request.", _MODALITY),
    _counter(
        "encode_slices",
        "Slices of items by what became of them.",
        _MODALITY,
        one_of("outcome", "kept", "encoded", "failed", "left"),
    ),
    _counter("encode_tokens", "Encoder tokens demanded, estimated: what encoders are scaled by.", _MODALITY),
    _counter("encode_bytes", "Media bytes sent to encoders.", _MODALITY),
    _counter("encode_fetched_bytes", "Media bytes fetched from URLs.", _MODALITY),
    _counter(
        "encode_requests",
        "Requests with media by how their items were provided.",
        one_of("mode", "encoded", "overlapped", "local"),
    ),
    _counter(
        "encode_probes",
        "Questions to producers whether they still keep items.",
        one_of("outcome", "answered", "resting", "timeout", "disconnect", "protocol"),
    ),
    _counter(
        "trace_spans",
        "Spans of finished requests by whether the collector took them.",
        one_of("outcome", "exported", "failed"),
    ),
    _counter(
        "slo_requests",
        "Requests by whether they kept `slo` of the fleet file, where it has one: good; late: the first token; slow: "
        "those after it; failed: 5xx, 429 or broken off; unknown: the length of the answer is not known. Goodput is "
        "good ones over all but unknown ones.",
        _MODEL,
        VERDICT,
    ),
    _seconds(
        "stage",
        "Where the time of answered requests went. queue: until an instance is ready and, as plugin disagg says it, in "
        "prefill's queue; first_token: from asking decode to its first byte, transfer included; decode: from there to "
        "the end; answer: both, of answers that are not streamed.",
        _PATH,
        one_of("stage", "encode", "queue", "prefill", "first_token", "decode", "answer"),
    ),
    _seconds(
        "ttft",
        "Time to first token of streamed answers. The targets and predicted times of the fleet file are buckets too.",
        _MODEL,
        buckets=TTFT,
    ),
    _seconds(
        "tpot",
        "Mean time per token after the first of streamed answers; buckets as for the one above. Tokens are counted by "
        "the usage in the answer, else by its events.",
        _MODEL,
        buckets=TPOT,
    ),
    _seconds("request", "From the whole request read to the whole answer written.", _PATH),
    _seconds("first_byte", "From the whole request read to the first byte of the answer.", _PATH),
    _seconds("prefill", "Prefill attempts that gave a reference."),
    _seconds("encode_queue", "Items' wait for room on their encoder."),
    _seconds("encode_call", "Calls to encoders."),
    _seconds("encode_item", "From an item's booking to its reference or failure, retries included."),
    _seconds("encode_request", "What the stage took of requests that waited for it."),
    _seconds("encode_admission", "Fetching, checking and hashing the media of a request."),
    _gauge("instances", "Members by role and readiness.", _ROLE, one_of("ready", "true", "false")),
    _gauge("outstanding_requests", "Requests the router has running on an instance.", _INSTANCE, _ROLE),
    _gauge("outstanding_tokens", "Tokens estimated for them.", _INSTANCE, _ROLE),
    _gauge("history_chunks", "Prompt chunks remembered of an instance.", _INSTANCE),
    _gauge("outstanding_encode_tokens", "Encoder tokens sent to an instance or waiting for it.", _INSTANCE, _ROLE),
    _gauge("encode_tokens_per_second", "Encoder tokens demanded, over about the last half minute."),
    _gauge("encode_known_items", "Encoded items remembered with where they are kept."),
    _gauge("slo_ttft_seconds", "Target `slo.ttft` of the fleet file."),
    _gauge("slo_tpot_seconds", "Target `slo.tpot` of the fleet file."),
    _gauge("slo_attainment_ratio", "`slo.attainment`: share of requests that are to keep both; with a target alone."),
    _gauge("predicted_ttft_seconds", "`predicted.ttft` of the fleet file.", *_BAND),
    _gauge("predicted_tpot_seconds", "`predicted.tpot` of the fleet file.", *_BAND),
    _gauge("predicted_requests_per_second", "`predicted.rate`: the rate that the predicted times are of."),
    _gauge("predicted_error_ratio", "`predicted.error`: relative error of the predicted step times."),
    _gauge("requests_in_flight", "Requests inside the router."),
    _gauge("body_bytes", "Bytes of their bodies; those whose answer has begun hold none."),
    _gauge("draining", "1 after SIGTERM."),
    _gauge("min_prompt_tokens", "Uncached prompt length from which prefill is disaggregated."),
    _gauge("bytes_per_token", "Learned length of a token in text prompts."),
)
