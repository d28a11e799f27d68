"""The trial of depths: turns, what is counted, and one choice on all ranks."""

from __future__ import annotations

import pytest

from shardlab.comm import Groups
from shardlab.sharded.depth_trial import DepthChoice, DepthTrial
from tests.harness import run_ranks

_BATCHES = 50


class _Clock:
    """Seconds that batches took, added up."""

    def __init__(self) -> None:
        self.now = 7.0

    def __call__(self) -> float:
        return self.now


def _try(groups, plain, ahead, disturbed=frozenset()):
    """(choices, depth of every batch) where steps take so long; disturbed ones 100 s."""
    clock, choices, depths = _Clock(), [], []
    trial = DepthTrial(groups, None, choices.append, clock)
    for batch in range(_BATCHES + 5):
        depths.append(trial.depth)
        clock.now += 100.0 if batch in disturbed else (plain, ahead)[trial.depth]
        trial.trained()
    return choices, depths


@pytest.mark.parametrize(("plain", "ahead", "depth"), [
    (2.0, 3.0, 0), (3.0, 2.0, 1), (2.0, 2.0, 1), (1.99, 2.0, 1)])
def test_the_faster_depth_is_kept_and_ahead_where_none_is(plain, ahead, depth):
    choices, depths = _try(Groups(), plain, ahead)
    assert depths[:_BATCHES] == [1] * 20 + [0] * 10 + [1] * 10 + [0] * 10
    assert depths[_BATCHES:] == [depth] * 5
    (choice,) = choices
    assert choice.depth == depth
    assert choice.step_ms == pytest.approx((1000 * plain, 1000 * ahead))


def test_first_batches_and_those_after_a_change_do_not_count():
    changes = {*range(10), *range(10, 13), *range(20, 23), *range(30, 33), *range(40, 43)}
    (choice,), _ = _try(Groups(), 2.0, 3.0, frozenset(changes))
    assert choice.step_ms == pytest.approx((2000.0, 3000.0))


def test_a_depth_that_was_given_is_kept():
    def refuse(choice):
        raise AssertionError(choice)

    trial = DepthTrial(Groups(), 3, refuse)
    for _ in range(_BATCHES + 5):
        trial.trained()
        assert trial.depth == 3


def _disagree(groups):
    """Rank 0 is faster without, rank 1 ahead; the mean decides."""
    plain, ahead = [(1.0, 3.0), (2.0, 1.0)][groups.rank]
    (choice,), depths = _try(groups, plain, ahead)
    return choice.depth, choice.step_ms, depths[-1]


def test_all_ranks_take_the_same_depth():
    assert run_ranks(2, _disagree) == [(0, (1500.0, 2000.0), 0)] * 2


def test_the_choice_is_told_in_words():
    assert DepthChoice(0, (131.26, 142.0)).text == (
        "exchange.depth 0: a step took 142.0 ms with the next batch exchanged meanwhile, "
        "131.3 ms without")
