"""Chains of levels: what a cache, a tier or the disk must never change."""

from __future__ import annotations

import gc

import pytest
import torch

from shardlab.errors import StorageError
from shardlab.ops.step_parameters import StepParameters
from shardlab.ops.unique import Segments, Uniques, unique_segments
from shardlab.specs import EmbeddingBagConfig
from shardlab.storage import LocalShard, StorageOptions
from shardlab.storage.levels import MemoryHome
from shardlab.storage.rows import RowsStorage
from shardlab.storage_text import parse_storage
from shardlab.table_plan import Shard

CPU = torch.device("cpu")
SIZES = ((97, 6), (40, 16), (9, 4))
STEPS = 12
FP32_CACHE = {"levels": [{"fraction": 0.1, "ways": 4}, {"dtype": "fp32"}]}
THREE_LEVELS = {"levels": [{"tier": "hbm", "fraction": 0.05, "ways": 2},
                           {"tier": "ddr", "fraction": 0.3, "ways": 4}, {"tier": "ssd"}]}
CHAINS = {
    "cache": {"levels": [{"fraction": 0.1, "ways": 4, "admission": "always"}, {}]},
    "lru": {"levels": [{"fraction": 0.2, "policy": "lru", "ways": 3}, {"dtype": "fp32"}]},
    "admission": {"levels": [{"fraction": 0.1, "admission": "frequency"}, {"dtype": "fp32"}]},
    "disk": {"levels": [{"tier": "ddr", "fraction": 0.1}, {"tier": "ssd"}]},
    "three": THREE_LEVELS,
}


def _storage(storage, tmp_path, optimizer="row_wise_adagrad", row_start=0):
    shards = []
    for i, (rows, columns) in enumerate(SIZES):
        table = EmbeddingBagConfig(rows + row_start, columns, f"t{i}")
        spec = storage[i] if isinstance(storage, list) else storage
        shards.append(LocalShard(table, Shard(0, row_start, row_start + rows, 0, columns),
                                 parse_storage(spec, "here"), False))
    return RowsStorage(shards, StorageOptions(optimizer, 5, CPU, str(tmp_path)))


def _batch(step: int, skew: float = 3.0) -> tuple[Uniques, torch.Tensor]:
    """Skewed ids of every table with repetitions, and a gradient per id."""
    generator = torch.Generator().manual_seed(step)
    ids, chunks, at, offset = [], [], 0, 0
    for block, (rows, columns) in enumerate(SIZES):
        count = int(torch.randint(0, 2 * rows, (1,), generator=generator))
        drawn = (torch.rand(count, generator=generator) ** skew * rows).long()
        ids.append(drawn)
        chunks.append([block, at, count, offset, columns])
        at, offset = at + count, offset + count * columns
    limits = torch.tensor([rows for rows, _ in SIZES])
    uniques = unique_segments(torch.cat(ids), torch.tensor(chunks),
                              Segments(limits, torch.zeros_like(limits)))
    return uniques, torch.randn(offset, generator=generator)


def _read(storage, uniques):
    splits = uniques.splits.tolist()
    segments, at = [], 0
    for block, (_, columns) in enumerate(SIZES):
        count = splits[block + 1] - splits[block]
        segments.append([block, splits[block], count, at])
        at += count * columns
    out = torch.full((at,), torch.nan)
    storage.read(torch.tensor(segments), uniques.ids, out)
    return out


def _train(storage, steps=STEPS, first=1, kind="row_wise_adagrad"):
    """Reads and steps; returns what was read."""
    read = []
    for step in range(first, first + steps):
        uniques, grads = _batch(step)
        read.append(_read(storage, uniques))
        storage.begin_step(step)
        storage.update(uniques, None, grads, StepParameters(kind, lr=0.1, eps=1e-10))
    return read


def _contents(storage):
    return {(chunk.table, chunk.row_start): (chunk.weights, chunk.state)
            for chunk in storage.chunks(1 << 20)}


def _assert_equal(one, other):
    assert one.keys() == other.keys()
    for key, (weights, state) in one.items():
        assert torch.equal(weights, other[key][0]), key
        assert all(torch.equal(state[name], other[key][1][name]) for name in state), key


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "row_wise_adagrad"])
@pytest.mark.parametrize("name", CHAINS)
def test_full_precision_chain_equals_one_level_bit_for_bit(name, kind, tmp_path):
    plain, chain = (_storage(spec, tmp_path, kind) for spec in ("fp32", CHAINS[name]))
    for one, other in zip(_train(plain, kind=kind), _train(chain, kind=kind), strict=True):
        assert torch.equal(one, other)
    _assert_equal(_contents(plain), _contents(chain))
    chain.close()


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp8", "int8", "int4"])
def test_whole_cache_equals_fp32_until_it_is_flushed(dtype, tmp_path):
    levels = {"levels": [{"fraction": 1.0}, {"dtype": dtype}]}
    plain, chain = (_storage(spec, tmp_path) for spec in ("fp32", levels))
    start = _contents(chain)  # what the low-precision home holds
    plain.begin_load()
    for chunk in chain.chunks(1 << 20):
        plain.load_chunk(chunk)
    _assert_equal(_contents(plain), start)
    for one, other in zip(_train(plain), _train(chain), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_rows_without_a_slot_are_stepped_as_without_a_cache(dtype, tmp_path):
    """One slot a table: all rows but that one are what the low-precision table makes of them."""
    levels = {"levels": [{"fraction": 0.001}, {"dtype": dtype}]}
    low, chain = (_storage(spec, tmp_path) for spec in (dtype, levels))
    uniques, grads = _batch(1)
    _read(chain, uniques)
    for storage in (low, chain):
        storage.begin_step(1)
        storage.update(uniques, None, grads, StepParameters("row_wise_adagrad", lr=0.1, eps=1e-10))
    one, other = _contents(low), _contents(chain)
    for key, (weights, _) in one.items():
        differs = (weights != other[key][0]).any(1)
        assert int(differs.sum()) <= 1, key


@pytest.mark.parametrize("name", CHAINS)
def test_flush_changes_nothing_and_a_copy_goes_on_alike(name, tmp_path):
    levels = [{**level} for level in CHAINS[name]["levels"]]
    levels[-1]["dtype"] = "int8"
    first = _storage({"levels": levels}, tmp_path / "a")
    _train(first)
    once, twice = _contents(first), _contents(first)
    _assert_equal(once, twice)
    second = _storage({"levels": levels}, tmp_path / "b")
    second.begin_step(STEPS)
    second.begin_load()
    for chunk in first.chunks(100):
        second.load_chunk(chunk)
    _assert_equal(once, _contents(second))
    for one, other in zip(_train(first, 4, STEPS + 1), _train(second, 4, STEPS + 1), strict=True):
        assert torch.equal(one, other)
    _assert_equal(_contents(first), _contents(second))
    first.close()
    second.close()


@pytest.mark.parametrize("name", ["disk", "three"])
def test_reading_ahead_never_serves_an_old_row(name, tmp_path):
    """Batch i + 1 is prefetched before batch i's update, which changes rows of both."""
    plain, chain = (_storage(spec, tmp_path) for spec in ("fp32", CHAINS[name]))
    for step in range(1, 30):
        uniques, grads = _batch(step)
        ahead, _ = _batch(step + 1)
        results = []
        for storage in (plain, chain):
            results.append(_read(storage, uniques))
            splits = ahead.splits
            segments = torch.stack([torch.arange(len(SIZES)), splits[:-1], splits.diff()], 1)
            storage.prefetch(segments, ahead.ids)
            storage.begin_step(step)
            storage.update(uniques, None, grads,
                           StepParameters("row_wise_adagrad", lr=0.1, eps=1e-10))
        assert torch.equal(*results), step
    _assert_equal(_contents(plain), _contents(chain))
    chain.close()


def test_tables_of_different_chains_share_one_call(tmp_path):
    mixed = ["fp32", FP32_CACHE, THREE_LEVELS]
    plain, chain = (_storage(spec, tmp_path) for spec in ("fp32", mixed))
    for one, other in zip(_train(plain), _train(chain), strict=True):
        assert torch.equal(one, other)
    _assert_equal(_contents(plain), _contents(chain))
    chain.close()


def test_a_part_of_a_table_is_rounded_as_in_the_whole(tmp_path):
    """Random bits go by the table's row, not by the place in a shard or a cache."""
    whole = _storage("fp16", tmp_path)
    part = _storage("fp16", tmp_path, row_start=1000)
    same = _storage({"levels": [{"fraction": 1.0, "dtype": "fp16"}, {"dtype": "fp16"}]}, tmp_path)
    for storage in (part, same):
        storage.begin_load()
        for chunk in whole.chunks(1 << 20):
            storage.load_chunk(chunk if storage is same else type(chunk)(
                chunk.table, 1000, 0, chunk.weights, chunk.state))
    for storage in (whole, part, same):
        _train(storage, 3)
    base = [weights for weights, _ in _contents(whole).values()]
    shifted = [weights for weights, _ in _contents(part).values()]
    cached = [weights for weights, _ in _contents(same).values()]
    assert all(torch.equal(a, b) for a, b in zip(base, cached, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(base, shifted, strict=True))


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"table 't0': cannot make the folder .*/file/x for its "
                                           "rows: Not a directory; give another ssd_dir"):
        _storage(THREE_LEVELS, tmp_path / "file" / "x")


def test_files_go_with_the_storage(tmp_path):
    storage = _storage(THREE_LEVELS, tmp_path)
    assert len(list(tmp_path.iterdir())) == len(SIZES)
    del storage
    gc.collect()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", CHAINS)
def test_bytes_are_the_planners(name, tmp_path):
    storage = _storage(CHAINS[name], tmp_path)
    counted = storage.tier_bytes()
    chains = storage.chains
    memory = chains.near.used_bytes + sum(level.index.meta.numel() for level in chains.caches)
    memory += sum(level.arena.used_bytes + level.index.meta.numel() for level in chains.below)
    memory += sum(home.arena.data.numel() for home in {id(home): home for home, _ in chains.homes
                                                       if isinstance(home, MemoryHome)}.values())
    memory += sum(home.memory_bytes for home in chains.disk_homes)
    assert counted.hbm + counted.ddr == memory
    assert counted.ssd == sum(home.allocated_bytes for home in chains.disk_homes)
    storage.close()


@pytest.mark.parametrize("storage", ["fp32", "fp16", "int8", *CHAINS.values()],
                         ids=["fp32", "fp16", "int8", *CHAINS])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "row_wise_adam"])
def test_rows_that_are_replaced_are_read_back(storage, optimizer, tmp_path):
    one = _storage(storage, tmp_path / "one", optimizer)
    other = _storage(storage, tmp_path / "other", optimizer, row_start=7)
    for made in (one, other):
        _train(made, steps=3, kind=optimizer)
        made.flush()
    for block, (count, _) in enumerate(SIZES):
        rows = torch.tensor(sorted({0, count // 2, count - 1}))
        weights, state = one.read_rows(block, rows)
        other.write_rows(block, rows, weights, state)
        kept = [i for i in range(count) if i not in rows.tolist()]
        for found, expected in zip(other.read_rows(block, rows), (weights, state), strict=True):
            assert torch.equal(found, expected)  # what was decoded encodes to itself
        before = one.read_rows(block, torch.tensor(kept))
        one.write_rows(block, rows, torch.zeros_like(weights), state + 1)
        for found, expected in zip(one.read_rows(block, torch.tensor(kept)), before, strict=True):
            assert torch.equal(found, expected)
        other.write_rows(block, rows[:0], weights[:0], state[:0])
    ids = torch.tensor([0, 0])
    out = torch.full((2 * SIZES[0][1],), torch.nan)
    one.read(torch.tensor([[0, 0, 2, 0]]), ids, out)
    assert not out.any()  # also through caches
