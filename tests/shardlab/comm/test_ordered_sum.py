"""Sums in the order of ranks, bit by bit, over both transports."""

from __future__ import annotations

import pytest
import torch

from shardlab.comm.ordered_sum import ordered_sum_, piece_edges
from tests.harness import run_ranks


def _values(rank, elements):
    generator = torch.Generator().manual_seed(rank)
    # Of many magnitudes, so that another order gives other bits.
    return torch.randn(elements, generator=generator) * \
        10.0 ** torch.randint(-6, 7, (elements,), generator=generator)


def _sums(groups, sizes):
    return [ordered_sum_(_values(groups.rank, size), groups) for size in sizes]


@pytest.mark.parametrize("transport", ["shared_memory", "gloo"])
@pytest.mark.parametrize("world", [1, 2, 3, 4], ids="ranks_{}".format)
def test_all_ranks_get_the_sum_in_order(world, transport, monkeypatch):
    monkeypatch.setenv("SHARDLAB_TRANSPORT", transport)
    sizes = [0, 1, 2, 3, 5, 1000, 100_003]
    found = run_ranks(world, _sums, sizes)
    for number, size in enumerate(sizes):
        expected = _values(0, size)
        for rank in range(1, world):
            expected = expected + _values(rank, size)
        for sums in found:
            assert torch.equal(sums[number], expected), size


def test_pieces_cover_everything_once():
    assert piece_edges(10, 4) == [0, 2, 5, 7, 10]
    assert piece_edges(1, 3) == [0, 0, 0, 1]
