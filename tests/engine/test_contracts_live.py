"""The contract table on the imported vLLM: what decorators and metaclasses made of the source."""

from __future__ import annotations

import dataclasses

from vllm_suite.compat.contract_live import check_live
from vllm_suite.compat.contracts import Contract, rows_for
from vllm_suite.compat.versions import check_version, series


def test_the_imported_vllm_keeps_the_contract() -> None:
    assert check_live(rows_for(series(check_version()))) == []


def test_a_changed_signature_or_a_vanished_name_is_seen() -> None:
    rows = [row for row in rows_for(series(check_version())) if row.params and not row.more]
    for row in rows[:5]:
        changed = dataclasses.replace(row, params=(*row.params, "extra"))  # type: ignore[misc]
        assert "has parameters" in check_live([changed])[0]
    gone = Contract("vllm.envs:no_such_name", "attribute", "test")
    assert check_live([gone]) == ["vllm.envs:no_such_name: no such name"]
