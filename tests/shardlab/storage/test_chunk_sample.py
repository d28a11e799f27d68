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
        storage.begin_step(storage.clock.step + 10)  # a period
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


@pytest.mark.parametrize("start", ["dense", "empty"])
def test_warmup_may_be_longer_than_fp32_could_count(start):
    """gamma^-warmup is beyond fp32; what decays in between leaves the ranking as it is."""
    parts = build(tables(pruned(BUDGET, chunks=1, start=start, warmup=310, period=10, ramp=0,
                                gamma=0.7)))
    train(parts, 309, size=64)
    storage = parts[2].storage
    before = storage.index.numbers(0)
    assert storage.since[0] >= 309 - 20  # 0.7^20 < 2^-10
    train(parts, 1, first=309, size=64)
    assert storage.since[0] == 310
    held, budget = parts[2].tier_bytes().total, BUDGET * sum(SIZES) * 16 * 4
    assert 0.75 * budget < held <= budget
    assert before.used == sum(SIZES) if start == "dense" else before.refused > 0
    for block in range(3):
        codes = storage.index.list_rows(block).utilities.int() << 16
        assert torch.isfinite(codes.view(torch.float32)).all()


def test_what_decays_in_between_is_resumed(tmp_path):
    options = {"chunks": 1, "gamma": 0.7, "period": 1000}
    groups, found = build_groups(), tables(pruned(BUDGET, **options))
    parts = build(found)
    train(parts, 50, size=256)
    sl.save(tmp_path / "c", parts[0], parts[1], groups)
    expected = train(parts, 30, first=50, size=256)
    again = build(found)
    sl.load(tmp_path / "c", again[0], again[1], groups)
    assert all(map(torch.equal, train(again, 30, first=50, size=256), expected))
    assert parts[2].storage.since == again[2].storage.since != [0]
    assert parts[2].storage.index.numbers(0) == again[2].storage.index.numbers(0)
