"""What caches did, from the level up to the lines of metrics."""

from __future__ import annotations

import pytest
import torch

import shardlab as sl
from shardlab.sharded import simple_plan
from shardlab.train.cache_meter import WIDTH, CacheCounts, CacheMeter, as_record, total_of

ROWS, DIM = 100, 4


class _Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        chain = {"levels": [{"fraction": 0.1, "ways": 10, "admission": "always"}, {}]}
        self.tables = sl.EmbeddingBagCollection([
            sl.EmbeddingBagConfig(ROWS, DIM, "cached", storage=chain),
            sl.EmbeddingBagConfig(ROWS, DIM, "plain")])

    def forward(self, features):
        return self.tables(features).values()


def _lookup(model, ids):
    both = torch.tensor([*ids, *ids])
    model(sl.KeyedJaggedTensor(["cached", "plain"], both, fixed_length=1))


@pytest.fixture
def model():
    built = _Model()
    sharded, _ = sl.shard(built, simple_plan(list(built.tables.tables), sl.comm.init()))
    sharded.eval()
    return sharded


def test_counts_follow_the_lookups(model):
    meter = CacheMeter(model)
    assert meter.tables == ["cached"]
    _lookup(model, range(10))
    (first,) = meter.named(meter.take()).values()
    assert (first.hits, first.misses, first.evictions) == (0, 10, 0)
    assert first.moved_bytes == 10 * (DIM * 4 + 4)
    _lookup(model, range(5, 15))
    (second,) = meter.named(meter.take()).values()
    assert (second.hits, second.misses, second.evictions) == (5, 5, 5)
    assert second.hit_rate == 0.5
    assert meter.take() == [0] * WIDTH


def test_restart_leaves_a_validation_out(model):
    meter = CacheMeter(model)
    _lookup(model, range(10))
    meter.restart()
    assert meter.take() == [0] * WIDTH


def test_record_tells_rates_and_means_of_a_step():
    counts = {"a": CacheCounts(hits=30, misses=10, evictions=4, moved_bytes=800),
              "b": CacheCounts()}
    record = as_record(counts, 2)
    assert record["cache_hit_rate"] == {"a": 0.75, "b": 0}
    assert record["cache_misses_per_step"] == {"a": 5, "b": 0}
    assert record["cache_moved_bytes_per_step"] == {"a": 400, "b": 0}
    assert total_of(counts).hit_rate == 0.75
    assert as_record({}, 2) == {}
