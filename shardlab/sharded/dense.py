"""The dense part on every rank: one set of parameters, gradients averaged while backward runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest

import torch
from torch import Tensor, nn

from shardlab.comm import Groups, Work, broadcast_, gather_objects_json, start_all_reduce
from shardlab.comm.coded_sum import Draw, SpanSum, open_span_sum
from shardlab.errors import ShardLabError
from shardlab.sharded.dense_buckets import build_buckets
from shardlab.table_plan import DenseWire
from shardlab.wire_bytes import ring_bytes


class DenseReducer:
    """Averages the gradients of replicated parameters over ranks, in buckets, behind the backward.

    A bucket's all-reduce starts as soon as its last gradient is there and all earlier buckets have
    started, and the backward pass ends when all of them have. Buckets follow the reversed order of
    registration, from the first step on: the order of summation never depends on the run's past,
    so that a resumed run repeats the bits of the run it continues. A parameter without a gradient
    on this rank counts as zeros; one without a gradient on any rank keeps ``grad`` None.

    Gradients are views into the buckets after a backward. Several backward passes before a step
    add up, each averaged over the ranks; in a codec, what earlier passes gave is rounded again.

    Args:
        module: on every rank the same; parameters and buffers start as rank 0 has them.
        groups: the ranks of a process group.
        wire: how gradients travel; ``fp32``: by all-reduce, in their own dtype.
        seed: of the run: random bits of rounding follow from it; the same on all ranks.

    Attributes:
        codec: that gradients travel in; ``fp32``, too, where nothing travels.
        coded_bytes: what this rank has sent in a codec so far.

    Raises:
        ShardLabError: ranks have different parameters, or one has a dtype that no codec takes.

    Source: own, after DistributedDataParallel's buckets (Li et al., VLDB 2020).
    """

    def __init__(self, module: nn.Module, groups: Groups, wire: DenseWire | None = None,
                 seed: int = 0) -> None:
        self._groups, self._draw = groups, Draw(seed)
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        _check_alike(named, groups)
        wire = wire or DenseWire()
        way = _open_coded(named, groups, wire)
        self.codec, self.coded_bytes = "fp32" if way is None else wire.codec, 0
        for tensor in [*(p.detach() for p in module.parameters()), *module.buffers()]:
            broadcast_(tensor, groups)
        self._buffers = list(module.buffers())
        self._buckets, self._marks = build_buckets([p for _, p in reversed(named)], groups, way)
        self._where = {p: bucket for bucket in self._buckets for p in bucket.parameters}
        self._started = 0
        self._open = self._reduced = False
        for _, parameter in named:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def begin_step(self, step: int) -> None:
        """Tells how many optimiser steps were taken: random bits follow from it."""
        self._draw = replace(self._draw, step=step, number=0)

    def share_buffers(self) -> None:
        """Gives every rank rank 0's buffers, such as the running means of a BatchNorm."""
        for buffer in self._buffers:
            broadcast_(buffer, self._groups)

    def settle(self) -> None:
        """Before a step: joins the reduction even if this rank's loss touched no dense parameter.

        The others wait for its zeros then.
        """
        if not self._reduced:
            self._finish()
        self._reduced = False
        self._draw = replace(self._draw, number=0)

    def _arrived(self, parameter: Tensor) -> None:
        if not self._open:
            self._open = True
            # As DistributedDataParallel has it: the engine calls this after its last node.
            torch.autograd.Variable._execution_engine.queue_callback(  # type: ignore[attr-defined]
                self._finish)
        self._where[parameter].take(parameter)
        while self._started < len(self._buckets) and self._buckets[self._started].complete:
            self._buckets[self._started].start(self._draw)
            self._started += 1

    def _finish(self) -> None:
        for bucket in self._buckets[self._started:]:
            bucket.start(self._draw)
        marks = self._start_marks()
        for bucket in self._buckets:
            bucket.pass_on()
        for bucket in self._buckets:
            bucket.finish()
        marks.wait()
        for bucket in self._buckets:
            bucket.adopt()
        self._started, self._open, self._reduced = 0, False, True
        self._draw = replace(self._draw, number=self._draw.number + 1)

    def _start_marks(self) -> Work:
        """Marks of all buckets travel together where a codec would round them."""
        if self.codec == "fp32":
            return Work()
        self.coded_bytes += sum(bucket.coded_bytes for bucket in self._buckets) + \
            ring_bytes(self._marks.nbytes, self._groups.world_size)
        return start_all_reduce(self._marks, self._groups)


def _open_coded(named: Sequence[tuple[str, nn.Parameter]], groups: Groups,
                wire: DenseWire) -> SpanSum | None:
    """The way that gradients take in a codec; None: there is no codec, or nobody to send to."""
    if wire.codec == "fp32" or groups.world_size == 1:
        return None
    for name, parameter in named:
        if not parameter.is_floating_point():
            raise ShardLabError(
                f"dense parameter {name} is {parameter.dtype}, and codecs hold real numbers; leave "
                f"wire.dense at fp32 instead of {wire.codec}")
    return open_span_sum(groups, wire.codec, wire.rounding)


def _check_alike(named: Sequence[tuple[str, nn.Parameter]], groups: Groups) -> None:
    mine = [f"{name} {list(p.shape)} {p.dtype}" for name, p in named]
    for rank, theirs in enumerate(gather_objects_json(mine, groups)):
        if theirs != mine:
            here, there = next(((a, b) for a, b in zip_longest(mine, theirs) if a != b))
            raise ShardLabError(
                f"dense parameters differ: rank {groups.rank} has {here or 'no more'} where rank "
                f"{rank} has {there or 'no more'}; build the same model on every rank")
