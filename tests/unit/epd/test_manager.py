"""vLLM's encoder-cache manager with the connector's word: what may be allocated, and what an entry stands for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm_epd.config import ConfigError
from vllm_epd.manager import SuiteEncoderCacheManager


class Half:
    """The questions that the manager asks."""

    def __init__(self) -> None:
        self.manager: Any = None
        self.blocked: set[str] = set()
        self.gone: set[str] = set()
        self.forgot = False

    def use_manager(self, manager: Any) -> None:
        self.manager = manager

    def may_allocate(self, request: Any, index: int) -> bool:
        return request.mm_features[index].identifier not in self.blocked

    def forget_all(self) -> None:
        self.forgot = True

    def keeps(self, identifier: str) -> bool:
        return identifier not in self.gone

    def forgotten(self, identifier: str) -> None:
        self.gone.discard(identifier)


def asking(*identifiers: str, rows: int = 4, name: str = "r") -> Any:
    features = [SimpleNamespace(identifier=identifier) for identifier in identifiers]
    return SimpleNamespace(request_id=name, mm_features=features, get_num_encoder_embeds=lambda index: rows)


def make(size: int = 8) -> tuple[SuiteEncoderCacheManager, Half]:
    half = Half()
    manager = SuiteEncoderCacheManager(size, half)  # type: ignore[arg-type]
    assert half.manager is manager
    return manager, half


def use(manager: SuiteEncoderCacheManager, request: Any, index: int = 0) -> None:
    assert not manager.check_and_update_cache(request, index)
    assert manager.can_allocate(request, index, 100, 0)
    manager.allocate(request, index)


def test_what_is_under_way_is_not_allocated() -> None:
    manager, half = make()
    half.blocked = {"a"}
    request = asking("a", "b")
    assert not manager.can_allocate(request, 0, 100, 0)
    assert manager.can_allocate(request, 1, 100, 0)
    half.blocked = set()
    use(manager, request)
    assert manager.holds("a")
    assert not manager.holds("b")


def test_upstreams_own_limits_stay() -> None:
    manager, _ = make(size=8)
    assert not manager.can_allocate(asking("a"), 0, 3, 0)
    assert not manager.can_allocate(asking("a", rows=9), 0, 100, 0)
    use(manager, asking("a", rows=8))
    assert not manager.can_allocate(asking("b"), 0, 100, 0)


def test_nothing_is_evicted_for_an_item_that_is_under_way() -> None:
    manager, half = make(size=4)
    first = asking("a")
    use(manager, first)
    manager.free(first)
    half.blocked = {"b"}
    assert not manager.can_allocate(asking("b", name="s"), 0, 100, 0)
    assert manager.holds("a")
    assert manager.get_freed_mm_hashes() == []


def test_an_entry_whose_item_the_pool_has_evicted_is_forgotten() -> None:
    manager, half = make(size=8)
    first = asking("a")
    use(manager, first)
    half.gone = {"a"}
    again = asking("a", name="again")
    assert manager.check_and_update_cache(again, 0)  # somebody uses it: the step that brought it is under way
    manager.free(again)
    manager.free(first)
    free = manager.num_free_slots, manager.num_freeable_slots
    third = asking("a", name="third")
    assert not manager.holds("a")
    assert not manager.check_and_update_cache(third, 0)
    assert not half.gone
    assert not manager.holds("a")
    assert (manager.num_free_slots, manager.num_freeable_slots) == (free[0] + 4, free[1])
    assert manager.get_freed_mm_hashes() == ["a"]
    use(manager, third)
    assert manager.num_free_slots == 4


def test_it_needs_the_connector() -> None:
    config = SimpleNamespace(ec_transfer_config=None)
    with pytest.raises(ConfigError, match="works with SuiteECConnector only"):
        SuiteEncoderCacheManager.create_manager(cache_size=8, vllm_config=config)


def test_new_weights_make_everything_stale() -> None:
    manager, half = make()
    use(manager, asking("a"))
    manager.reset()
    assert half.forgot
    assert not manager.holds("a")
    assert manager.num_free_slots == 8
