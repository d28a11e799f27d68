"""The pool of ranks itself: values, failures, timeouts, deaths and reuse."""

from __future__ import annotations

import os
import time
import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from tests.harness import MAX_RANKS, RankError, run_ranks


@dataclass
class Offset:
    """An argument and a result of a class that only this test module defines."""

    amount: int


def _sum_of_ranks(groups, offset):
    total = torch.tensor([groups.rank + offset.amount])
    if groups.world_size > 1:
        dist.all_reduce(total)
    return groups.rank, groups.world_size, total, Offset(offset.amount), os.getpid()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_answers_in_order(world_size):
    results = run_ranks(world_size, _sum_of_ranks, Offset(10))
    expected = sum(range(world_size)) + 10 * world_size
    assert [result[0] for result in results] == list(range(world_size))
    for _, size, total, offset, _ in results:
        assert (size, total.item(), offset) == (world_size, expected, Offset(10))


def test_calls_reuse_the_processes():
    first = [result[-1] for result in run_ranks(2, _sum_of_ranks, Offset(0))]
    assert [result[-1] for result in run_ranks(2, _sum_of_ranks, Offset(1))] == first
    assert [result[-1] for result in run_ranks(4, _sum_of_ranks, Offset(1))][:2] == first
    assert os.getpid() not in first


def _leave_state_behind(groups):
    torch.set_num_threads(2)
    return os.environ.get("OMP_NUM_THREADS")


def _threads(groups):
    return torch.get_num_threads()


def test_every_call_starts_with_one_thread():
    assert run_ranks(2, _leave_state_behind) == ["1", "1"]
    assert run_ranks(2, _threads) == [1, 1]


def _fail_on(groups, failing, others):
    if groups.rank == failing:
        raise ValueError(f"wrong row 17 on rank {groups.rank}")
    if others == "wait":
        dist.all_reduce(torch.ones(3))


@pytest.mark.parametrize("others", ["return", "wait"])
def test_failing_rank_is_named_with_its_traceback(others):
    with pytest.raises(RankError) as caught:
        run_ranks(2, _fail_on, 1, others)
    text = str(caught.value)
    assert text.startswith("rank 1 failed in _fail_on:\n")
    assert "ValueError: wrong row 17 on rank 1" in text
    assert "test_harness.py" in text
    assert run_ranks(2, _threads) == [1, 1]


def _hang_on(groups, hanging):
    if groups.rank in hanging:
        time.sleep(60)


@pytest.mark.parametrize("hanging", [[1], [0, 1]], ids=str)
def test_timeout_names_the_silent_ranks_and_rebuilds_the_pool(hanging):
    with pytest.raises(RankError) as caught:
        run_ranks(2, _hang_on, hanging, timeout=0.5)
    assert str(caught.value) == f"rank(s) {hanging} did not answer within 0.5 s in _hang_on"
    assert run_ranks(2, _threads) == [1, 1]


def _die_on(groups, dying):
    if groups.rank == dying:
        os._exit(7)
    dist.all_reduce(torch.ones(3))


def test_dead_rank_is_named_and_the_pool_is_rebuilt():
    with pytest.raises(RankError, match=r"rank 1 died with exit code 7 in _die_on"):
        run_ranks(2, _die_on, 1)
    assert run_ranks(2, _threads) == [1, 1]


def _warn(groups):
    warnings.warn("careless", UserWarning, stacklevel=1)


def test_warnings_in_a_rank_are_errors():
    with pytest.raises(RankError, match="UserWarning: careless"):
        run_ranks(1, _warn)


def _unpicklable(groups):
    return lambda: None


def test_value_that_cannot_travel_is_an_error():
    with pytest.raises(RankError, match="rank 0 failed in _unpicklable"):
        run_ranks(1, _unpicklable)


def test_function_inside_a_function_is_refused():
    with pytest.raises(ValueError, match="must be a module-level function"):
        run_ranks(1, lambda groups: None)


@pytest.mark.parametrize("world_size", [0, MAX_RANKS + 1])
def test_world_size_outside_the_pool_is_refused(world_size):
    with pytest.raises(ValueError, match=rf"world_size {world_size} is not in 1\.\.4"):
        run_ranks(world_size, _threads)
