"""Two neighbourhoods of every rank: what they move, what order they add in, whom faults name."""

from __future__ import annotations

import signal

import pytest
import torch

from shardlab import comm
from shardlab.errors import ConfigError
from tests.fault_ranks import FaultyWorld
from tests.harness import run_ranks


def _places(groups, replicas):
    split = comm.split_replicas(groups, replicas)
    return [(part.rank, part.world_size, part.members, part.job_rank, part.exchange is None)
            for part in (split.tables, split.copies)]


@pytest.mark.parametrize(("replicas", "tables", "copies"), [
    (1, [(0, 1, 2, 3)] * 4, [(0,), (1,), (2,), (3,)]),
    (2, [(0, 1), (0, 1), (2, 3), (2, 3)], [(0, 2), (1, 3), (0, 2), (1, 3)]),
    (4, [(0,), (1,), (2,), (3,)], [(0, 1, 2, 3)] * 4)])
def test_ranks_of_a_group_follow_each_other(replicas, tables, copies):
    for rank, found in enumerate(run_ranks(4, _places, replicas)):
        for (place, size, members, job_rank, alone), expected in zip(
                found, (tables[rank], copies[rank]), strict=True):
            assert (members, job_rank, size) == (expected, rank, len(expected))
            assert members[place] == rank
            assert alone == (size == 1)


def test_ranks_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="6 ranks do not divide into 4 groups of equal size; "
                                          "choose one of 1, 2, 3, 6"):
        comm.split_replicas(comm.Groups(world_size=6), 4)


def _parts(groups, sizes):
    """What ranks send to all, and each to each."""
    copies = comm.split_replicas(groups, groups.world_size).copies
    own = torch.arange(sizes[groups.rank], dtype=torch.int16) + 100 * groups.rank
    gathered = comm.gather_parts(own, sizes, copies, "sync")
    each = [own[:rank] + 10 * rank for rank in range(groups.world_size)]
    coming = [min(groups.rank, size) for size in sizes]
    return [part.tolist() for part in gathered], \
        [part.tolist() for part in comm.send_parts(each, coming, copies, "sync")]


@pytest.mark.parametrize("sizes", [[3, 0, 5, 1], [0, 0, 0, 0]], ids=["some", "none"])
def test_parts_come_by_rank(sizes):
    for own, (gathered, received) in enumerate(run_ranks(4, _parts, sizes)):
        for rank, size in enumerate(sizes):
            assert gathered[rank] == [100 * rank + i for i in range(size)]
            assert received[rank] == [100 * rank + 10 * own + i for i in range(min(own, size))]


def _sync_forever(groups):
    split = comm.split_replicas(groups, 2)
    while True:
        comm.gather_parts(torch.ones(1000), [1000, 1000], split.tables, "rows")
        comm.gather_parts(torch.ones(1000), [1000, 1000], split.copies, "sync")


@pytest.mark.parametrize("transport", ["shared_memory", "gloo"])
def test_killed_rank_is_named_as_the_job_counts(transport, tmp_path):
    world = FaultyWorld(4, tmp_path, transport, 20.0, _sync_forever)
    ended = world.hurt(3, signal.SIGKILL)
    assert [end.code for end in ended.values()] == [3, 3, 3]
    assert all(end.seconds < 10 for end in ended.values())
    direct = {1: "sync: all_to_all failed on rank 1 of ranks [1, 3]: rank 3 has ended",
              2: "rows: all_to_all failed on rank 2 of ranks [2, 3]: rank 3 has ended"}
    # Who talked to the other neighbourhood just then hears of it as that one's end.
    assert any(text in ended[rank].error for rank, text in direct.items())
    assert all("of ranks [" in end.error for end in ended.values())
