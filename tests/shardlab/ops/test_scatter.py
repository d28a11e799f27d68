"""Rows copied to the places of their entries: native against reference, odd sizes, threads."""

from __future__ import annotations

import pytest
import torch

from shardlab.ops.blocks import Blocks, Encoding
from shardlab.ops.codecs import decode_rows, encode_rows
from shardlab.ops.rounding import Rounding
from shardlab.ops.scatter import scatter_rows, scatter_rows_reference
from shardlab.ops.unique import Segments, unique_segments
from shardlab.storage_bytes import payload_bytes

ROWS = (7, 1, 300)
COLUMNS = (5, 16, 70)


def _blocks() -> tuple[torch.Tensor, Blocks]:
    table, offset = [], 0
    for rows, columns in zip(ROWS, COLUMNS, strict=True):
        table.append([offset, columns * 4, 0, 0, columns, rows])
        offset += rows * columns * 4
    values = torch.randn(offset // 4, generator=torch.Generator().manual_seed(1))
    return values.view(torch.uint8), Blocks(torch.tensor(table))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("batch", [0, 1, 64])
def test_native_face_equals_the_reference(batch, threads, weighted):
    arena, blocks = _blocks()
    generator = torch.Generator().manual_seed(batch)
    ids = torch.cat([torch.randint(rows, (batch,), generator=generator) for rows in ROWS])
    first = [0, *torch.tensor(COLUMNS).cumsum(0).tolist()]
    chunks = torch.tensor([[s, s * batch, batch, first[s], first[-1]] for s in range(len(ROWS))])
    segments = Segments(torch.tensor(ROWS), torch.zeros(len(ROWS), dtype=torch.int64))
    uniques = unique_segments(ids, chunks, segments, positions=weighted)
    weights = torch.rand(ids.numel(), generator=generator)[uniques.positions] if weighted else None
    outs = [torch.full((batch, first[-1]), torch.nan) for _ in range(2)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        scatter_rows(arena, blocks, uniques, weights, outs[0].view(-1))
    finally:
        torch.set_num_threads(before)
    scatter_rows_reference(arena, blocks, uniques, weights, outs[1].view(-1))
    assert not outs[0].isnan().any()
    assert torch.equal(outs[0], outs[1])
    for s, rows in enumerate(ROWS):
        table = blocks.rows(arena, s)
        if not weighted and batch:
            assert torch.equal(outs[0][:, first[s]:first[s + 1]],
                               table[ids[s * batch:(s + 1) * batch]]), rows


@pytest.mark.parametrize("codec", ["fp16", "bf16", "fp8", "int8", "int4"])
@pytest.mark.parametrize("columns", [1, 15, 16, 40])
def test_rows_of_any_codec_arrive_as_fp32(codec, columns):
    rows, batch = 9, 21
    width = payload_bytes(codec, columns)
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns))
    arena = torch.empty(rows * width, dtype=torch.uint8)
    encode_rows(values, codec, arena.view(rows, width), Rounding(stochastic=False))
    blocks = Blocks.build(torch.tensor([[0, width, 0, 0, columns, rows]]), [Encoding(codec)])
    ids = torch.randint(rows, (batch,), generator=torch.Generator().manual_seed(3))
    uniques = unique_segments(ids, torch.tensor([[0, 0, batch, 0, columns]]),
                              Segments(torch.tensor([rows]), torch.tensor([0])))
    out = torch.full((batch, columns), torch.nan)
    scatter_rows(arena, blocks, uniques, None, out.view(-1))
    decoded = torch.empty(rows, columns)
    decode_rows(arena.view(rows, width), codec, decoded)
    assert torch.equal(out, decoded[ids])
    again = torch.full((batch, columns), torch.nan)
    scatter_rows_reference(arena, blocks, uniques, None, again.view(-1))
    assert torch.equal(out, again)
