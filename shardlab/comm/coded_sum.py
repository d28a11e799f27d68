"""Adding up over ranks in a codec: gradients of the dense part on slow links.

A vector lies in spans of 256 elements (`shardlab.ops.spans`), and every rank owns a piece of them:

    every rank encodes the spans of others' pieces       --scatter-->   owners decode, add in fp32
    all decode all pieces, and so hold the same bits     <--gather--    owners encode the sums

A rank's own share of its own piece is never rounded. Of B encoded bytes a rank sends 2 (W - 1) / W,
as with a ring in fp32, and every element is rounded once on its way to its owner, by each of W - 1
ranks, and once on its way back. Source: own; reduce-scatter and all-gather are the standard ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from shardlab.codecs import rounding_key
from shardlab.comm.collectives import Work
from shardlab.comm.faults import naming
from shardlab.comm.groups import Groups
from shardlab.comm.host_lanes import sum_lanes
from shardlab.comm.lanes import Finish, Lane
from shardlab.comm.ordered_sum import piece_edges
from shardlab.comm.shared_sum import HostSum
from shardlab.comm.worker import LaneWorker
from shardlab.ops.rounding import Rounding
from shardlab.ops.spans import decode_spans, encode_spans
from shardlab.wire_bytes import FP32_BYTES, SPAN_ELEMENTS, span_bytes

#: Streams of random bits, away from those of updates, write-backs and rows' gradients: two a rank
#: (to owners, from owners), one per backward in each.
_STREAM, _RANK_STREAMS = 1 << 41, 1 << 20


@dataclass(frozen=True)
class Draw:
    """Where random bits of rounding come from; the same on every rank.

    Attributes:
        seed: of the run.
        step: optimiser steps taken.
        number: of the backward since that step.
        first_span: number of the vector's first span, among all that a backward sends.
    """

    seed: int = 0
    step: int = 0
    number: int = 0
    first_span: int = 0

    def at(self, first_span: int) -> Draw:
        """For a vector whose first span has another number."""
        return replace(self, first_span=first_span)

    def rounding(self, rank: int, back: bool, span: int, stochastic: bool) -> Rounding:
        """Of spans from ``span`` on that ``rank`` sends to their owners, or back as their owner."""
        stream = _STREAM + (2 * rank + back) * _RANK_STREAMS + self.number
        return Rounding(stochastic, rounding_key(self.seed, self.step, stream),
                        self.first_span + span)


class SpanSum(Protocol):
    """A way to add up spans."""

    def start(self, spans: Tensor, draw: Draw, factor: float) -> Finish:
        """Starts adding up fp32 spans [n, 256] over all ranks, in place; the sum is multiplied by
        ``factor``. Every rank does, in the same order, and waits in this order."""

    def sent_bytes(self, spans: int) -> int:
        """Bytes that this rank sends to others to add up so many spans."""


@dataclass(frozen=True)
class CodedSum:
    """Adds up over some ranks in a codec.

    Attributes:
        scatter, gather: lanes for the two directions; may be one where ``worker`` is None.
        rank, world_size: of the lanes.
        codec: a key of `shardlab.wire_bytes.SPAN_LIMITS`.
        stochastic: rounds stochastically, else to nearest.
        worker: adds up and sends the sums while the backward goes on; None: the wait does.
    """

    scatter: Lane
    gather: Lane
    rank: int
    world_size: int
    codec: str
    stochastic: bool
    worker: LaneWorker | None = None

    def start(self, spans: Tensor, draw: Draw, factor: float) -> Finish:
        """As of `SpanSum`."""
        piece = _Piece(self, spans, draw, factor)
        arrived = piece.scatter()

        def add_up() -> Finish:
            arrived()
            return piece.gather()

        if self.worker is None:
            return lambda: piece.take(add_up())
        gathering = self.worker.submit(add_up)
        return lambda: piece.take(gathering.result())

    def sent_bytes(self, spans: int) -> int:
        """As of `SpanSum`."""
        edges = piece_edges(spans, self.world_size)
        own = edges[self.rank + 1] - edges[self.rank]
        return (spans - own + (self.world_size - 1) * own) * span_bytes(self.codec)


class _Piece:
    """One sum under way, on one rank.

    Args:
        way: the lanes and the codec.
        spans, draw, factor: as of `SpanSum.start`.
    """

    def __init__(self, way: CodedSum, spans: Tensor, draw: Draw, factor: float) -> None:
        self._way, self._spans, self._draw, self._factor = way, spans, draw, factor
        edges = piece_edges(len(spans), way.world_size)
        self._begin, self._end = edges[way.rank], edges[way.rank + 1]
        size, own = span_bytes(way.codec), self._end - self._begin
        # What stays here is no part of a collective.
        away = [r != way.rank for r in range(way.world_size)]
        self._theirs = [size * (edges[r + 1] - edges[r]) * far for r, far in enumerate(away)]
        self._mine = [size * own * far for far in away]
        self._away = spans.new_empty(len(spans) - own, size, dtype=torch.uint8)
        self._arrived = spans.new_empty(way.world_size - 1, own, size, dtype=torch.uint8)

    def scatter(self) -> Finish:
        """Sends this rank's share of the others' pieces."""
        way = self._way
        for first, end, place in ((0, self._begin, 0), (self._end, len(self._spans), self._begin)):
            encode_spans(self._spans[first:end], way.codec,
                         self._away[place:place + end - first],
                         self._draw.rounding(way.rank, False, first, way.stochastic))
        return way.scatter.all_to_all(self._arrived.view(-1), self._away.view(-1), self._mine,
                                      self._theirs)

    def gather(self) -> Finish:
        """Adds up what has come, the own share first, then by rank, and sends the sum to all."""
        way, own = self._way, self._spans[self._begin:self._end]
        for part in self._arrived:
            decode_spans(part, way.codec, own, add=True)
        sums = torch.empty_like(self._arrived)
        encode_spans(own, way.codec, sums[0],
                     self._draw.rounding(way.rank, True, self._begin, way.stochastic))
        sums[1:] = sums[0]
        decode_spans(sums[0], way.codec, own, factor=self._factor)
        return way.gather.all_to_all(self._away.view(-1), sums.view(-1), self._theirs, self._mine)

    def take(self, come: Finish) -> None:
        """Decodes the others' pieces once they are here."""
        come()
        codec, begin = self._way.codec, self._begin
        decode_spans(self._away[:begin], codec, self._spans[:begin], factor=self._factor)
        decode_spans(self._away[begin:], codec, self._spans[self._end:], factor=self._factor)


@dataclass(frozen=True)
class StagedSum:
    """Adds up over hosts: in fp32 through the memory of each, in a codec between them.

    A host's sum is rounded as that of one rank, whose number is the host's.

    Attributes:
        hosts: lanes and codec between ranks of this number on all hosts.
        inside: of this host.
    """

    hosts: CodedSum
    inside: HostSum

    def start(self, spans: Tensor, draw: Draw, factor: float) -> Finish:
        """As of `SpanSum`."""
        def over_hosts(piece: Tensor, begin: int) -> None:
            if not piece.numel():  # as on all ranks of this number
                return
            self.hosts.start(piece.view(-1, SPAN_ELEMENTS),
                             draw.at(draw.first_span + begin // SPAN_ELEMENTS), factor)()

        return self.inside.start(spans, over_hosts, SPAN_ELEMENTS)

    def sent_bytes(self, spans: int) -> int:
        """As of `SpanSum`."""
        size, place = self.inside.ranks_per_host, self.inside.place
        edges = piece_edges(spans, size)
        own = edges[place + 1] - edges[place]
        inside = (spans - own + (size - 1) * own) * SPAN_ELEMENTS * FP32_BYTES
        return inside + self.hosts.sent_bytes(own)


def open_span_sum(groups: Groups, codec: str, rounding: str) -> SpanSum:
    """The way that these ranks add up spans; every rank must call it, in the same order.

    Through shared memory all goes over the `sums` lane; between hosts that have two stages, only a
    host's sums cross in the codec; else over two lanes of their own.
    """
    stochastic = rounding == "stochastic"
    if groups.stages is not None and groups.stages.sums is not None:
        stages, inside = groups.stages, groups.stages.sums
        column = range(stages.place, groups.world_size, stages.ranks_per_host)
        lanes = sum_lanes(groups, column)
        return StagedSum(CodedSum(*lanes, stages.host, stages.hosts, codec, stochastic), inside)
    lanes = (groups.sums, groups.sums) if groups.sums is not None else \
        sum_lanes(groups, range(groups.world_size))
    # NCCL's waits only order streams; ranks that share memory wait for copies, which are work.
    alone = groups.sums is not None or groups.worker is None
    return CodedSum(*lanes, groups.rank, groups.world_size, codec, stochastic,
                    None if alone else LaneWorker())


def start_span_sum(way: SpanSum, spans: Tensor, draw: Draw, groups: Groups) -> Work:
    """Starts to make fp32 spans [n, 256] their mean over all ranks, in place, in a codec.

    Args:
        way: of `open_span_sum`.
        spans: contiguous; must be left alone until the wait.
        draw: where random bits come from.
        groups: the ranks.

    Raises:
        ExchangeError: (here or in the wait) a rank ended, stalled or cannot be reached.
    """
    with naming(groups, "dense", "all_reduce"):
        done = way.start(spans, draw, 1 / groups.world_size)

    def finish() -> None:
        with naming(groups, "dense", "all_reduce"):
            done()

    return Work(finish)
