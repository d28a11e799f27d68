"""The first step of admitted chunks: the native face and the plain one agree."""

from __future__ import annotations

import pytest
import torch

from shardlab.ops.chunk_index import ChunkRows
from shardlab.ops.chunk_rows import UtilityStep, step_admitted, update_chunks
from shardlab.ops.rows import job_spans
from shardlab.ops.step_parameters import RULES, StepParameters
from shardlab.ops.unique import Uniques
from shardlab.specs import EmbeddingBagConfig
from shardlab.storage import LocalShard, StorageOptions, build_storage
from shardlab.table_plan import Shard
from tests.shardlab.ops.cases import TOLERANCE

ROWS, COLUMNS, CHUNKS = (9, 300), 24, 3


def storage_of(kind, dtype):
    spec = {"kind": "pruned", "budget": {"bytes": 1 << 16}, "chunks": CHUNKS, "dtype": dtype}
    tables = [EmbeddingBagConfig(rows, COLUMNS, f"t{i}", storage=spec)
              for i, rows in enumerate(ROWS)]
    shards = [LocalShard(table, Shard(0, 0, table.num_embeddings, 0, COLUMNS), table.storage,
                         False) for table in tables]
    return build_storage(shards, StorageOptions(kind, 0, torch.device("cpu")))


def some_uniques(generator):
    """Rows of both tables with 1 to 4 entries each, the last row among them."""
    ids = [torch.tensor([0, 3, 8]),
           torch.cat([torch.randperm(299, generator=generator)[:70], torch.tensor([299])])]
    splits = torch.tensor([0, 3, 74])
    counts = torch.randint(1, 5, (74,), generator=generator)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    sources = torch.randperm(int(starts[-1]), generator=generator) * COLUMNS
    return Uniques(torch.cat(ids), splits, starts, sources)


def admit(storage, uniques, generator):
    """Some chunks of every other row, as `ChunkIndex.offer` tells them."""
    admitted = []
    for block in range(2):
        first, last = uniques.splits[block:block + 2].tolist()
        rows = uniques.ids[first:last]
        wanted = torch.rand(last - first, CHUNKS, generator=generator) < 0.6
        wanted[::4] = False
        places = torch.where(wanted, 0, -1).to(torch.int32)
        taken = storage.index.insert(block, ChunkRows(rows, places, torch.zeros_like(
            places, dtype=torch.int16)))
        row, chunk = wanted.nonzero(as_tuple=True)
        admitted.append(torch.stack([row + first, chunk, taken[row, chunk].long()], 1))
    return torch.cat(admitted)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("kind", list(RULES))
@pytest.mark.parametrize("extra", ["plain", "weighted", "squares"])
def test_faces_agree_on_the_first_step(monkeypatch, kind, dtype, extra):
    arenas = []
    for face in ("native", "reference"):
        generator = torch.Generator().manual_seed(1)
        storage = storage_of(kind, dtype)
        uniques = some_uniques(generator)
        admitted = admit(storage, uniques, generator)
        entries = int(uniques.starts[-1])
        grads = torch.randn(entries * COLUMNS, generator=generator)
        weights = torch.rand(entries, generator=generator) if extra == "weighted" else None
        squares = torch.where(torch.arange(74) % 3 == 0, -1.0, 0.5) if extra == "squares" else None
        step = StepParameters(kind, lr=0.1, eps=1e-8, beta1=0.9, beta2=0.99, bias1=0.1, bias2=0.01,
                              key=77, scale=0.5 if weights is not None else 1.0,
                              clip_value=0.3 if weights is not None else 0.0)
        if face == "reference":
            monkeypatch.setenv("SHARDLAB_FACE", "reference")
        step_admitted(storage.pools, admitted, uniques, weights, grads, step, squares)
        arenas.append(storage.pools.arena.clone())
    assert arenas[0].any()
    if dtype == "fp32":
        torch.testing.assert_close(*(arena.view(torch.float32) for arena in arenas), **TOLERANCE)
    else:  # a last bit of a product may tip the rounding of an element
        assert (arenas[0] != arenas[1]).float().mean() < 1e-3


def test_nothing_admitted_changes_nothing():
    storage = storage_of("sgd", "fp32")
    uniques = some_uniques(torch.Generator().manual_seed(0))
    grads = torch.ones(int(uniques.starts[-1]) * COLUMNS)
    step_admitted(storage.pools, torch.empty(0, 3, dtype=torch.int64), uniques, None, grads,
                  StepParameters("sgd", 0.1), None)
    assert not storage.pools.arena.any()


def test_job_spans_of_fixed_and_jagged_bags():
    jobs = torch.zeros(2, 11, dtype=torch.int64)
    jobs[0, [0, 3, 4, 6]] = torch.tensor([5, 4, 10, 3])
    jobs[1, [0, 3, 5, 6]] = torch.tensor([7, 2, 1, -1])
    assert job_spans(jobs, torch.tensor([0, 4, 9, 9])) == [(5, 10, 12), (7, 4, 5)]


def count_absent(storage, uniques, share, key=11):
    """Norms of all chunks, and the utilities that present ones have then."""
    blocks = len(storage.shards)
    generator = torch.Generator().manual_seed(8)
    grads = torch.randn(int(uniques.sources.max()) + COLUMNS, generator=generator)
    norms = update_chunks(storage.pools, uniques, None, grads, StepParameters("sgd", 0.1), None,
                          UtilityStep(torch.ones(blocks), key, torch.full((blocks,), share)))
    return norms, [storage.index.list_rows(block).utilities for block in range(blocks)]


@pytest.mark.parametrize("some_present", [False, True])
def test_a_share_of_the_absent_rows_counts_for_all(monkeypatch, some_present):
    def run(face, share):
        monkeypatch.setenv("SHARDLAB_FACE", face)
        generator = torch.Generator().manual_seed(3)
        uniques, storage = some_uniques(generator), storage_of("sgd", "fp32")
        if some_present:
            admit(storage, uniques, generator)
        return count_absent(storage, uniques, share)

    every, utilities = run("native", 1.0)
    some, same = run("native", 0.25)
    assert all(map(torch.equal, utilities, same))
    present = every < 0
    assert present.any() == some_present
    assert (some[present] == -1).all()
    counted = (some > 0).any(1)
    assert torch.equal(some[counted], torch.where(present, every, 4 * every)[counted])
    assert (some[~counted] <= 0).all()
    assert 0.1 < float(counted.float().mean()) < 0.4
    assert torch.equal(run("reference", 0.25)[0] > 0, some > 0)
    torch.testing.assert_close(run("reference", 0.25)[0], some)


def test_rows_count_alike_in_any_part_of_a_table():
    """Whether a row counts follows from the step and its number in the table."""
    def counted(row_start, col_start, columns):
        table = EmbeddingBagConfig(4000, COLUMNS, "t", storage={
            "kind": "pruned", "budget": {"ratio": 0.5}, "chunks": CHUNKS})
        local = LocalShard(table, Shard(0, row_start, 4000, col_start, col_start + columns),
                           table.storage, False)
        storage = build_storage([local], StorageOptions("sgd", 0, torch.device("cpu")))
        count = 4000 - row_start
        uniques = Uniques(torch.arange(count), torch.tensor([0, count]), torch.arange(count + 1),
                          torch.arange(count) * columns)
        return [(count_absent(storage, uniques, 0.1, key)[0] > 0).any(1) for key in (5, 6)]

    whole, other = counted(0, 0, COLUMNS)
    assert 300 < int(whole.sum()) < 500
    assert int((whole & other).sum()) < 100
    assert torch.equal(counted(1500, 0, COLUMNS)[0], whole[1500:])
    assert torch.equal(counted(0, 8, 16)[0], whole)
