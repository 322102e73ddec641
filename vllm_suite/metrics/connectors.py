"""Series of the connectors that hand KV blocks (`KV`) and encoder outputs (`EC`) over."""

from __future__ import annotations

from vllm_suite.handoff import Refusal
from vllm_suite.metrics.table import SeriesSpec, one_of, within

REFUSAL = one_of("reason", *Refusal)
DEADLINES = ("pull_timeout", "claim_timeout", "lease_lost")
"""Reasons of a prompt computed by decode that say that a hand-over was too slow."""
_KV_RECOMPUTES = "reasons of a refusal, and what a pull failed of in `vllm_disagg.worker`"
_FAULTS = "names in the code, with the class of an exception"
PEER = within("peer", "instance ids, 1024 at most, then `other`")
DIRECTION = one_of("direction", "in", "out")
TIER = one_of("tier", "device", "host")

_PULL_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_STAGE_SECONDS = (*_PULL_SECONDS, 30.0, 60.0)
_HELD_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0)

# `peer` is the producer's instance id, taken from references whose claim the producer granted.
KV: tuple[SeriesSpec, ...] = (
    SeriesSpec(
        "vllm_suite_kv_pulls_total",
        "counter",
        "Pulls by outcome: ok, recomputed or failed.",
        (one_of("outcome", "ok", "recomputed", "failed"),),
    ),
    SeriesSpec(
        "vllm_suite_kv_pull_bytes_total",
        "counter",
        "KV bytes pulled.",
        (PEER, DIRECTION),
    ),
    SeriesSpec(
        "vllm_suite_kv_pull_blocks_total",
        "counter",
        "KV blocks pulled.",
        (PEER, DIRECTION),
    ),
    SeriesSpec(
        "vllm_suite_kv_pull_seconds",
        "histogram",
        "Seconds from the start of a pull, handshake included, to its end.",
        (PEER, DIRECTION),
        _PULL_SECONDS,
    ),
    SeriesSpec(
        "vllm_suite_kv_stage_seconds",
        "histogram",
        "Seconds of requests by stage. queue: from their arrival at the scheduler to their prefill or pull; prefill: "
        "from there to its reference; transfer: from the pull's order to its arrival.",
        (one_of("stage", "queue", "prefill", "transfer"),),
        _STAGE_SECONDS,
    ),
    SeriesSpec(
        "vllm_suite_kv_recomputes_total",
        "counter",
        "Prompts computed locally instead, by reason.",
        (within("reason", _KV_RECOMPUTES),),
    ),
    SeriesSpec("vllm_suite_kv_refused_total", "counter", "References refused before use, by reason.", (REFUSAL,)),
    SeriesSpec(
        "vllm_suite_kv_leases_total",
        "counter",
        "Leases that ended on this producer: pulled, released, expired.",
        (one_of("end", "pulled", "released", "expired"),),
    ),
    SeriesSpec(
        "vllm_suite_kv_held_seconds",
        "histogram",
        "Seconds this producer kept the blocks of a finished prefill.",
        (),
        _HELD_SECONDS,
    ),
    SeriesSpec("vllm_suite_kv_leases_outstanding", "gauge", "Leases outstanding on this producer."),
    SeriesSpec(
        "vllm_suite_kv_contained_faults_total",
        "counter",
        "Faults of a transfer that the connector kept from ending the engine.",
        (within("fault", _FAULTS),),
    ),
)

_FETCH_SECONDS = (0.0005, *_PULL_SECONDS)

# `peer` is the producer's instance id, taken from claims that it granted. `tier` is device or host.
EC: tuple[SeriesSpec, ...] = (
    SeriesSpec(
        "vllm_suite_ec_fetches_total",
        "counter",
        "Fetches of items by outcome: ok, or failed.",
        (one_of("outcome", "ok", "failed"),),
    ),
    SeriesSpec("vllm_suite_ec_fetch_bytes_total", "counter", "Bytes of items fetched, all ranks together.", (PEER,)),
    SeriesSpec(
        "vllm_suite_ec_fetch_seconds",
        "histogram",
        "Seconds to fetch an item that is made: claim, read and checks, on the slowest rank.",
        (),
        _FETCH_SECONDS,
    ),
    SeriesSpec(
        "vllm_suite_ec_refused_total",
        "counter",
        "Items that a request could not have from where it said they are, by reason.",
        (REFUSAL,),
    ),
    SeriesSpec(
        "vllm_suite_ec_local_encodes_total",
        "counter",
        "Items that a consumer encoded itself, by reason; no_reference: none was given.",
        (one_of("reason", *Refusal, "no_reference"),),
    ),
    SeriesSpec(
        "vllm_suite_ec_failed_items_total",
        "counter",
        "Items whose request failed because they could not be had, by reason.",
        (one_of("reason", *Refusal, "no_reference"),),
    ),
    SeriesSpec("vllm_suite_ec_loads_total", "counter", "Items put into vLLM's encoder cache without encoding."),
    SeriesSpec("vllm_suite_ec_cut_chunks_total", "counter", "Steps that ended a chunk before an item under way."),
    SeriesSpec("vllm_suite_ec_encoded_items_total", "counter", "Items encoded here and stored."),
    SeriesSpec("vllm_suite_ec_encoded_rows_total", "counter", "Embedding rows of those."),
    SeriesSpec(
        "vllm_suite_ec_reused_items_total", "counter", "Items of encode requests that were stored already: no encode."
    ),
    SeriesSpec(
        "vllm_suite_ec_slices_total",
        "counter",
        "Slices of items that encode requests asked for: cut, or the item was encoded whole.",
        (one_of("outcome", "cut", "whole"),),
    ),
    SeriesSpec("vllm_suite_ec_joined_items_total", "counter", "Items fetched in slices; their bytes by peer as ever."),
    SeriesSpec("vllm_suite_ec_pool_hits_total", "counter", "Claims of items that the pool had, by tier.", (TIER,)),
    SeriesSpec("vllm_suite_ec_pool_misses_total", "counter", "Claims of items that the pool had not."),
    SeriesSpec("vllm_suite_ec_pool_evictions_total", "counter", "Items that made room, by tier.", (TIER,)),
    SeriesSpec("vllm_suite_ec_pool_demotions_total", "counter", "Items that moved one tier down.", (TIER,)),
    SeriesSpec("vllm_suite_ec_pool_bytes", "gauge", "Bytes of the pool in use.", (TIER,)),
    SeriesSpec("vllm_suite_ec_pool_capacity_bytes", "gauge", "Bytes of the pool.", (TIER,)),
    SeriesSpec("vllm_suite_ec_pool_items", "gauge", "Items in the pool.", (TIER,)),
    SeriesSpec(
        "vllm_suite_ec_not_stored_total",
        "counter",
        "Encoder outputs not stored, by reason.",
        (within("reason", "outcomes of storing in `vllm_epd.pool`, and reasons of a refusal"),),
    ),
    SeriesSpec(
        "vllm_suite_ec_served_total",
        "counter",
        "Claims that ended, by end: read, given_up.",
        (one_of("end", "read", "given_up"),),
    ),
    SeriesSpec("vllm_suite_ec_claims_refused_total", "counter", "Claims this producer refused.", (REFUSAL,)),
    SeriesSpec(
        "vllm_suite_ec_leases_outstanding", "gauge", "Claims under way, and items under lease that nobody has claimed."
    ),
    SeriesSpec(
        "vllm_suite_ec_contained_faults_total",
        "counter",
        "Faults of the encoder cache that the connector kept from ending the engine.",
        (within("fault", _FAULTS),),
    ),
)
