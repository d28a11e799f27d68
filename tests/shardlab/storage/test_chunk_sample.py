"""Decisions of large stores: thresholds come from the utilities of a sample of the rows."""

from __future__ import annotations

import pytest
import torch

import shardlab as sl
from shardlab.comm import build_groups
from shardlab.ops.chunk_numbers import bin_edges
from shardlab.storage import pruned as pruned_storage
from shardlab.storage.chunk_budget import at_least
from tests.shardlab.storage.test_pruned import SIZES, build, pruned, tables, train

BUDGET = 0.3


def _trained(steps):
    parts = build(tables(pruned(BUDGET, chunks=1, period=10)))
    train(parts, steps, size=256)
    return parts


def test_a_sample_tells_what_all_rows_would(monkeypatch):
    storage = _trained(45)[2].storage
    numbers, whole = storage.index.numbers(0), storage.utility_counts(0)
    assert torch.equal(whole, storage.index.count(0, storage.decay(0))[0].double())
    assert numbers.rows > 2000
    monkeypatch.setattr(pruned_storage, "_COUNTED", 500)
    parts = []
    for _ in range(3):
        storage.begin_step(storage.clock.step + 1)
        parts.append(storage.utility_counts(0))
        assert float(parts[-1].sum()) == pytest.approx(numbers.used)
    assert not torch.equal(parts[0], parts[1])  # every decision has a sample of its own
    edges = bin_edges()[None]
    shares = [at_least(part.sum(0)[None], edges)[0] / numbers.used for part in (whole, *parts)]
    for share in shares[1:]:
        assert (share - shares[0]).abs().max() < 0.12  # 500 rows: 5 standard deviations


def test_bytes_follow_the_budget_by_a_sample(monkeypatch):
    monkeypatch.setattr(pruned_storage, "_COUNTED", 1000)
    parts = _trained(120)
    held, budget = parts[2].tier_bytes().total, BUDGET * sum(SIZES) * 16 * 4
    assert parts[2].storage.index.numbers(0).rows > 2000
    assert 0.9 * budget < held <= budget


def test_a_resumed_run_takes_the_same_samples(monkeypatch, tmp_path):
    monkeypatch.setattr(pruned_storage, "_COUNTED", 500)
    groups, parts = build_groups(), _trained(38)
    sl.save(tmp_path / "c", parts[0], parts[1], groups)
    expected = train(parts, 25, first=38, size=256)
    again = _trained(3)
    sl.load(tmp_path / "c", again[0], again[1], groups)
    assert all(map(torch.equal, train(again, 25, first=38, size=256), expected))
