"""Buckets of dense gradients: what travels together, and which ranks have a gradient at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shardlab.comm import Groups, Work, start_all_reduce
from shardlab.comm.coded_sum import Draw, SpanSum, start_span_sum
from shardlab.errors import ShardLabError
from shardlab.wire_bytes import SPAN_ELEMENTS

#: Between CPU hosts a bucket travels while the rest of the backward runs: 512 KiB take 4 ms at
#: 1 Gbit/s, far more than a message costs. Ranks that share memory copy it, which hides behind
#: nothing: there a bucket fills the rings. On GPUs only the first is small, to start early.
_HOST_BUCKET_BYTES, _SHARED_BUCKET_BYTES = 512 << 10, 2 << 20
_SMALL_BUCKET_BYTES, _BUCKET_BYTES = 1 << 20, 25 << 20
#: Gradients start on a cache line of fp32; in a codec, in a span of their own.
_ALIGN_ELEMENTS = 16


@dataclass(frozen=True)
class Coding:
    """What a bucket needs to travel in a codec.

    Attributes:
        way: adds up spans over ranks.
        marks: fp32 [parameters]; others add them up.
        first_span: number of the bucket's first span.
    """

    way: SpanSum
    marks: Tensor
    first_span: int


class Bucket:
    """Gradients of some parameters side by side, and for each a mark that it has one.

    Args:
        parameters: of one dtype.
        groups: the ranks.
        coding: how gradients travel; None: by all-reduce, marks behind them.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], groups: Groups,
                 coding: Coding | None) -> None:
        self.parameters, self._groups, self._coding = parameters, groups, coding
        places, end = [], 0
        for parameter in parameters:
            places.append(end)
            end += aligned(parameter, coding is not None)
        self._flat = torch.zeros(end + len(parameters) * (coding is None),
                                 dtype=parameters[0].dtype, device=groups.device)
        self._gradients = self._flat[:end]
        self._marks = self._flat[end:] if coding is None else coding.marks
        self._views = {p: self._flat.as_strided(p.shape, torch.empty_like(p).stride(), place)
                       for p, place in zip(parameters, places, strict=True)}
        self._arrived: set[Tensor] = set()
        self._missing: list[int] = []
        self._work: Work | None = None
        # Codecs know fp32; the bucket itself where it is.
        self._spans = self._gradients.float().view(-1, SPAN_ELEMENTS) if coding else None

    @property
    def complete(self) -> bool:
        """Whether every gradient of this backward pass is here."""
        return len(self._arrived) == len(self.parameters)

    @property
    def coded_bytes(self) -> int:
        """Bytes that this rank sends in a codec, in a backward pass."""
        if self._coding is None or self._spans is None:
            return 0
        return self._coding.way.sent_bytes(len(self._spans))

    def take(self, parameter: Tensor) -> None:
        """Moves a parameter's gradient into the bucket."""
        view, gradient = self._views[parameter], parameter.grad  # type: ignore[index]
        assert gradient is not None
        if gradient.is_sparse:
            raise ShardLabError(
                f"a dense parameter of shape {list(parameter.shape)} has a sparse gradient; hold "
                "tables in an EmbeddingBagCollection, or build the module with sparse=False")
        if gradient.data_ptr() != view.data_ptr():
            view.copy_(gradient)
            parameter.grad = view
        self._arrived.add(parameter)

    def start(self, draw: Draw) -> None:
        """Starts to add up; gradients that are not here count as zeros.

        Args:
            draw: where random bits of this backward come from.
        """
        self._marks.fill_(1)
        self._missing = []
        for index, parameter in enumerate(() if self.complete else self.parameters):
            if parameter.grad is not None:
                if parameter not in self._arrived:  # of an earlier backward pass, the mean already
                    self.take(parameter)
            else:
                self._views[parameter].zero_()
                self._marks[index] = 0
                self._missing.append(index)
        if self._coding is None or self._spans is None:
            self._work = start_all_reduce(self._flat, self._groups, 1 / self._groups.world_size)
            return
        if self._spans.data_ptr() != self._gradients.data_ptr():
            self._spans.view(-1).copy_(self._gradients)
        self._work = start_span_sum(self._coding.way, self._spans,
                                    draw.at(self._coding.first_span), self._groups)

    def pass_on(self) -> None:
        """Call it on all buckets before the first `finish`."""
        assert self._work is not None
        self._work.pass_on()

    def finish(self) -> None:
        """Waits for the mean over ranks."""
        assert self._work is not None
        self._work.wait()
        self._work = None
        self._arrived.clear()
        if self._spans is not None and self._spans.data_ptr() != self._gradients.data_ptr():
            self._gradients.copy_(self._spans.view(-1))

    def adopt(self) -> None:
        """Once marks are added up: takes gradients that only other ranks have."""
        if self._missing:
            found = self._marks.tolist()
            for index in self._missing:
                if found[index]:
                    parameter = self.parameters[index]
                    parameter.grad = self._views[parameter]


def aligned(parameter: Tensor, coded: bool) -> int:
    """Elements of a bucket that a parameter takes."""
    unit = SPAN_ELEMENTS if coded else _ALIGN_ELEMENTS
    return -(-parameter.numel() // unit) * unit


def in_buckets(parameters: Iterable[nn.Parameter], groups: Groups) -> list[list[nn.Parameter]]:
    """Parameters in order, in buckets of one dtype; on GPUs the first is small."""
    on_cpu = groups.device.type == "cpu"
    host_bytes = _HOST_BUCKET_BYTES if groups.sums is None else _SHARED_BUCKET_BYTES
    parts: dict[torch.dtype, list[list[nn.Parameter]]] = {}
    filled: dict[torch.dtype, int] = {}
    for parameter in parameters:
        of_dtype = parts.setdefault(parameter.dtype, [])
        limit = host_bytes if on_cpu else \
            _SMALL_BUCKET_BYTES if len(of_dtype) <= 1 else _BUCKET_BYTES
        if not of_dtype or filled[parameter.dtype] >= limit:
            of_dtype.append([])
            filled[parameter.dtype] = 0
        of_dtype[-1].append(parameter)
        filled[parameter.dtype] += parameter.numel() * parameter.element_size()
    return [part for of_dtype in parts.values() for part in of_dtype]


def build_buckets(parameters: Iterable[nn.Parameter], groups: Groups,
                  way: SpanSum | None) -> tuple[list[Bucket], Tensor]:
    """Buckets of parameters in order, and the marks that travel apart from them.

    Args:
        parameters: in the order in which their gradients come.
        groups: the ranks.
        way: how they travel in a codec; None: they do not, and nothing travels apart.
    """
    parts = in_buckets(parameters, groups)
    if way is None:
        return [Bucket(part, groups, None) for part in parts], torch.zeros(0)
    marks = torch.zeros(sum(map(len, parts)), device=groups.device)
    buckets, first = [], 0
    for part, own in zip(parts, marks.split([len(part) for part in parts]), strict=True):
        buckets.append(Bucket(part, groups, Coding(way, own, first)))
        first += sum(aligned(p, True) for p in part) // SPAN_ELEMENTS
    return buckets, marks
