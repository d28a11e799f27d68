"""A killed or a stopped rank: every other rank ends in time and names phase, collective, rank."""

from __future__ import annotations

import signal

import pytest
import torch

from shardlab import comm
from tests.fault_ranks import FaultyWorld

TIMEOUT_S = 2.0
TRANSPORTS = pytest.mark.parametrize("transport", ["shared_memory", "gloo"])


def _exchange_forever(groups, collective):
    source, splits = torch.ones(1000 * groups.world_size), [1000] * groups.world_size
    while True:
        if collective == "all_reduce":
            comm.all_reduce_(source, groups)
        else:
            comm.all_to_all(torch.empty_like(source), source, splits, splits, groups,
                            "rows").wait()


@TRANSPORTS
def test_killed_rank_is_named_at_once(transport, tmp_path):
    world = FaultyWorld(3, tmp_path, transport, 60.0, _exchange_forever, "all_to_all")
    for rank, end in world.hurt(1, signal.SIGKILL).items():
        assert end.code == 3
        assert f"rows: all_to_all failed on rank {rank} of 3: " in end.error
        assert "rank 1 has ended" in end.error
        assert end.seconds < 10


@TRANSPORTS
def test_stopped_rank_is_named_after_the_timeout(transport, tmp_path):
    world = FaultyWorld(3, tmp_path, transport, TIMEOUT_S, _exchange_forever, "all_to_all")
    for rank, end in world.hurt(1, signal.SIGSTOP).items():
        assert end.code == 3
        assert f"rows: all_to_all failed on rank {rank} of 3: no answer within 2 s; " in end.error
        assert "rank 1 does not answer (stopped, or its host hangs)" in end.error
        assert TIMEOUT_S - 0.5 < end.seconds < TIMEOUT_S + 10


def test_dense_collective_names_a_killed_rank(tmp_path):
    world = FaultyWorld(2, tmp_path, "auto", 60.0, _exchange_forever, "all_reduce")
    (end,) = world.hurt(1, signal.SIGKILL).values()
    assert end.code == 3
    assert "overhead: all_reduce failed on rank 0 of 2: rank 1 has ended" in end.error
