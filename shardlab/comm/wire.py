"""What rows and gradients are on the wire: codecs of cells, and the bytes that were sent.

A cell is what one rank gets from one shard, or sends to it. Encoding and decoding of all cells of a
direction are one `move_rows` each, the same op that fills caches: rows are encoded while they are
read, in one pass, and gradients are rounded stochastically with random bits that follow from
(seed, step, table, row, column, source rank). Source: reduced-precision all-to-all as in
arXiv 2104.05158 section 4.4, with a scale per row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardlab.codecs import CODECS, rounding_key
from shardlab.comm.collectives import Work
from shardlab.ops.blocks import Blocks, Encoding
from shardlab.ops.moves import move_rows
from shardlab.ops.records import MoveEnd
from shardlab.ops.unique import fill_affine
from shardlab.storage_bytes import payload_bytes
from shardlab.wire_bytes import SCALED_GRADIENTS

_FP32_BYTES = 4
#: Streams of random bits: away from those of updates and write-backs, one per rank and backward.
_STREAM, _RANK_STREAMS = 1 << 40, 1 << 20


@dataclass(frozen=True)
class CellKind:
    """What does not change about a cell.

    Attributes:
        codec: a key of `shardlab.codecs.CODECS`.
        columns: elements of a row.
        table_key, first_column: random bits follow from these.
        stochastic: rounds stochastically, else to nearest.
    """

    codec: str
    columns: int
    table_key: int = 0
    first_column: int = 0
    stochastic: bool = False


class WireCodec:
    """Encodes and decodes the cells of one direction at one end of the wire.

    Args:
        kinds: of every cell.
    """

    def __init__(self, kinds: Sequence[CellKind]) -> None:
        #: int64 [cells] on CPU.
        self.columns = _column([kind.columns for kind in kinds])
        self.numbers = _column([CODECS[kind.codec] for kind in kinds])
        self.vector_bytes = _column([payload_bytes(kind.codec, kind.columns) for kind in kinds])
        #: Nothing is encoded: cells are fp32.
        self.is_plain = all(kind.codec == "fp32" for kind in kinds)
        self._fp32 = _encodings([Encoding() for _ in kinds])
        #: Of `Blocks`: how cells are encoded.
        self.coded = _encodings([Encoding(kind.codec, col_start=kind.first_column,
                                           table_key=kind.table_key, stochastic=kind.stochastic)
                                  for kind in kinds])

    def coded_end(self, buffer: Tensor, at: Tensor, counts: Tensor, places: Tensor) -> MoveEnd:
        """Encoded cells as an end of `move_rows`: block i is cell i.

        Args:
            buffer: uint8.
            at: int64 [cells] on CPU, byte where a cell begins.
            counts: int64 [cells] on CPU, its rows.
            places: int64, as in `MoveEnd`.
        """
        return MoveEnd(buffer, Blocks(self._table(at, self.vector_bytes, counts), self.coded),
                       places)

    def encode(self, values: Tensor, start: Tensor, counts: Tensor, out: tuple[Tensor, Tensor],
               random: tuple[int, Tensor | None] = (0, None),
               chosen: tuple[Tensor, Tensor] | None = None) -> None:
        """Encodes fp32 rows.

        Args:
            values: fp32, flat.
            start: int64 [cells] on CPU: element where a cell's rows begin, densely.
            counts: int64 [cells] on CPU.
            out: (uint8 buffer, int64 [cells] on CPU: byte where every cell begins).
            random: (key, int64 [sum of counts]: row of the table of every row, cell by cell).
            chosen: (int64 [sum of counts]: which row of its cell's is encoded, cell by cell;
                int64 [cells] on CPU: how many rows cells have); None: all of them.
        """
        segments, places = _whole_cells(counts, values.device)
        source, have = (places, counts) if chosen is None else chosen
        move_rows(self._plain_end(values, start, have, source),
                  self.coded_end(*out, counts, places), segments, *random)

    def decode(self, buffer: Tensor, at: Tensor, counts: Tensor, out: Tensor,
               start: Tensor) -> None:
        """Decodes cells to fp32 rows; arguments as those of `encode`, the other way round."""
        segments, places = _whole_cells(counts, out.device)
        move_rows(self.coded_end(buffer, at, counts, places),
                  self._plain_end(out, start, counts, places), segments)

    def _plain_end(self, values: Tensor, start: Tensor, counts: Tensor,
                   places: Tensor) -> MoveEnd:
        table = self._table(start * _FP32_BYTES, self.columns * _FP32_BYTES, counts)
        return MoveEnd(values.view(torch.uint8), Blocks(table, self._fp32), places)

    def _table(self, at: Tensor, step: Tensor, counts: Tensor) -> Tensor:
        """Blocks without states: (offset, step, offset, 0, columns, rows)."""
        return torch.stack([at, step, at, torch.zeros_like(at), self.columns, counts], 1)


def _column(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _encodings(encodings: list[Encoding]) -> Tensor:
    return _column([encoding.numbers() for encoding in encodings]).view(-1, 8)  # type: ignore[misc]


def _whole_cells(counts: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """(segments, places) of `move_rows` for cells whose rows lie one behind the other."""
    cells = torch.arange(counts.numel())
    starts = counts.cumsum(0) - counts
    segments = torch.stack([cells, cells, starts, counts], 1)
    pieces = torch.stack([starts, counts, torch.zeros_like(counts), torch.ones_like(counts)], 1)
    return segments, fill_affine(pieces, int(counts.sum()), device)


# ---------------------------------------------------------------- gradients
def gradient_key(seed: int, step: int, rank: int, number: int) -> int:
    """Key of the random bits of gradients.

    Args:
        seed: of the run.
        step: optimiser steps taken.
        rank: that rounds.
        number: of the backward since that step.
    """
    return rounding_key(seed, step, _STREAM + rank * _RANK_STREAMS + number)


def scale_limit(codecs: Sequence[str]) -> int | None:
    """log2 of what scaled gradients of these codecs may reach; None: none needs a scale."""
    limits = [SCALED_GRADIENTS[codec] for codec in codecs if codec in SCALED_GRADIENTS]
    return min(limits, default=None)


def gradient_scale(grad: Tensor, most: Tensor | float, limit: int,
                   beside: Sequence[Tensor] = ()) -> float:
    """Power of two that gradients are multiplied by before they are encoded.

    All codecs but fp32 and bf16 hold a part of fp32's exponents only, and gradients of a mean over
    some thousand samples lie at the lower end of it or below. The largest sum that can occur, of
    ``most`` terms as large as the largest, is put just below the codec's largest.

    Args:
        grad: fp32, of the tables' output.
        most: bound of the weights' sum over the entries of any one row.
        limit: of `scale_limit`.
        beside: fp32, added to the sums.

    Returns:
        The scale; NaN where ``grad`` holds an infinity or a NaN, so that no codec saturates it
        to something finite: the receiver's gradients are then all NaN.
    """
    return scale_for(gradient_bound(grad, most, beside), limit)


def gradient_bound(grad: Tensor, most: Tensor | float, beside: Sequence[Tensor] = ()) -> float:
    """Bound of any sum of gradients; arguments as of `gradient_scale`."""
    largest = 0.0
    if grad.numel():
        low, high = torch.aminmax(grad)  # one pass without a copy; a NaN stays one
        largest = float(torch.maximum(-low, high) * most)
    return largest + max((float(part.abs().max()) for part in beside if part.numel()),
                         default=0.0)


def scale_for(largest: float, limit: int) -> float:
    """The scale of `gradient_scale` for sums of at most ``largest``."""
    if largest != largest or largest == float("inf"):
        return float("nan")
    # An exponent of fp32; its own inverse must be one, too.
    exponent = limit - torch.frexp(torch.tensor(largest)).exponent.item() if largest else 0
    return 2.0 ** max(-126, min(126, int(exponent)))


class Then(Work):
    """A collective, and what is to be done with its result.

    Args:
        work: the collective.
        then: runs once, after it.
    """

    def __init__(self, work: Work, then: Callable[[], None]) -> None:
        self._first, self._then = work, then
        self._done = False

    def wait(self) -> None:
        """Blocks until the result is there and dealt with."""
        if not self._done:
            self._first.wait()
            self._then()
            self._done = True
