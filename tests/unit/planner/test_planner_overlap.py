"""Prefill ahead of its items: schedules by hand, and what is conserved."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from fleets import plan, serve, setting
from simulated import ExactSource

from vllm_suite.planner.models import Parallel, load
from vllm_suite.planner.simulator.engine import Engine
from vllm_suite.planner.simulator.instances import Leg
from vllm_suite.planner.simulator.jobs import SimulationError
from vllm_suite.planner.simulator.setting import Serving, Setting
from vllm_suite.planner.simulator.step_sources import OwnEncoder
from vllm_suite.planner.sources.steps import DecodeLine, Steps
from vllm_suite.planner.workload import Item, Request, positions


def encoding(overlap: str, seconds: float = 20.0, **more: object) -> Setting:
    """An item takes so many seconds for 64 tokens; a step 1 s and 1/8 s a token."""
    return replace(
        setting(serving=Serving(min_prompt_tokens=0, overlap=overlap), **more),  # type: ignore[arg-type]
        encode_seconds=lambda pool, item: seconds * item.tokens / 64,
    )


def picture(at: int | None = None, tokens: int = 64) -> Item:
    return Item("picture", tokens, at=at)


def test_items_stand_one_after_another_or_where_they_say() -> None:
    assert positions([picture(), picture(), picture(200), picture()]) == [0, 64, 200, 264]
    with pytest.raises(ValueError, match=r"at token 40 .* ends at 64"):
        positions([picture(), picture(40)])


EPD = plan(encode={"count": 1}, prefill={}, decode={})
EPD_FREE = plan(encode={"count": 1}, prefill={"kv_blocks": None}, decode={"kv_blocks": None})
EPS = 0.01


def test_a_prompt_is_computed_up_to_the_item_that_is_under_way() -> None:
    # 80 tokens, a picture of 64 that is there at 20 s, 80 tokens, one that is there at 40 s, 16 tokens.
    request = Request(0, 0.0, 80 + 64 + 80 + 64 + 16, 2, items=(picture(80), picture(80 + 64 + 80)))
    (ahead,), run = serve(EPD, encoding("auto"), [request])
    # 80 tokens until 11 s; 144 from 20 s on, until 39 s; 80 from 40 s on, until 51 s.
    assert ahead.prefill_start == 0.0
    assert (ahead.encode_start, ahead.encoded) == (0.0, 40.0)
    assert 40.0 < ahead.fetched < 40.0 + EPS
    assert ahead.prefilled == pytest.approx(51.0, abs=EPS)
    assert run.pools["prefill"].steps == (3,)
    assert run.pools["prefill"].busy[0] == pytest.approx(3 + (80 + 144 + 80) / 8)
    assert run.pools["prefill"].transfers == 2
    # Without, all 304 tokens from 40 s on.
    (after,), _ = serve(EPD, encoding("never"), [request])
    assert after.prefilled == pytest.approx(40.0 + 1 + 38, abs=EPS)


def test_auto_waits_for_a_single_item() -> None:
    request = Request(0, 0.0, 160, 2, items=(picture(80),))
    for overlap, start in (("auto", 20.0), ("always", 0.0), ("never", 20.0)):
        (one,), _ = serve(EPD, encoding(overlap), [request])
        assert one.prefill_start == pytest.approx(start, abs=EPS)


def test_a_prompt_that_waits_lets_others_pass() -> None:
    # The first starts with its pictures, so it cannot be admitted until one is there, at 20 s.
    requests = [Request(0, 0.0, 160, 2, items=(picture(), picture())), Request(1, 0.0, 80, 2)]
    (first, text), _ = serve(EPD, encoding("auto"), requests)
    assert (text.prefill_start, text.prefilled) == (0.0, 11.0)
    # 64 tokens until 29 s, the rest from 40 s on.
    assert first.prefill_start == pytest.approx(20.0, abs=EPS)
    assert first.prefilled == pytest.approx(40.0 + 1 + 12, abs=EPS)


def test_one_token_before_an_item_is_not_computed() -> None:
    # In steps of 64 tokens: the first picture from 20 s on, then the token after it waits for the second one.
    small = plan(encode={}, prefill={"max_num_batched_tokens": 64, "max_num_seqs": 8}, decode={})
    (one,), _ = serve(small, encoding("auto"), [Request(0, 0.0, 200, 2, items=(picture(), picture(65)))])
    assert one.prefilled == pytest.approx(40.0 + 3 + (200 - 64) / 8, abs=EPS)
    for at, start in ((1, 20.0), (2, 0.0)):
        (one,), _ = serve(EPD, encoding("always"), [Request(0, 0.0, 160, 2, items=(picture(at),))])
        assert one.prefill_start == pytest.approx(start, abs=EPS)


def test_a_prompt_that_pauses_goes_on_before_those_that_came_later() -> None:
    # Pauses after 80 tokens until 20 s; a long text begins in between, in steps of 128 tokens.
    epd = plan(encode={}, prefill={"max_num_batched_tokens": 128, "max_num_seqs": 8}, decode={})
    requests = [Request(0, 0.0, 144, 2, items=(picture(80),)), Request(1, 5.0, 512, 2)]
    (first, text), _ = serve(epd, encoding("always"), requests)
    # 11 s; text 17 s until 28; then 64 of the first and 64 of the text until 45.
    assert text.prefill_start == 11.0
    assert first.prefilled == pytest.approx(45.0, abs=EPS)
    assert text.prefilled == pytest.approx(45.0 + 17 + 17 + 9, abs=EPS)


def test_a_paused_prompt_gives_way_where_blocks_run_out() -> None:
    epd = plan(encode={}, prefill={"kv_blocks": 20}, decode={})
    first, slow = Item("fast", 16, at=16), Item("slow", 16, at=96)
    seconds = {"fast": 5.0, "slow": 95.0}
    requests = [Request(0, 0.0, 256, 2, items=(first,)), Request(1, 0.0, 112, 2, items=(slow,))]
    of = replace(encoding("always"), encode_seconds=lambda pool, item: seconds[item.kind])
    (a, b), run = serve(epd, of, requests)
    # 16 tokens of the first and 96 of the second until 15 s; then the first needs 15 blocks and 13 are free.
    assert a.prefilled == pytest.approx(46.0)
    assert (a.preemptions, b.preemptions, run.pools["prefill"].preemptions) == (0, 1, 1)
    # The second begins anew when the first has been pulled, pauses again at 59 s, and has its picture at 100 s.
    assert run.pools["prefill"].steps == (4,)
    assert b.prefilled == pytest.approx(100.0 + 3, abs=EPS)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_lost(seed: int, ahead: bool) -> None:
    draw, now, requests = random.Random(seed), 0.0, list[Request]()
    for number in range(60):
        now += draw.expovariate(0.05)
        items, at = list[Item](), 0
        for _ in range(draw.randint(0, 4)):
            at += draw.randint(0, 60)
            items.append(Item("picture", 32, content=draw.choice([None, draw.randint(0, 5)]), at=at))
            at += 32
        requests.append(Request(number, now, at + draw.randint(1, 60), draw.randint(1, 5), items=tuple(items)))
    epd = plan(encode={"count": 2}, prefill={"count": 2, "kv_blocks": 40, "max_num_batched_tokens": 128,
                                             "max_num_seqs": 8}, decode={})  # fmt: skip
    prefix = bool(seed % 2)
    served, run = serve(epd, encoding("auto", async_scheduling=ahead, prefix_caching=prefix), requests)
    assert sorted(each.number for each in served) == list(range(60))
    for each in served:
        items = requests[each.number].items
        if items:
            assert each.encoded <= each.fetched <= each.prefilled
        assert each.prefill_start < each.prefilled <= each.first_token
    assert run.pools["prefill"].preemptions == sum(each.preemptions for each in served)


def test_an_instance_that_encodes_itself_does_so_where_an_item_stands() -> None:
    source = OwnEncoder(ExactSource(), lambda item: 1.0, 1000)
    items = (picture(100), picture(300))
    job = Leg(0, 0.0, 400, 2, items=items)
    assert source.chunk(job, items, 100) == 0.0
    assert source.chunk(job, items, 101) == 1.0
    assert source.chunk(job, items, 301) == 2.0


def test_with_pipeline_stages_prefill_waits_for_all_items() -> None:
    source = ExactSource(1.0, 0.125)
    source.stages = 2
    staged = plan(encode={}, prefill={"parallel": Parallel(pp=2)}, decode={"parallel": Parallel(pp=2)})
    of = replace(encoding("always"), source=lambda pool: source)
    (one,), _ = serve(staged, of, [Request(0, 0.0, 160, 2, items=(picture(80),))])
    assert one.prefill_start == pytest.approx(20.0, abs=EPS)


def test_ranks_go_on_together_where_an_item_arrives() -> None:
    # Each rank has a prompt that pauses after 80 tokens, at 11 s, and goes on at 20 and 40 s.
    ranks = plan(encode={}, prefill={"parallel": Parallel(dp=2), "max_num_seqs": 1}, decode={})
    requests = [Request(n, 0.0, 160, 2, items=(picture(80),)) for n in range(2)]
    served, _ = serve(ranks, encoding("always"), requests)
    # 80 tokens take 11 s from there on.
    assert sorted(one.prefill_start for one in served) == [0.0, 0.0]
    assert sorted(one.prefilled for one in served) == [pytest.approx(31.0, abs=EPS), pytest.approx(51.0, abs=EPS)]


def test_items_that_do_not_fit_their_prompt_are_refused() -> None:
    for items, message in (
        ((picture(100),), "request 3: its items go up to token 164 of a prompt of 160"),
        ((picture(50), picture(60)), "request 3: an item stands at token 60"),
    ):
        with pytest.raises(SimulationError, match=message):
            serve(EPD, encoding("always"), [Request(3, 0.0, 160, 2, items=items)])


def test_prefill_that_runs_ahead_holds_the_encoder() -> None:
    model, quant = load("Qwen/Qwen2.5-VL-7B-Instruct")
    blocks = []
    for overlap in ("auto", "never"):
        of = replace(encoding(overlap), model=model, quant=quant)
        blocks.append([of.limits(pool, encoder=of.encodes(EPD_FREE, pool)).blocks for pool in EPD_FREE.pools[1:]])
    (ahead, decode), (after, same) = blocks
    assert ahead < after == decode == same


class Computed:
    """An observer that counts tokens of prompts by the number of the engine."""

    def __init__(self) -> None:
        self.tokens = dict[int, float]()

    def __call__(
        self, engine: Engine, start: float, end: float, count: int, steps: Steps, line: DecodeLine | None
    ) -> None:
        self.tokens[engine.number] = self.tokens.get(engine.number, 0) + steps.prefill_tokens


def test_first_tokens_come_earlier_and_the_tokens_are_the_same() -> None:
    draw, now, requests = random.Random(3), 0.0, list[Request]()
    for number in range(40):
        now += draw.expovariate(1 / 60)
        # Text, picture, text, picture, …
        items = tuple(picture(40 + 104 * n) for n in range(draw.randint(2, 4)))
        requests.append(Request(number, now, 40 + 104 * len(items), 3, items=items))
    ttft, tokens = list[float](), list[float]()
    for overlap in ("never", "auto"):
        seen = Computed()
        epd = plan(encode={"count": 2}, prefill={}, decode={})
        served, _ = serve(epd, encoding(overlap), requests, observer=seen)
        assert [one.output for one in served] == [3] * 40
        ttft.append(sum(one.ttft for one in served) / 40)
        tokens.append(seen.tokens[2])
    assert tokens[0] == tokens[1] == sum(request.prompt for request in requests)
    assert ttft[1] < 0.9 * ttft[0]


def test_the_order_in_which_they_end_by_hand() -> None:
    # Two encoders; items of 16, 48 and 64 tokens take 5, 15 and 20 s. Steps of at most 128 tokens.
    epd = plan(encode={"count": 2}, prefill={"max_num_batched_tokens": 128, "max_num_seqs": 8}, decode={})
    requests = [
        Request(0, 0.0, 24 + 64 + 8 + 64 + 8, 2, items=(picture(24), picture(96))),
        Request(1, 1.0, 112, 2),
        Request(2, 2.0, 16 + 16 + 16 + 48, 2, items=(Item("a", 16), Item("b", 48, at=48))),
    ]
    serving = Serving(min_prompt_tokens=0, encode_policy="least_encode_tokens")
    (both, text, third), _ = serve(epd, replace(encoding("auto"), serving=serving), requests)
    # Both pictures of the first are there at 20 s; the third's are begun with then, the longer one first: it is there
    # at 35 s, the other at 25 s.
    assert (both.encoded, third.encoded) == (20.0, 35.0)
    # 24 tokens until 4 s; 112 of the text until 19 s; from 20 s on 128 tokens of the first, until 37 s; then 16 of the
    # first and, as both of its pictures are there, 96 of the third, until 52 s.
    assert (both.prefill_start, text.prefill_start, text.prefilled) == (0.0, 4.0, 19.0)
    assert both.prefilled == third.prefilled == pytest.approx(37.0 + 1 + (16 + 96) / 8, abs=EPS)
    # The third has fewer blocks, so its pull ends first; decode takes it up in the step before that of the first.
    assert text.last_token < third.last_token < both.last_token
    # Without, the text goes first, and nobody else has computed anything when it ends.
    (both, text, third), _ = serve(epd, replace(encoding("never"), serving=replace(serving, overlap="never")), requests)
    assert (text.prefill_start, text.prefilled) == (1.0, 16.0)
    # 128 of the first from 20 s on; of its last 40 tokens from 37 s on, with 88 of the third; 8 of that from 54 s on.
    assert both.prefilled == pytest.approx(54.0, abs=EPS)
    assert third.prefilled == pytest.approx(54.0 + 1 + 1, abs=EPS)
