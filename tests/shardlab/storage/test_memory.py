"""Honest memory: what the system gave for a table, everything counted, against fp32."""

from __future__ import annotations

import ctypes
import mmap
import sys

import pytest
import torch

from shardlab.specs import EmbeddingBagConfig
from shardlab.storage import LocalShard, StorageOptions
from shardlab.storage.levels import MemoryHome
from shardlab.storage.rows import RowsStorage
from shardlab.storage_text import parse_storage
from shardlab.table_plan import Shard

ROWS = 300_000
PAGE = mmap.PAGESIZE
INT8 = {"levels": [{"fraction": 0.05}, {"dtype": "int8"}]}
INT4 = {"levels": [{"fraction": 0.01}, {"dtype": "int4"}]}


def _storage(spec, dim, optimizer="sgd"):
    shard = LocalShard(EmbeddingBagConfig(ROWS, dim, "t"), Shard(0, 0, ROWS, 0, dim),
                       parse_storage(spec, "here"), False)
    return RowsStorage([shard], StorageOptions(optimizer, 5, torch.device("cpu"), None))


def _tensors(storage):
    """Everything that a storage without a disk holds: arenas and indices."""
    homes = [home.arena.data for home, _ in storage.chains.homes if isinstance(home, MemoryHome)]
    found = [storage.chains.near.data, *homes,
             *(cache.index.meta for cache in storage.chains.caches)]
    return {tensor.data_ptr(): tensor for tensor in found}.values()


def _resident(tensors):
    """Bytes of the pages of these tensors that the system holds in memory (mincore(2))."""
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    total = 0
    for tensor in tensors:
        first = tensor.data_ptr() // PAGE * PAGE
        pages = -(-(tensor.data_ptr() + tensor.numel() - first) // PAGE)
        held = ctypes.create_string_buffer(pages)
        assert mincore(first, pages * PAGE, held) == 0
        total += sum(byte & 1 for byte in held.raw) * PAGE
    return total


def _touch_everything(storage):
    """Every row is read: slots fill up, and what can become resident does."""
    out = torch.empty(20_000 * storage.shards[0].shard.columns)
    for first in range(0, ROWS, 20_000):
        rows = torch.arange(first, min(ROWS, first + 20_000))
        storage.read(torch.tensor([[0, 0, rows.numel(), 0]]), rows, out)


@pytest.mark.parametrize(("spec", "dim", "smaller"), [
    ("fp16", 16, 2.0), ("fp16", 64, 2.0), ("bf16", 64, 2.0),
    (INT8, 16, 3.0), (INT8, 64, 3.2), (INT4, 16, 6.0), (INT4, 64, 7.0),
], ids=["fp16 16", "fp16 64", "bf16 64", "int8 + 5 % 16", "int8 + 5 % 64", "int4 + 1 % 16",
        "int4 + 1 % 64"])
def test_a_table_is_as_much_smaller_as_promised(spec, dim, smaller):
    """Scales, caches, tags and counters included; the optimiser's state is apart (SGD has none)."""
    storage = _storage(spec, dim)
    _touch_everything(storage)
    counted = storage.tier_bytes().total
    assert ROWS * dim * 4 / counted >= smaller
    arenas = [arena for arena in (storage.chains.near,) if arena.used_bytes]
    allocated = sum(arena.used_bytes for arena in arenas) + sum(
        tensor.numel() for tensor in _tensors(storage)
        if tensor.data_ptr() != storage.chains.near.data.data_ptr())
    assert allocated == counted


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is resident")
@pytest.mark.parametrize(("spec", "dim"), [("fp32", 16), ("fp16", 16), (INT8, 64), (INT4, 64)],
                         ids=["fp32", "fp16", "int8 + 5 %", "int4 + 1 %"])
def test_the_system_gave_what_was_counted(spec, dim):
    """Resident memory after every row was touched; beyond it, a huge page at each end and the
    staging rows of the largest batch."""
    storage = _storage(spec, dim, "row_wise_adagrad")
    _touch_everything(storage)
    counted, resident = storage.tier_bytes().total, _resident(_tensors(storage))
    staged = 20_000 * (dim * 4 + 4) if storage.chains.caches else 0
    assert 0.99 * counted <= resident <= counted + staged + 4 * (2 << 20)
