"""Rows copied to the places of their entries: native against reference, odd sizes, threads."""

from __future__ import annotations

import pytest
import torch

from shardlab.ops.rows import Blocks
from shardlab.ops.scatter import scatter_rows, scatter_rows_reference
from shardlab.ops.unique import Segments, unique_segments

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
