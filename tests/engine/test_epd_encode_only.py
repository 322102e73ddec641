"""Requests that only encode, on an instance that has the whole model."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from child import free_blocks, scheduler
from epd_engine import Ask, EpdEngine, Spec, engines, references, without_media

from vllm_suite.fleet.pictures_parts import Part, image_part, text_part
from vllm_suite.fleet.tiny_media import write

FAMILY = "qwen2_5_vl"
ROWS = 36  # of a picture of 168 pixels
BUDGET = 64  # rows: no two pictures in one step, and none beside another in the encoder cache
ENCODE_ONLY = {"suite_encode_only": True}
QUESTION = text_part("What is it?")
_numbers = itertools.count()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EpdEngine, EpdEngine]]:
    """An instance of role `any`, whose encoder has room for one picture at a time, and a consumer."""
    model = write(FAMILY, tmp_path_factory.mktemp("model") / FAMILY)
    with engines(Spec("a", model, "any"), Spec("pd", model, "pd")) as (a, pd):
        a.call(_watch)
        a.call(_narrow)
        yield a, pd


@pytest.fixture
def instance(pair: tuple[EpdEngine, EpdEngine]) -> Iterator[EpdEngine]:
    """The instance of role `any`; after the test nothing of any request may be left."""
    before = pair[0].call(free_blocks)
    pair[0].call(_steps)
    yield pair[0]
    assert pair[0].call(_left) == {"running": 0, "waiting": 0, "encoding": 0, "referenced": 0}
    assert pair[0].call(free_blocks) == before


def pictures(count: int, size: int = 168) -> list[Part]:
    """Pictures that no cache has seen."""
    return [image_part(size, size, n, uuid=f"s-{n}") for n in itertools.islice(_numbers, count)]


def test_a_consumer_finds_what_was_encoded_and_answers_the_same(pair: tuple[EpdEngine, EpdEngine]) -> None:
    a, pd = pair
    items = pictures(3)
    with a.encodes(3):
        ec = a.encode(items)
    assert list(ec) == [item["uuid"] for item in items]
    with pd.encodes(0):
        answer = pd.ask([*without_media(FAMILY, items, ec), QUESTION], ec=references(ec))
    assert answer.said() == a.ask([*items, QUESTION]).said()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_one_token_of_the_language_model_for_each_step_that_encodes(instance: EpdEngine, count: int) -> None:
    answer = instance.ask([text_part("Some words before them: "), *pictures(count)], ec=ENCODE_ONLY, max_tokens=1)
    assert (answer.tokens, answer.finish_reason) == ([], "stop")
    assert len(answer.ec or {}) == count
    steps = instance.call(_steps)
    assert sum(tokens for tokens, _ in steps) == count
    assert [item for _, items in steps for item in items] == list(range(count))


def test_small_items_share_a_step(instance: EpdEngine) -> None:
    instance.encode(pictures(3, size=112))  # 16 rows each
    assert instance.call(_steps) == [(1, [0, 1, 2])]


def test_an_item_that_the_next_tokens_lie_in_stays_cached_and_makes_room_as_vllm_does(instance: EpdEngine) -> None:
    """The first of ten pictures begins at the fourth token. With it kept there is no room for the second one, and so
    on: this is as dear as any other request, and as right."""
    items = pictures(10)
    with instance.encodes(10):
        ec = instance.encode(items)
    assert len(ec) == 10
    assert instance.call(_first_offset) < len(items)
    assert len(items) < sum(tokens for tokens, _ in instance.call(_steps)) < 10 * (ROWS + 10)


def test_requests_beside_it_answer_as_alone(instance: EpdEngine) -> None:
    others = [Ask([*pictures(1), text_part(f"Number {n}?")], max_tokens=12) for n in range(3)]
    alone = [instance.ask_many([ask])[0].said() for ask in others]
    encode = [Ask(pictures(4), ec=ENCODE_ONLY, max_tokens=1), Ask(pictures(2), ec=ENCODE_ONLY, max_tokens=1)]
    answers = instance.ask_many([others[0], encode[0], others[1], encode[1], others[2]])
    assert [answers[place].said() for place in (0, 2, 4)] == alone
    assert [len(answers[place].ec or {}) for place in (1, 3)] == [4, 2]
    assert [answers[place].tokens for place in (1, 3)] == [[], []]


def test_a_picture_twice_and_one_that_is_known_already(instance: EpdEngine) -> None:
    known, new = pictures(2, size=112)
    instance.ask([known, QUESTION])
    with instance.encodes(1):
        ec = instance.encode([new, known, new])
    assert set(ec) == {known["uuid"], new["uuid"]}
    assert all("suite" in item for item in ec.values())


@pytest.mark.parametrize("value", [1, "true", None, {}, [True], False])
def test_another_value_is_somebody_elses(instance: EpdEngine, value: Any) -> None:
    items = pictures(1)
    answer = instance.ask([*items, QUESTION], ec={"suite_encode_only": value})
    assert answer.said() == instance.ask([*items, QUESTION]).said()
    assert len(answer.tokens) == 8


def test_a_request_without_media_is_answered(instance: EpdEngine) -> None:
    assert instance.ask([QUESTION], ec=ENCODE_ONLY).said() == instance.ask([QUESTION]).said()


def test_a_preempted_request_starts_again(instance: EpdEngine) -> None:
    instance.call(_after_next_step, _preempt)
    ec = instance.encode(pictures(3))
    assert len(ec) == 3
    assert all("suite" in item for item in ec.values())
    assert sum(tokens for tokens, _ in instance.call(_steps)) == 4


def test_an_aborted_request_leaves_nothing(instance: EpdEngine) -> None:
    instance.call(_after_next_step, _abort)
    assert instance.ask_many([Ask(pictures(3), ec=ENCODE_ONLY, max_tokens=1)]) == []
    assert sum(tokens for tokens, _ in instance.call(_steps)) == 1


def test_one_step_ahead_as_under_async_scheduling(pair: tuple[EpdEngine, EpdEngine]) -> None:
    """The engine schedules a step before it has the result of the last one, as it does on GPUs. Requests that sample
    are left out: the CPU's model runner does not do this."""
    a = pair[0]
    a.call(_steps)
    a.call(_run_ahead, True)
    try:
        asks = [Ask(pictures(count), ec=ENCODE_ONLY, max_tokens=1) for count in (3, 1, 10)]
        answers = a.ask_many(asks)
    finally:
        a.call(_run_ahead, False)
    assert [len(answer.ec or {}) for answer in answers] == [3, 1, 10]
    assert all("suite" in item for answer in answers for item in (answer.ec or {}).values())
    assert a.call(_left)["encoding"] == 0


@pytest.fixture(scope="module")
def ahead(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EpdEngine]:
    model = write(FAMILY, tmp_path_factory.mktemp("model") / FAMILY)
    chosen = {"scheduler_cls": "vllm_suite.compat.encode_only.EncodeOnlyAsyncScheduler"}
    with engines(Spec("ahead", model, "any", llm=chosen)) as (engine,):
        engine.call(_watch)
        yield engine


def test_over_the_async_scheduler(ahead: EpdEngine) -> None:
    items = pictures(2)
    alone = ahead.ask([*items, QUESTION]).said()
    ahead.call(_steps)
    assert len(ahead.encode(pictures(3))) == 3
    assert sum(tokens for tokens, _ in ahead.call(_steps)) == 1
    answers = ahead.ask_many([Ask([*items, QUESTION]), Ask(pictures(2), ec=ENCODE_ONLY, max_tokens=1)])
    assert (answers[0].said(), len(answers[1].ec or {})) == (alone, 2)


# --- in the child ---

_seen: list[tuple[int, list[int]]] = []
_then: list[Callable[[Any], None]] = []
_offsets: list[int] = []  # of the first item of each request


def _watch(llm: Any) -> None:
    """Note the tokens and items of each scheduled step, and run what a test left in `_then` after one."""
    core = scheduler(llm)
    schedule, update, add = core.schedule, core.update_from_output, core.add_request

    def watched(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        if output.num_scheduled_tokens:
            items = [item for chosen in output.scheduled_encoder_inputs.values() for item in chosen]
            _seen.append((sum(output.num_scheduled_tokens.values()), items))
        return output

    def updated(*args: Any, **kwargs: Any) -> Any:
        outputs = update(*args, **kwargs)
        if _then and core._encoding:
            _then.pop()(llm)
        return outputs

    def added(request: Any) -> None:
        _offsets.extend(item.mm_position.offset for item in request.mm_features[:1])
        add(request)

    core.schedule, core.update_from_output, core.add_request = watched, updated, added


def _steps(_llm: Any) -> list[tuple[int, list[int]]]:
    steps = list(_seen)
    _seen.clear()
    return steps


def _after_next_step(_llm: Any, action: Callable[[Any], None]) -> None:
    _then.append(action)


def _preempt(llm: Any) -> None:
    scheduler(llm).reset_prefix_cache(reset_running_requests=True)


def _abort(llm: Any) -> None:
    llm.llm_engine.abort_request(list(scheduler(llm).requests), internal=True)


def _left(llm: Any) -> dict[str, int]:
    core = scheduler(llm)
    return {
        "running": len(core.running),
        "waiting": len(core.waiting),
        "encoding": len(core._encoding),
        "referenced": len(core.encoder_cache_manager.request_cached_ids),
    }


def _narrow(llm: Any) -> None:
    """vLLM's encoder cache always holds a picture of the largest size, which is 20 of those used here."""
    core = scheduler(llm)
    cache = core.encoder_cache_manager
    assert not cache.cached
    cache.cache_size = cache.num_free_slots = cache.num_freeable_slots = BUDGET
    core.max_num_encoder_input_tokens = BUDGET


def _first_offset(_llm: Any) -> int:
    return _offsets[-1]


def _run_ahead(llm: Any, on: bool) -> None:
    core = llm.llm_engine.engine_core.engine_core
    core.batch_queue = deque(maxlen=2) if on else None
    core.batch_queue_size = 2 if on else 1
    core.step_fn = core.step_with_batch_queue if on else core.step
