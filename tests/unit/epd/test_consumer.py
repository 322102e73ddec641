"""The consuming side's decisions, without engine and network: what is admitted, allocated, fetched and failed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import msgspec
import torch

from vllm_epd.config import EpdConfig
from vllm_epd.consumer import Consumer
from vllm_epd.messages import Drop, Fetch, Fetched, packets_of, worker_decoder
from vllm_epd.sources import OwnView
from vllm_epd.stats import SuiteECStats
from vllm_suite.encoded import Pending, Producer, Where, slice_identifier

PRODUCER = Producer("e", "epoch", "model", "layout", "10.0.0.1", 5600)


class Bench:
    """A consumer whose link and manager are lists."""

    def __init__(self, on_failure: str = "encode", lookahead: int = 0) -> None:
        self.sent: list[Any] = []
        self.cached: set[str] = set()
        self.stats = SuiteECStats()
        view = OwnView.__new__(OwnView)
        view.model, view.layout, view.key = "model", "layout", None
        model = SimpleNamespace(hf_config=SimpleNamespace(), get_inputs_embeds_size=lambda: 128)
        config: Any = SimpleNamespace(
            ec_transfer_config=None,
            model_config=model,
            num_prefill_lookahead_tokens=lookahead,
            scheduler_config=SimpleNamespace(enable_chunked_prefill=True),
            cache_config=SimpleNamespace(mamba_cache_mode="none"),
        )
        link: Any = SimpleNamespace(ranks=frozenset({0}), send=lambda *m: self.sent.extend(m), broken=False)
        settings = EpdConfig(on_failure=on_failure)  # type: ignore[arg-type]
        self.consumer = Consumer(
            config, settings, link, view, self.stats, lambda _: {"image_grid_thw"}, lambda _: False
        )
        self.consumer.manager = SimpleNamespace(holds=self.cached.__contains__)

    def fetches(self) -> list[Fetch]:
        return [message for message in self.sent if isinstance(message, Fetch)]

    def arrive(self, refusal: str = "") -> None:
        self.consumer.fetched(0, Fetched(self.fetches()[-1].ticket, refusal, 100, 0.1, "e"))

    def counted(self, series: str) -> dict[str, float]:
        counts: dict[str, float] = self.stats.data["counts"].get(series, {})
        return counts


def item(identifier: str, offset: int, pixels: bool) -> Any:
    data = {"image_grid_thw": SimpleNamespace(data=torch.tensor([1, 8, 8]))}
    if pixels:
        data["pixel_values"] = SimpleNamespace(data=torch.zeros(1))
    place = SimpleNamespace(offset=offset, length=16)
    return SimpleNamespace(identifier=identifier, modality="image", data=data, mm_position=place)


def asking(*items: Any, refs: bool = True, name: str = "r") -> Any:
    names = [feature.identifier for feature in items] if refs else []
    params = {name: {"suite": PRODUCER.reference(name, "item-1", 16, 30.0, None).to_json()} for name in names}
    return SimpleNamespace(
        request_id=name, mm_features=items, ec_transfer_params=params, get_num_encoder_embeds=lambda _: 16
    )


def test_a_request_runs_up_to_the_item_that_is_under_way() -> None:
    for lookahead, least in ((0, 2), (1, 4)):
        bench = Bench(lookahead=lookahead)
        assert not bench.consumer.admit(asking(item("i", least - 1, False), name="held"), 0)
        assert bench.consumer.admit(asking(item("i", least, False), name="runs"), 0)
        bench.consumer.end_of_schedule()
        assert bench.consumer.held == 1
        assert len(bench.fetches()) == 1


@pytest.mark.parametrize("pixels", [False, True])
def test_what_is_under_way_is_not_allocated_and_what_is_there_is_loaded(pixels: bool) -> None:
    """Nor encoded here meanwhile, where the request has the pixels."""
    bench, request = Bench(), asking(item("i", 10, pixels))
    assert bench.consumer.admit(request, 0)
    assert not bench.consumer.may_allocate(request, 0)
    bench.arrive()
    assert bench.consumer.admit(request, 10)
    assert bench.consumer.may_allocate(request, 0)
    bench.consumer.allocated(request, 0, False)
    assert [load.identifier for load in bench.consumer.take_loads()] == ["i"]
    assert bench.counted("loads") == {"": 1}


def test_an_item_evicted_between_admission_and_allocation_is_never_encoded_without_pixels() -> None:
    """vLLM's cache may lose it to an earlier request of the same step; the runner would end the engine."""
    bench = Bench()
    for pixels in (False, True):
        request = asking(item("i", 0, pixels), refs=False, name=f"r{pixels}")
        bench.cached.add("i")
        assert bench.consumer.admit(request, 0)
        bench.cached.clear()
        assert bench.consumer.may_allocate(request, 0) is pixels


@pytest.mark.parametrize(("on_failure", "pixels", "ends"), [
    ("encode", True, "encoded"), ("encode", False, "failed"), ("fail", True, "failed"), ("fail", False, "failed"),
])  # fmt: skip
def test_a_refused_item(on_failure: str, pixels: bool, ends: str) -> None:
    bench, request = Bench(on_failure), asking(item("i", 0, pixels))
    assert not bench.consumer.admit(request, 0)
    bench.arrive("expired")
    assert bench.consumer.admit(request, 0) is (ends == "encoded")
    assert bench.consumer.may_allocate(request, 0) is (ends == "encoded")
    assert bench.counted("refused") == {"expired": 1}
    if ends == "encoded":
        bench.consumer.allocated(request, 0, False)
        assert bench.counted("local_encodes") == {"expired": 1}
        assert not bench.consumer.take_unavailable()
    else:
        assert bench.counted("failed_items") == {"expired": 1}
        assert bench.consumer.take_unavailable() == {"r"}
        assert not bench.consumer.take_unavailable()
    assert len(bench.fetches()) == 1


def test_a_request_that_ends_stops_its_fetches() -> None:
    bench, request = Bench(), asking(item("i", 0, False), item("j", 20, False))
    bench.consumer.admit(request, 0)
    bench.consumer.leave("r")
    (drop,) = [message for message in bench.sent if isinstance(message, Drop)]
    assert set(drop.tickets) == {fetch.ticket for fetch in bench.fetches()}
    assert not bench.consumer.fetching


def test_items_behind_what_is_computed_are_not_asked_for() -> None:
    bench, request = Bench(), asking(item("i", 0, False), item("j", 20, False))
    assert not bench.consumer.admit(request, 19)
    assert [fetch.identifier for fetch in bench.fetches()] == ["j"]
    assert bench.consumer.admit(asking(item("k", 0, False), name="done"), 16)
    assert len(bench.fetches()) == 1


def test_a_lost_item_fails_who_was_given_it() -> None:
    bench, request = Bench(), asking(item("i", 0, False))
    bench.consumer.admit(request, 0)
    bench.arrive()
    bench.consumer.allocated(request, 0, False)
    bench.consumer.lost("i")
    assert bench.consumer.take_unavailable() == {"r"}
    assert bench.consumer.spoiled == {"i"}


def test_a_wider_output_for_models_with_levels() -> None:
    bench = Bench()
    bench.consumer._vllm_config.model_config.hf_config.vision_config = SimpleNamespace(
        deepstack_visual_indexes=[1, 2, 3]
    )
    bench.consumer.admit(asking(item("i", 0, False)), 0)
    assert bench.fetches()[0].width == 512


def in_slices(*rows: int, pending: bool = False, pixels: bool = True) -> Any:
    request = asking(item("i", 0, pixels), refs=False)
    sources: list[Any] = []
    for index, number in enumerate(rows):
        name = slice_identifier("i", index, len(rows))
        if pending and index == 0:
            place = Where("e", "epoch", "10.0.0.1", 5600)
            word = Pending(identifier=name, candidates=(place,), wait_s=7.0)
            sources.append({"suite_pending": msgspec.to_builtins(word)})
        else:
            sources.append({"suite": PRODUCER.reference(name, "item-1", number, 30.0, None).to_json()})
    request.ec_transfer_params = {"i": {"suite_slices": sources}}
    return request


def test_an_item_in_slices_is_one_fetch() -> None:
    bench, request = Bench(), in_slices(9, 7)
    assert not bench.consumer.admit(request, 0)
    (fetch,) = bench.fetches()
    assert (fetch.ref, fetch.pending, fetch.rows, fetch.wait_s) == (None, None, 16, 0.0)
    assert [one.identifier for one in fetch.slices] == [slice_identifier("i", index, 2) for index in range(2)]
    (packet,) = packets_of([fetch])
    assert worker_decoder.decode(packet) == [fetch]
    bench.consumer.fetched(0, Fetched(fetch.ticket, "", 160, 0.1, "a", {"a": 90, "b": 70}))
    assert bench.consumer.admit(request, 0)
    assert bench.counted("fetch_bytes") == {"a": 90, "b": 70}
    assert bench.counted("joined_items") == {"": 1}
    assert bench.counted("fetches") == {"ok": 1}


def test_slices_under_way_are_waited_for_as_long_as_the_slowest() -> None:
    bench = Bench()
    assert not bench.consumer.admit(in_slices(9, 7, pending=True), 0)
    (fetch,) = bench.fetches()
    assert fetch.wait_s == 7.0
    assert [one.pending is None for one in fetch.slices] == [False, True]


@pytest.mark.parametrize("pixels", [True, False])
def test_slices_that_are_refused_before_or_after_they_are_asked_for(pixels: bool) -> None:
    bench = Bench()
    early, late = in_slices(9, 6, pixels=pixels), in_slices(9, 7, pixels=pixels)
    late.request_id = "late"
    assert bench.consumer.admit(early, 0) is pixels
    assert bench.counted("refused") == {"truncated": 1}
    assert not bench.consumer.admit(late, 0)
    bench.arrive("peer_dead")
    assert bench.consumer.admit(late, 0) is pixels
    assert bench.counted("refused") == {"truncated": 1, "peer_dead": 1}
    assert bench.consumer.take_unavailable() == (set() if pixels else {"r", "late"})
    assert len(bench.fetches()) == 1
