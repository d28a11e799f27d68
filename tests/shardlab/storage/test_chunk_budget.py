"""Thresholds from histograms: who keeps how many chunks."""

from __future__ import annotations

import pytest
import torch

from shardlab.ops.chunk_numbers import BINS, bin_edges
from shardlab.storage.chunk_budget import (
    at_least,
    common_threshold,
    demand_curve,
)


def histogram(values):
    """int64 [1, BINS] of utilities."""
    place = torch.searchsorted(bin_edges(), torch.tensor(values, dtype=torch.float64),
                               right=True) - 1
    return torch.bincount(place, minlength=BINS)[None, :BINS]


def test_counts_at_a_limit_lie_between_those_of_its_bin():
    counts = histogram([0.0, 0.0, 1.0, 1.0, 2.0, 8.0])
    limits = torch.tensor([[0.0, 1e-10, 1.0, 1.5, 3.0, 100.0]], dtype=torch.float64)
    assert at_least(counts, limits)[0].tolist() == [6, 4, 4, 2, 1, 0]


def test_one_threshold_for_all_ranks_unless_a_limit_binds():
    one = demand_curve(histogram([float(2 ** i) for i in range(-10, 6)])[0], 10.0)
    curves = torch.stack([one, one])
    thresholds, kept = common_threshold(
        curves, torch.tensor([1e9, 1e9], dtype=torch.float64), 160.0)
    assert thresholds[0] == thresholds[1] > 0
    assert kept.sum() == pytest.approx(160.0, rel=0.01)
    thresholds, kept = common_threshold(
        curves, torch.tensor([40.0, 1e9], dtype=torch.float64), 160.0)
    assert thresholds[0] > thresholds[1]
    assert kept.tolist() == pytest.approx([40.0, 120.0], rel=0.01)


def test_nothing_goes_while_there_is_room():
    curve = demand_curve(histogram([0.0, 1.0])[0], 10.0)[None]
    thresholds, kept = common_threshold(curve, torch.tensor([100.0], dtype=torch.float64), 100.0)
    assert thresholds.tolist() == [0.0]
    assert kept.tolist() == [20.0]
