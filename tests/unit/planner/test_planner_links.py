"""Shared links: every transfer's end as by going through time piece by piece, and at a cost that does not add up."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_suite.planner.simulator.clock import Clock
from vllm_suite.planner.simulator.links import Cost, Links

# Start, source, target, seconds before the first byte and of bytes.
Transfer = tuple[float, int, int, float, float]


def by_hand(transfers: list[Transfer]) -> list[float]:
    """Ends of transfers, with all rates worked out anew whenever one begins or ends."""
    now, ends = 0.0, [math.nan] * len(transfers)
    left, waiting = dict[int, float](), dict[int, float]()
    coming = sorted(range(len(transfers)), key=lambda index: transfers[index][0])
    while coming or left:
        at: dict[int, int] = {}
        for index in left:
            for end in transfers[index][1:3]:
                at[end] = at.get(end, 0) + 1
        share = {index: 1 / max(at[transfers[index][1]], at[transfers[index][2]]) for index in left}
        following = transfers[coming[0]][0] if coming else math.inf
        for index in left:
            begin = waiting[index]
            following = min(following, begin if begin > now else now + left[index] / share[index])
        for index in left:
            left[index] -= max(0.0, following - max(now, waiting[index])) * share[index]
        now = following
        for index in [index for index in left if left[index] <= 1e-12 and waiting[index] <= now]:
            ends[index] = now
            del left[index]
        while coming and transfers[coming[0]][0] <= now:
            index = coming.pop(0)
            left[index], waiting[index] = transfers[index][4], transfers[index][0] + transfers[index][3]
    return ends


def simulated(transfers: list[Transfer]) -> tuple[list[float], Clock]:
    clock, ends = Clock(), [math.nan] * len(transfers)
    links = Links(clock)

    def begin(now: float, index: int) -> None:
        _, source, target, setup, seconds = transfers[index]

        def done(then: float) -> None:
            assert math.isnan(ends[index])
            ends[index] = then

        links.start(source, target, Cost(setup, seconds, 0.0), now, done)

    for index, each in enumerate(transfers):
        clock.post(each[0], 0, 0, index, begin)
    clock.run()
    return ends, clock


seconds = st.integers(0, 40).map(lambda value: value / 16)
transfer = st.tuples(
    seconds,
    st.integers(0, 3),
    st.integers(4, 6),
    st.sampled_from([0.0, 0.125, 0.7, 2.0]),
    st.integers(1, 40).map(lambda value: value / 16),
)


@given(st.lists(transfer, min_size=1, max_size=24))
@settings(max_examples=300, deadline=None)
def test_every_transfer_ends_as_worked_out_piece_by_piece(transfers: list[Transfer]) -> None:
    ends, _ = simulated(transfers)
    assert ends == pytest.approx(by_hand(transfers), abs=1e-9)


def test_a_transfer_is_held_back_by_the_end_that_has_more_of_them() -> None:
    # At 0 both ends of the first have one; from 1 on its target has three, from 2 on its source four.
    transfers = [
        (0.0, 0, 9, 0.0, 4.0),
        (1.0, 1, 9, 0.0, 8.0),
        (1.0, 2, 9, 0.0, 8.0),
        (2.0, 0, 7, 0.0, 0.25),
        (2.0, 0, 6, 0.0, 0.25),
        (2.0, 0, 5, 0.0, 0.25),
    ]
    # 1 s alone, 1/3 s until 2, 1/4 s until 3 when the three others end, the rest at a third.
    assert simulated(transfers)[0][0] == pytest.approx(3.0 + 3 * (4.0 - 1.0 - 1 / 3 - 1 / 4))


def test_many_transfers_at_one_instance_cost_as_much_each_as_few(monkeypatch: pytest.MonkeyPatch) -> None:
    posts, post = [0], Clock.post

    def counted(self: Clock, *args: object) -> None:
        posts[0] += 1
        post(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Clock, "post", counted)

    def each(count: int) -> float:
        posts[0] = 0
        # Pulls of several instances, of which half begin while the others are under way.
        transfers = [(index % 2 * 3.0, index % 5, 9, 0.001 * index, 1.0 + index / count) for index in range(count)]
        ends, _ = simulated(transfers)
        assert max(ends) == pytest.approx(sum(each[4] for each in transfers), rel=0.01)
        return posts[0] / count

    assert each(400) < 5
    assert each(400) < 1.2 * each(50)
