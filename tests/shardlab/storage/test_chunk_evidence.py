"""Absent rows that count by chance: how many, and that frequent ones are found all the same."""

from __future__ import annotations

import pytest
import torch

import shardlab as sl
from shardlab.comm import build_groups
from tests.shardlab.storage.test_pruned import batch, build, pruned, tables, train


@pytest.mark.parametrize(("evidence", "normalize", "share"), [
    (8, "together", 0.2), (8, True, 0.2), (8, False, 1.0), (0, True, 1.0), (50, True, 1.0),
    (1e-3, True, 2.0 ** -10)])
def test_fewer_rows_count_where_admission_takes_more(evidence, normalize, share):
    storage = build(tables(pruned(evidence=evidence, normalize=normalize)))[2].storage
    assert storage._shares().tolist() == [1.0] * 3  # whoever comes is admitted
    storage.thresholds.fill_(40)
    assert storage._shares().tolist() == pytest.approx([share] * 3)


def test_rows_of_a_full_store_are_found_by_the_few_that_count():
    """Ids that come in every step of a store whose threshold is high."""
    parts = build(tables(pruned(0.02, chunks=1, period=10)))
    train(parts, 60, size=128)
    model, optimizer, collection = parts
    often = torch.arange(19_000, 19_040)
    generator = torch.Generator().manual_seed(2)
    for step in range(40):
        optimizer.zero_grad()
        features = batch(step, size=160)
        ids = torch.cat([features.values()[:320], often.repeat(4)])
        out = model(sl.KeyedJaggedTensor(features.keys(), ids, lengths=features.lengths()))
        (out - torch.randn(160, 1, generator=generator)).square().mean().backward()
        optimizer.step()
    storage = collection.storage
    assert storage._shares().max() < 0.5
    assert torch.isin(often, storage.index.list_rows(2).rows).sum() >= 38


@pytest.mark.parametrize("absent", ["zeros", "shared"])
def test_a_resumed_run_counts_the_same_rows(tmp_path, absent):
    options = {"chunks": 2, "period": 7, "evidence": 0.5, "absent": absent}
    groups, found = build_groups(), tables(pruned(0.02, **options))
    parts = build(found)
    train(parts, 38, length=-1, size=256)
    assert parts[2].storage._shares().max() < 0.7
    sl.save(tmp_path / "c", parts[0], parts[1], groups)
    expected = train(parts, 15, first=38, length=-1, size=256)
    again = build(found)
    train(again, 3)
    sl.load(tmp_path / "c", again[0], again[1], groups)
    assert all(map(torch.equal, train(again, 15, first=38, length=-1, size=256), expected))
    one, two = parts[2].storage, again[2].storage
    assert torch.equal(one.index.sketch(0), two.index.sketch(0))
    assert torch.equal(one.thresholds, two.thresholds)
    for block in range(3):
        assert torch.equal(one.index.list_rows(block).rows, two.index.list_rows(block).rows)
