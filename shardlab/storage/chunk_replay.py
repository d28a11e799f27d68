"""Rows of a pruned table from a full checkpoint and from what changed since.

    base      rows that were there, with utilities
    gone      rows of it that vanished
    decisions taken again on the others: utilities decay, chunks go
    changed   rows as they are now, in place of all that

Source: own; see `shardlab.storage.chunk_changes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardlab.chunk_layout import LINE_BYTES
from shardlab.codecs import table_key
from shardlab.ops.chunk_decay import ChunkGrid, Decisions, redecay, redecide
from shardlab.storage.base import TableChunk

#: What a shard's first incremental chunk has for readers alone.
_DECISIONS = ("decays", "limits", "keys")
_OWN = ("gone", "sketch_lines", "sketch_cells", "utilities", "row_states", *_DECISIONS)
_ROWS = "rows"


def is_head(chunk_extra: Iterable[str]) -> bool:
    """Whether a chunk with such extra tensors tells what changed in a whole shard."""
    return "gone" in chunk_extra


@dataclass(frozen=True)
class ChangedShard:
    """What changed in a shard of a pruned table.

    Attributes:
        columns: of the whole table.
        head: its first incremental chunk, without rows.
    """

    columns: int
    head: TableChunk

    def lay_over(self, below: TableChunk, above: Iterable[TableChunk]) -> Iterator[TableChunk]:
        """A chunk of the base as it is now, in pieces.

        Args:
            below: of the base.
            above: chunks of changed rows that touch it, in order of rows.
        """
        first, end = below.row_start, below.row_start + below.num_rows
        parts = self._decided(below)
        extra = {name: value for name, value in self.head.extra.items() if name not in _OWN}
        if first != self.head.row_start:
            extra = {name: extra[name] for name in below.extra if name in extra}
        elif "sketch_lines" in self.head.extra:
            extra["sketch"] = self._sketch(below.extra["sketch"])
        for chunk in above:
            last = min(end, chunk.row_start + chunk.num_rows)
            yield _merged(below, parts, _parts(chunk), (first, last), extra)
            extra = {name: extra[name] for name in chunk.extra if name in extra}
            first = last
        if first < end:
            yield _merged(below, parts, None, (first, end), extra)

    @property
    def _decisions(self) -> Decisions:
        return Decisions(*(self.head.extra[name] for name in _DECISIONS))

    def _sketch(self, below: Tensor) -> Tensor:
        """The store's sketch: that of the base, decayed, and lines that changed."""
        extra = self.head.extra
        cells = redecay(below, self._decisions).view(-1, LINE_BYTES)
        cells[extra["sketch_lines"]] = extra["sketch_cells"]
        return cells.flatten()

    def _decided(self, below: TableChunk) -> dict[str, Tensor]:
        """Tensors of rows of the base, by name, after the decisions since."""
        parts, extra = _parts(below), self.head.extra
        stay = ~torch.isin(parts[_ROWS], extra["gone"] + self.head.row_start)
        parts = {name: value[stay] for name, value in parts.items()}
        codes = parts["extra/utilities"]
        chunks, columns = codes.shape[1], below.weights.shape[1]
        width = columns // chunks
        grid = ChunkGrid(below.col_start // width, self.columns // width, table_key(below.table))
        codes = redecide(codes, parts[_ROWS], grid, self._decisions)
        went = (codes < 0) & (parts["extra/utilities"] >= 0)
        if not bool(went.any()):
            return parts | {"extra/utilities": codes}
        stay = (codes >= 0).any(1)
        parts = {name: value[stay] for name, value in parts.items()}
        parts["extra/utilities"], went = codes[stay], went[stay]
        for name, value in parts.items():
            if value.dim() == 2 and value.is_floating_point():
                parts[name] = value.view(len(value), chunks, value.shape[1] // chunks).masked_fill(
                    went[:, :, None], 0.0).flatten(1)
        if "extra/row_states" in parts:
            (name,) = (name for name, value in parts.items()
                       if value.dim() == 1 and value.is_floating_point())
            parts[name] = mean_of_chunks(parts["extra/row_states"])
        return parts


def mean_of_chunks(states: Tensor) -> Tensor:
    """fp32 [n]: a row's state as other storages take it, of its present chunks' [n, chunks]."""
    return states.sum(1) / (states != 0).sum(1).clamp(min=1)


def fill_absent(weights: Tensor, codes: Tensor, absent: Tensor) -> Tensor:
    """fp32 [n, columns]: absent chunks, of int16 [n, chunks] < 0, as they read: fp32 [columns]."""
    there = (codes >= 0).repeat_interleave(absent.numel() // codes.shape[1], 1)
    return torch.where(there, weights, absent)


def _parts(chunk: TableChunk) -> dict[str, Tensor]:
    """Tensors with an entry a row, rows as numbers in the table."""
    assert chunk.present is not None
    return {_ROWS: chunk.present + chunk.row_start, "weights": chunk.weights,
            **{f"state/{name}": value for name, value in chunk.state.items()},
            **{f"extra/{name}": chunk.extra[name] for name in ("utilities", "row_states")
               if name in chunk.extra}}


def _merged(below: TableChunk, parts: dict[str, Tensor], above: dict[str, Tensor] | None,
            span: tuple[int, int], extra: dict[str, Tensor]) -> TableChunk:
    """Rows [first, last) of the base, with the changed ones in their place."""
    parts = _cut(parts, *span)
    if above is not None:
        above = _cut(above, *span)
        stay = ~torch.isin(parts[_ROWS], above[_ROWS])
        order = torch.cat([parts[_ROWS][stay], above[_ROWS]]).argsort()
        parts = {name: torch.cat([value[stay], above[name]])[order]
                 for name, value in parts.items()}
    if "absent" in extra:
        parts["weights"] = fill_absent(parts["weights"], parts["extra/utilities"], extra["absent"])
    return replace(
        below, row_start=span[0], weights=parts["weights"], present=parts[_ROWS] - span[0],
        span=span[1] - span[0], state={name: parts[f"state/{name}"] for name in below.state},
        extra=extra | {name: parts[f"extra/{name}"] for name in ("utilities", "row_states")
                       if f"extra/{name}" in parts})


def _cut(parts: dict[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
    low, high = torch.searchsorted(parts[_ROWS], torch.tensor([first, last])).tolist()
    return {name: value[low:high] for name, value in parts.items()}
