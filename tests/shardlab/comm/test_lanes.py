"""Lanes over gloo: pieces of any size, several transfers under way, a peer that is gone."""

from __future__ import annotations

import pytest
import torch

from shardlab import comm
from shardlab.comm.lanes import TorchLane
from tests.harness import run_ranks


def _size(sender: int, receiver: int, number: int) -> int:
    """Elements; none between some, and more than a socket takes at once between others."""
    return [0, 3, 70_000, 1][(sender + 2 * receiver + number) % 4]


def _value(sender: int, receiver: int, number: int) -> int:
    return 100 * number + 10 * sender + receiver


def _transfers(groups, count):
    groups = comm.build_groups(groups.process_group, transport="gloo")
    assert isinstance(groups.exchange, TorchLane)
    me, ranks = groups.rank, range(groups.world_size)
    outs, finishes = [], []
    for number in range(count):
        source = torch.cat([torch.full((_size(me, peer, number),), _value(me, peer, number))
                            for peer in ranks])
        if number == 1:
            source = source.repeat_interleave(2)[::2]  # not contiguous
        due = [_size(peer, me, number) for peer in ranks]
        outs.append(torch.full((sum(due),), -1))
        finishes.append(groups.exchange.all_to_all(
            outs[-1], source, due, [_size(me, peer, number) for peer in ranks]))
    for finish in reversed(finishes) if me == 0 else finishes:
        finish()
    return outs


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_piece_arrives_at_its_place(world):
    for me, outs in enumerate(run_ranks(world, _transfers, 4)):
        for number, out in enumerate(outs):
            expected = torch.cat([torch.full((_size(peer, me, number),), _value(peer, me, number))
                                  for peer in range(world)])
            assert torch.equal(out, expected)
