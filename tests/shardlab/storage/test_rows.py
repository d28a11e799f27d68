"""The rows storage alone: byte counts, streaming in chunks, and loading under other cuts."""

from __future__ import annotations

import pytest
import torch

from shardlab.errors import CheckpointError
from shardlab.plan import ShardingPlan
from shardlab.specs import EmbeddingBagConfig, ShardingType
from shardlab.storage import LocalShard, StorageOptions, TableChunk
from shardlab.storage.rows import STATE_NAMES, RowsStorage
from shardlab.storage_bytes import OPTIMIZER_STATE, tier_bytes
from shardlab.storage_specs import RowsSpec
from shardlab.table_plan import build_table_plan
from tests.oracle import empty_state

KINDS = list(OPTIMIZER_STATE)
CPU = torch.device("cpu")
TABLES = [EmbeddingBagConfig(num_embeddings=11, embedding_dim=5, name="odd"),
          EmbeddingBagConfig(num_embeddings=3, embedding_dim=16, name="line"),
          EmbeddingBagConfig(num_embeddings=1, embedding_dim=1, name="dot")]


def _storage(optimizer, kind=ShardingType.TABLE_WISE, rank=0, world=1, seed=3):
    """The shards of one rank under one way of cutting; narrow tables take fewer ranks."""
    plans = [build_table_plan(table, kind, list(range(min(world, table.embedding_dim)))
                              if kind is ShardingType.COLUMN_WISE else range(world))
             for table in TABLES]
    ShardingPlan(world, tuple(plans)).check(TABLES, world)
    shards = [LocalShard(table, shard, RowsSpec(), False)
              for table, plan in zip(TABLES, plans, strict=True)
              for shard in plan.shards if shard.rank == rank]
    return RowsStorage(shards, StorageOptions(optimizer, seed, CPU))


def _chunk(table, optimizer, generator):
    weights = torch.randn(table.num_embeddings, table.embedding_dim, generator=generator)
    state = {name: torch.rand(value.shape, generator=generator)
             for name, value in empty_state(optimizer, weights).items()}
    return TableChunk(table.name, 0, 0, weights, state)


@pytest.mark.parametrize("optimizer", KINDS)
def test_bytes_are_the_planners(optimizer):
    storage = _storage(optimizer)
    planned = [tier_bytes(table.storage, table.num_embeddings, table.embedding_dim,
                          optimizer).total for table in TABLES]
    assert storage.tier_bytes().hbm == sum(planned) == storage.arena.numel()


@pytest.mark.parametrize("max_bytes", [1, 100, 1 << 20])
def test_chunks_cover_every_row_in_order_and_stay_small(max_bytes):
    storage = _storage("adam")
    ends = {table.name: 0 for table in TABLES}
    for chunk in storage.chunks(max_bytes):
        rows, columns = chunk.weights.shape
        assert chunk.row_start == ends[chunk.table]
        assert rows == 1 or rows * columns * 12 <= max_bytes
        ends[chunk.table] += rows
    assert ends == {table.name: table.num_embeddings for table in TABLES}


@pytest.mark.parametrize("optimizer", KINDS)
def test_state_has_its_names_and_shapes(optimizer):
    for chunk in _storage(optimizer).chunks(1 << 20):
        expected = empty_state(optimizer, chunk.weights)
        assert tuple(chunk.state) == STATE_NAMES[optimizer]
        assert {name: part.shape for name, part in chunk.state.items()} == {
            name: part.shape for name, part in expected.items()}
        assert not any(part.any() for part in chunk.state.values())


def test_chunks_are_copies():
    storage = _storage("adagrad")
    first = next(storage.chunks(1 << 20))
    first.weights.zero_()
    first.state["sum"].fill_(1)
    again = next(storage.chunks(1 << 20))
    assert again.weights.any()
    assert not again.state["sum"].any()


@pytest.mark.parametrize("kind", [ShardingType.ROW_WISE, ShardingType.COLUMN_WISE],
                         ids=lambda kind: kind.value)
@pytest.mark.parametrize("optimizer", KINDS)
def test_whole_tables_move_to_cut_ones_and_back(optimizer, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    whole = [_chunk(table, optimizer, generator) for table in TABLES]
    parts = [_storage(optimizer, kind, rank, 4) for rank in range(4)]
    for part in parts:
        part.begin_load()
        for chunk in whole:
            part.load_chunk(chunk)
    back = _storage(optimizer, seed=4)
    back.begin_load()
    for part in parts:
        for chunk in part.chunks(max_bytes=70):
            back.load_chunk(chunk)
    for expected, found in zip(whole, back.chunks(1 << 20), strict=True):
        assert torch.equal(found.weights, expected.weights)
        for name, state in expected.state.items():
            # A row's state comes as the mean over its column parts: rounded, where there are 4.
            torch.testing.assert_close(found.state[name], state, rtol=1e-6, atol=0)


@pytest.mark.parametrize("optimizer", KINDS)
def test_begin_load_clears_what_was_there(optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    storage = _storage(optimizer)
    for _ in range(2):
        chunks = [_chunk(table, optimizer, generator) for table in TABLES]
        storage.begin_load()
        for chunk in chunks:
            storage.load_chunk(chunk)
    for expected, found in zip(chunks, storage.chunks(1 << 20), strict=True):
        assert torch.equal(found.weights, expected.weights)
        assert all(torch.equal(found.state[name], part) for name, part in expected.state.items())


def test_state_of_another_optimizer_is_refused():
    chunk = _chunk(TABLES[0], "adagrad", torch.Generator())
    with pytest.raises(CheckpointError, match=r"table 'odd': checkpoint holds optimiser state "
                                              r"\['sum'\], adam needs \['exp_avg', 'exp_avg_sq'\]"):
        _storage("adam").load_chunk(chunk)


def test_rank_without_shards_holds_nothing():
    storage = RowsStorage([], StorageOptions("adam", 0, CPU))
    assert storage.tier_bytes().total == 0
    assert list(storage.chunks(100)) == []
    storage.begin_load()
    storage.load_chunk(_chunk(TABLES[0], "adam", torch.Generator()))
