"""docs/epd.md says what the code says."""

from __future__ import annotations

from pathlib import Path

from vllm_epd.config import EpdConfig
from vllm_epd.memory_cli import sizes
from vllm_epd.memory_model import Gpu
from vllm_epd.memory_paper import RESOLUTIONS, TABLE_2, cells, models
from vllm_suite.handoff import Refusal

PAGE = (Path(__file__).parents[3] / "docs" / "epd.md").read_text()
# Reasons of KV hand-over that an item cannot have: pins are shared, and nothing is abandoned with its item.
KV_ONLY = {Refusal.REUSED, Refusal.LEASE_LOST, Refusal.ABANDONED}


def settings_table() -> str:
    """The connector's settings as Markdown rows."""
    rows = []
    for name, field in EpdConfig.model_fields.items():
        default = "" if field.default is None else f"`{str(field.default).lower()}`"
        rows.append(f"| `{name}` | {default} | {field.description} |")
    return "\n".join(rows)


def test_every_setting_is_on_the_page() -> None:
    written = PAGE.partition("<!-- settings -->\n")[2].partition("<!-- end -->")[0]
    assert written.strip().splitlines()[2:] == settings_table().splitlines(), settings_table()


def test_every_refusal_of_an_item_is_on_the_page() -> None:
    missing = [reason.value for reason in Refusal if reason not in KV_ONLY and f"`{reason.value}`" not in PAGE]
    assert not missing


def test_the_memory_tables_are_the_computed_ones() -> None:
    for name, model in models().items():
        instances = sizes(model, Gpu(), RESOLUTIONS)["instances"]
        weights = [f"{instances[kind]['weight_bytes'] / 1e9:.2f} GB" for kind in ("monolithic", "encode", "prefill")]
        saved = [f"({100 * instances[kind]['weights_saved']:.1f} % less)" for kind in ("encode", "prefill")]
        kv = f"{instances['prefill']['kv_bytes_per_token']:,} B"
        assert f"| {name} | {weights[0]} | {weights[1]} {saved[0]} | {weights[2]} {saved[1]} | {kv} |" in PAGE
    compared = list(cells())
    for name in TABLE_2:
        for at in ("313x234", "787x444", "4032x3024"):
            one, two = (c for c in compared if (c.table, c.model, c.at) == ("2", name, at))
            line = next(line for line in PAGE.splitlines() if line.startswith(f"| {name}, ") and at in line)
            assert line.endswith(f"| {one.paper}, {two.paper} | {one.ours}, {two.ours} |")
    near = sum(cell.within(0.1) for cell in compared)
    equal = sum(cell.within(0) for cell in compared)
    assert f"Of {len(compared)} figures {equal} come out equal and {near} within 10 %" in PAGE
