"""What the router knows of its instances, for `GET /suite/v1/instances`."""

from __future__ import annotations

from vllm_suite.router.members import Member, Pool
from vllm_suite.router.metrics import Live, RouterMetrics


def describe(pool: Pool, live: Live, metrics: RouterMetrics) -> dict[str, object]:
    """The members with what they say and what they have outstanding, and the encode pool in sum."""
    return {
        "draining": live.draining,
        "instances": [_row(member) for member in pool.members],
        "encode": _encode_pool(pool, live, metrics),
    }


def _row(member: Member) -> dict[str, object]:
    return {
        "instance_id": member.instance_id,
        "epoch": member.epoch,
        "role": member.role,
        "role_epoch": member.state.role_epoch,
        "phase": member.state.phase,
        "url": member.url,
        "ready": member.ready,
        "models": member.state.models,
        "load": member.state.load,
        "versions": member.state.versions,
        "ec": member.state.ec._asdict() if member.state.ec is not None else None,
        "outstanding_requests": member.outstanding_requests,
        "outstanding_tokens": member.outstanding_tokens,
        "outstanding_encode_tokens": member.encode_tokens,
    }


def _encode_pool(pool: Pool, live: Live, metrics: RouterMetrics) -> dict[str, object]:
    encoders = [member for member in pool.members if member.role == "encode"]
    return {
        "instances": len(encoders),
        "ready": sum(member.ready for member in encoders),
        "outstanding_tokens": sum(member.encode_tokens for member in pool.members),
        "tokens_per_second": metrics.encode_rate.per_second(),
        "known_items": live.known_items,
    }
