"""Absent rows that count by chance: how many, and that frequent ones are found all the same."""

from __future__ import annotations

import pytest
import torch

import shardlab as sl
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
