"""Decisions from outside the index: the same utilities, rows and cells as the index leaves."""

from __future__ import annotations

import pytest
import torch

from shardlab.chunk_layout import ChunkLayout
from shardlab.codecs import rounding_key, table_key
from shardlab.ops.chunk_decay import ChunkGrid, Decisions, redecay, redecide
from shardlab.ops.chunk_index import ChunkRows, StoreShape
from shardlab.ops.chunks import NativeChunkIndex, index_span_bytes
from shardlab.ops.chunks_reference import ReferenceChunkIndex
from shardlab.ops.registry import native

ROWS, CHUNKS, FIRST_ROW, FIRST_CHUNK, OF_ROW = 200, 3, 1000, 3, 9


def build(face: str, *, wide: bool) -> NativeChunkIndex | ReferenceChunkIndex:
    layout = ChunkLayout(CHUNKS, 8, 4, 2, key_bytes=8 if wide else 4)
    shape = StoreShape(layout, 16, 4 * ROWS * CHUNKS, 4 * ROWS, wide)
    blocks = torch.tensor([[0, FIRST_ROW, FIRST_CHUNK, OF_ROW, table_key("t"), -1, 0]])
    if face == "reference":
        return ReferenceChunkIndex([shape], blocks)
    if native() is None:
        pytest.skip("the native library is not built")
    return NativeChunkIndex([shape], blocks, torch.zeros(index_span_bytes([shape]),
                                                         dtype=torch.uint8), [(0, 0)])


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("face", ["native", "reference"])
def test_decisions_are_those_of_the_index(face: str, wide: bool,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    if face == "reference":
        monkeypatch.setenv("SHARDLAB_FACE", "reference")
    generator = torch.Generator().manual_seed(7)
    index = build(face, wide=wide)
    ids = torch.randperm(1 << 20, generator=generator)[:ROWS].sort().values * (1 << 40 if wide
                                                                               else 1)
    here = torch.rand(ROWS, CHUNKS, generator=generator) < 0.7
    scale = 2.0 ** torch.randint(-60, 20, (ROWS, CHUNKS), generator=generator)
    values = torch.rand(ROWS, CHUNKS, generator=generator) * scale
    codes = (values.view(torch.int32) >> 16).to(torch.int16)
    codes[::5] = 0
    places = torch.full_like(codes, -1, dtype=torch.int32)
    places[here] = torch.arange(int(here.sum()), dtype=torch.int32)
    index.load(0, torch.zeros(ROWS, dtype=torch.int64), ChunkRows(ids, places, codes))
    cells = torch.randint(0, 256, index.sketch(0).shape, generator=generator).to(torch.uint8)
    cells[::3] = 0
    index.sketch(0).copy_(cells)
    codes = torch.where(here, codes, -1).to(torch.int16)
    grid = ChunkGrid(FIRST_CHUNK, OF_ROW, table_key("t"))
    for step, (decay, limit) in enumerate([(0.9, 0.0), (0.37, 1e-15), (1.0, 2.0 ** -50),
                                           (0.5, 0.01), (0.999, 3.0)]):
        key = rounding_key(3, step)
        limits = torch.tensor([limit])
        index.clear_marks(0)
        index.decide(0, decay, limits, key)
        changed = index.changed_lines(0)
        decision = Decisions(torch.tensor([decay]), limits, torch.tensor([key]))
        codes = redecide(codes, ids + FIRST_ROW, grid, decision)
        cells = redecay(cells, decision)
        found = index.look_up(0, ids)
        assert torch.equal(codes, torch.where(found.places >= 0, found.utilities, -1))
        same = torch.ones(len(cells) // 64, dtype=torch.bool)
        same[changed] = False  # lines that count chunks which went
        mine = index.sketch(0)
        assert torch.equal(cells.view(-1, 64)[same], mine.view(-1, 64)[same])
        cells = mine.clone()
    assert 0 < int((codes >= 0).sum()) < int(here.sum())


@pytest.mark.parametrize("rows", [0, 1, 77])
def test_faces_agree_on_many_decisions(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(0, 1 << 62, (rows,), generator=generator)
    codes = torch.randint(-1, 1 << 14, (rows, 4), generator=generator).to(torch.int16)
    cells = torch.randint(0, 256, (64 * rows,), generator=generator).to(torch.uint8)
    grid, count = ChunkGrid(4, 8, table_key("a")), 30
    decisions = Decisions(torch.rand(count, generator=generator) * 0.3 + 0.7,
                          2.0 ** -torch.randint(40, 90, (count,), generator=generator).float(),
                          torch.tensor([rounding_key(1, step) for step in range(count)]))
    mine = redecide(codes, ids, grid, decisions), redecay(cells, decisions)
    monkeypatch.setenv("SHARDLAB_FACE", "reference")
    plain = redecide(codes, ids, grid, decisions), redecay(cells, decisions)
    assert all(map(torch.equal, mine, plain))
    none = Decisions(*(tensor[:0] for tensor in vars(decisions).values()))
    assert torch.equal(redecide(codes, ids, grid, none), codes)
    if rows > 1:
        assert 0 < int((mine[0] >= 0).sum()) < int((codes >= 0).sum())
