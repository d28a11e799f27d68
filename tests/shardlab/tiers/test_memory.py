"""Arenas: their size, their zeros, and that untouched pages cost nothing."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from shardlab.tiers import allocate

CPU = torch.device("cpu")
PAGE_BYTES = 4096


@pytest.mark.parametrize("size", [0, 1, 4, 4097, 3 << 20])
def test_arena_is_zero_writable_bytes(size):
    arena = allocate(size, CPU)
    assert (arena.dtype, arena.shape) == (torch.uint8, (size,))
    assert not arena.any()
    arena.fill_(7)
    assert int(arena.long().sum()) == 7 * size


def test_arena_lives_as_long_as_its_views():
    view = allocate(1 << 20, CPU)[:4096].view(torch.float32)
    gc.collect()
    view.fill_(1.5)
    assert float(view.sum()) == 1536.0


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc/self/statm")
def test_untouched_pages_take_no_memory():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES

    before = resident()
    arena = allocate(1 << 32, CPU)
    arena[123_456_789] = 1
    assert resident() - before < 64 << 20
    assert int(arena[123_456_789]) == 1
