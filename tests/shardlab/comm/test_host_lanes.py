"""Lanes inside a host and across hosts, and sums over both."""

from __future__ import annotations

import pytest
import torch

from shardlab import comm
from shardlab.comm import Groups, two_stages_refusal
from shardlab.errors import LaunchError
from tests.harness import run_ranks
from tests.sharded_runs import in_stages


@pytest.mark.parametrize(("of_rank", "refusal"), [
    ((0, 0, 1, 1), ""),
    ((0, 0, 0), "all 3 ranks are on one host"),
    ((0, 1, 2), "each of 3 hosts has one rank"),
    ((0, 0, 1), r"hosts have different numbers of ranks: [2, 1]"),
    ((0, 1, 0, 1), "ranks of a host are not consecutive: their hosts are [0, 1, 0, 1]"),
])
def test_refusals_say_what_is_in_the_way(of_rank, refusal):
    groups = Groups(world_size=len(of_rank), host_of_rank=of_rank)
    assert two_stages_refusal(groups) == refusal


def _stages(groups):
    with pytest.raises(LaunchError, match="two_stage was asked for, but all 4 ranks are on one"):
        comm.with_stages(groups)
    staged = in_stages(groups)
    return staged.stages.transport, staged.stages.host, staged.stages.place


def test_stages_say_what_they_run_over():
    for rank, (words, host, place) in enumerate(run_ranks(4, _stages)):
        assert words == "shared memory inside 2 hosts of 2 ranks, gloo between them"
        assert (host, place) == divmod(rank, 2)


def _transfers(groups):
    """What the ranks of the host, and those of the column, sent."""
    stages = in_stages(groups).stages
    found = []
    for lane in (stages.inside, stages.across, stages.inside_ahead, stages.across_ahead):
        out = torch.empty(4, dtype=torch.int64)
        source = torch.tensor([10 * groups.rank, 10 * groups.rank, 10 * groups.rank + 1,
                               10 * groups.rank + 1])
        comm.all_to_all(out, source, [2, 2], [2, 2], lane, "rows").wait()
        found.append((out.tolist(), lane.near))
    return found


def test_lanes_join_the_ranks_of_a_host_and_those_of_a_column():
    for rank, (inside, across, *ahead) in enumerate(run_ranks(4, _transfers)):
        host, place = divmod(rank, 2)
        mates, column = (2 * host, 2 * host + 1), (place, place + 2)
        assert inside == ([10 * mate + place for mate in mates for _ in range(2)], (True, True))
        assert across == ([10 * peer + host for peer in column for _ in range(2)],
                          (host == 0, host == 1))
        assert ahead == [inside, across]


def _sums(groups, sizes, dtype):
    groups = in_stages(groups)
    tensors = [torch.arange(size, dtype=dtype) * (groups.rank + 1) for size in sizes]
    for work in [comm.start_all_reduce(tensor, groups) for tensor in tensors]:
        work.wait()
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_in_two_stages_reach_every_rank(dtype):
    sizes = [0, 1, 17, 300_000, 5]
    for tensors in run_ranks(4, _sums, sizes, dtype):
        for size, tensor in zip(sizes, tensors, strict=True):
            assert torch.equal(tensor, 10 * torch.arange(size, dtype=dtype))
