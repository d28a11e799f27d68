"""Initial weights depend on (seed, table, row, column) alone, whichever face writes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shardlab.ops.init import InitStreams, init_pieces, init_uniform, table_seed
from shardlab.specs import EmbeddingBagConfig
from shardlab.table_plan import Shard
from tests.shardlab.ops.cases import DIMS, INDEX_PLACES, Place, face

WORD = 1 << 64


@pytest.fixture(params=INDEX_PLACES)
def place(request) -> Place:
    return request.param


def table_of(rows: int, dim: int, name: str = "t", **options: float) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=dim,
                              feature_names=["f"], **options)


def init(place: Place, table: EmbeddingBagConfig, shard: Shard, seed: int = 0) -> torch.Tensor:
    rows = torch.full((shard.rows, shard.columns), 9.0, device=place.device)
    with face(place.face):
        init_uniform(rows, table, shard, seed)
    return rows.cpu()


def whole(table: EmbeddingBagConfig) -> Shard:
    return Shard(0, 0, table.num_embeddings, 0, table.embedding_dim)


def splitmix(x: int) -> int:
    """Steele et al. 2014, in Python's integers."""
    x = (x + 0x9E3779B97F4A7C15) % WORD
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % WORD
    return x ^ (x >> 31)


@pytest.mark.parametrize("dim", DIMS, ids=lambda d: f"dim={d}")
def test_weights_follow_the_formula(place, dim):
    table = table_of(7, dim)
    found = init(place, table, whole(table), seed=3)
    start, (low, high) = table_seed(3, "t"), (np.float32(x) for x in table.init_range)
    for row, column in ((0, 0), (6, dim - 1), (3, dim // 2)):
        unit = np.float32((splitmix((start + row * dim + column) % WORD) >> 40) * 2.0**-24)
        assert found[row, column].item() == low + (high - low) * unit


@pytest.mark.parametrize("shard", [Shard(0, 0, 5, 0, 17), Shard(0, 5, 30, 0, 17),
                                   Shard(0, 0, 30, 4, 9), Shard(0, 11, 12, 16, 17),
                                   Shard(0, 4, 4, 0, 17)],
                         ids=["rows", "last-rows", "columns", "one-cell", "empty"])
def test_any_shard_is_a_part_of_the_table(place, shard):
    table = table_of(30, 17)
    expected = init(Place("reference", "cpu"), table, whole(table))
    assert torch.equal(init(place, table, shard), expected[shard.row_start:shard.row_end,
                                                           shard.col_start:shard.col_end])


def test_pieces_are_those_of_their_tables():
    """Pieces of eight columns of two tables, the last ones too."""
    found = [table_of(30, 24), table_of(9, 8, "u", weight_init_min=-3.0, weight_init_max=5.0)]
    numbers, tables = torch.tensor([0, 89, 8, 31, 0, 31]), torch.tensor([0, 0, 1, 0, 1, 0])
    expected = [init(Place("reference", "cpu"), one, whole(one), seed=4).view(-1, 8)
                for one in found]
    for name in ("native", "reference"):
        values = torch.full((6, 8), 9.0)
        with face(name):
            init_pieces(values, numbers, tables, InitStreams.of(found, 4))
        for value, number, one in zip(values, numbers, tables, strict=True):
            assert torch.equal(value, expected[one][number])


def test_rows_may_lie_apart(place):
    """Only the shard's cells are written where rows have something between them."""
    table, records = table_of(5, 4), torch.full((5, 7), 9.0, device=place.device)
    with face(place.face):
        init_uniform(records[:, :4], table, whole(table), 0)
    assert torch.equal(records[:, 4:].cpu(), torch.full((5, 3), 9.0))
    assert torch.equal(records[:, :4].cpu(), init(place, table, whole(table)))


def test_seed_and_name_choose_the_table(place):
    table, other = table_of(50, 8), table_of(50, 8, "u")
    first = init(place, table, whole(table))
    assert torch.equal(first, init(place, table, whole(table)))
    for found in (init(place, table, whole(table), seed=1), init(place, other, whole(other))):
        assert int((found == first).sum()) < 5


def test_weights_are_uniform_in_their_range(place):
    table = table_of(5000, 8, weight_init_min=-1.0, weight_init_max=3.0)
    found = init(place, table, whole(table)).double()
    assert found.min() >= -1.0
    assert found.max() < 3.0
    # 40,000 draws: the mean of a uniform of width 4 is off by 0.0058 (one sigma), a bin of 5,000
    # by 66.
    assert abs(found.mean() - 1) < 0.03
    bins = torch.histc(found, bins=8, min=-1, max=3)
    assert (bins - 5000).abs().max() < 330
    assert abs(np.corrcoef(found[:, 0], found[:, 1])[0, 1]) < 0.07


def test_default_range_is_that_of_the_rows(place):
    table = table_of(400, 16)
    found = init(place, table, whole(table))
    assert found.abs().max() <= 0.05
    assert found.abs().max() > 0.049


def test_rows_far_out_are_cheap_and_differ(place):
    """A shard near row 2^40: counters are 64 bit, and no earlier row is drawn."""
    table = table_of(2**40 + 2, 4, weight_init_min=0.0, weight_init_max=1.0)
    found = init(place, table, Shard(0, 2**40, 2**40 + 2, 0, 4))
    start = table_seed(0, "t")
    unit = (splitmix((start + 2**42 + 5) % WORD) >> 40) * 2.0**-24
    assert found[1, 1].item() == unit
    assert found.unique().numel() == 8


@pytest.mark.parametrize("threads", [1, 2, 3], ids=lambda n: f"threads={n}")
def test_init_with_any_threads(place, threads):
    table = table_of(100, 17)
    expected = init(Place("reference", "cpu"), table, whole(table))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(init(place, table, whole(table)), expected)
    finally:
        torch.set_num_threads(before)
