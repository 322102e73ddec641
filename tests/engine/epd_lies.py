"""Wrong references and wrong answers to claims, each with the reason for which it must be refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Fault = Callable[[str, dict[str, Any]], dict[str, Any]]


def changed(**fields: Any) -> Fault:
    """The reference with some fields replaced."""

    def fault(uuid: str, ec: dict[str, Any]) -> dict[str, Any]:
        return {uuid: {"suite": ec[uuid]["suite"] | fields}}

    return fault


WRONG_REFERENCES: list[tuple[Fault, str]] = [
    (changed(version=2), "malformed"),
    (changed(producer="somebody"), "foreign_producer"),
    (changed(epoch="0" * 16), "stale_epoch"),
    (changed(request_id="item-99999"), "tampered"),
    (changed(request_id="x"), "tampered"),
    (changed(content="0" * 32), "foreign_content"),
    (changed(model="0" * 32), "foreign_model"),
    (changed(layout="0" * 32), "foreign_layout"),
    (changed(tokens=15), "truncated"),
    (changed(tokens=17), "wrong_shape"),
    (changed(location="0" * 32), "tampered"),
    (changed(claim_host="127.0.0.2"), "tampered"),
    (changed(claim_port=1), "tampered"),
    (changed(claim_port="1"), "malformed"),
    (changed(more=1), "malformed"),
    (changed(producer="p" * 20_000), "malformed"),
    (lambda uuid, ec: {uuid: {"suite": "none"}}, "malformed"),
    (lambda uuid, ec: {uuid: 7}, "malformed"),
    (lambda uuid, ec: {uuid: {"peer_host": "127.0.0.1", "peer_port": 1}}, "unfenced"),
    (lambda uuid, ec: {uuid: {"suite_error": "non_finite"}}, "non_finite"),
    (lambda uuid, ec: {uuid: {"suite_error": ["odd"]}}, "malformed"),
    (lambda uuid, ec: {uuid: {"suite_pending": {"identifier": uuid}}}, "malformed"),
]

# What a producer says of an item, in place of the truth.
WRONG_ANSWERS: list[tuple[dict[str, Any], str]] = [
    ({"rows": 17}, "tampered"),  # the reference says 16
    ({"width": 64}, "wrong_shape"),
    ({"dtype": "bfloat16"}, "wrong_shape"),
    ({"dtype": "float64"}, "wrong_shape"),
    ({"size": 0, "runs": ()}, "truncated"),
    ({"size": 16 * 128 * 4 + 4}, "wrong_shape"),
    ({"memory": "FILE"}, "wrong_shape"),
    ({"runs": ((0, 1 << 40),), "size": 1 << 40}, "wrong_shape"),
    ({"base": 4096}, "read_failed"),
]
