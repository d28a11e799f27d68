"""Rows of unique ids, each read once and copied to every place that asked for it. Source: own."""

from __future__ import annotations

import torch
from torch import Tensor

from shardlab.ops.blocks import Blocks
from shardlab.ops.records import Records
from shardlab.ops.registry import address, face_of, native
from shardlab.ops.unique import Uniques


def scatter_rows(arena: Tensor, blocks: Blocks, uniques: Uniques, weights: Tensor | None,
                 out: Tensor) -> None:
    """Copies rows of any codec, as fp32, to the places of their entries.

    Args:
        arena: uint8.
        blocks: where the shards lie; segment s of ``uniques`` are rows of block s.
        uniques: rows to read; entry k goes to out[sources[k]:][:columns].
        weights: fp32 [k] per entry, or None.
        out: fp32, flat.
    """
    if face_of("scatter_rows", out.device.type) == "native":
        native().scatter(address(arena), address(blocks.table),  # type: ignore[union-attr]
                         address(blocks.encodings), blocks.table.shape[0], address(uniques.ids),
                         address(uniques.splits), address(uniques.starts),
                         address(uniques.sources), address(weights), address(out),
                         torch.get_num_threads())
    else:
        scatter_rows_reference(arena, blocks, uniques, weights, out)


def scatter_rows_reference(arena: Tensor, blocks: Blocks, uniques: Uniques,
                           weights: Tensor | None, out: Tensor) -> None:
    """Plain-torch face of `scatter_rows`."""
    splits = uniques.splits.tolist()
    for block in range(blocks.table.shape[0]):
        edges = uniques.starts[splits[block]:splits[block + 1] + 1]
        begin, end = int(edges[0]), int(edges[-1])
        ids = uniques.ids[splits[block]:splits[block + 1]]
        rows = Records(arena, blocks, block, ids).read_rows()
        rows = torch.repeat_interleave(rows, edges.diff(), dim=0)
        if weights is not None:
            rows = rows * weights[begin:end, None]
        columns_at = torch.arange(rows.shape[1], device=out.device)
        out[uniques.sources[begin:end, None] + columns_at] = rows
