"""The dense part on every rank: one set of parameters, gradients averaged while backward runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

import torch
from torch import Tensor, nn

from shardlab.comm import Groups, Work, broadcast_, gather_objects_json, start_all_reduce
from shardlab.errors import ShardLabError

#: Between CPU hosts a bucket travels while the rest of the backward runs: 1 MiB takes 8 ms at
#: 1 Gbit/s, far more than a message costs. On GPUs only the first is small, to start early.
_SMALL_BUCKET_BYTES, _BUCKET_BYTES = 1 << 20, 25 << 20
#: Gradients start on a cache line of fp32.
_ALIGN_ELEMENTS = 16


class DenseReducer:
    """Averages the gradients of replicated parameters over ranks, in buckets, behind the backward.

    A bucket's all-reduce starts as soon as its last gradient is there and all earlier buckets have
    started, and the backward pass ends when all of them have. Buckets follow the reversed order of
    registration, from the first step on: the order of summation never depends on the run's past,
    so that a resumed run repeats the bits of the run it continues. A parameter without a gradient
    on this rank counts as zeros; one without a gradient on any rank keeps ``grad`` None.

    Gradients are views into the buckets after a backward. Several backward passes before a step
    add up, each averaged over the ranks.

    Args:
        module: on every rank the same; parameters and buffers start as rank 0 has them.
        groups: the ranks, at least two of a process group.

    Raises:
        ShardLabError: ranks have different parameters.

    Source: own, after DistributedDataParallel's buckets (Li et al., VLDB 2020).
    """

    def __init__(self, module: nn.Module, groups: Groups) -> None:
        self._groups = groups
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        _check_alike(named, groups)
        for tensor in [*(p.detach() for p in module.parameters()), *module.buffers()]:
            broadcast_(tensor, groups)
        self._buffers = list(module.buffers())
        self._buckets = _buckets([p for _, p in reversed(named)], groups)
        self._where = {p: bucket for bucket in self._buckets for p in bucket.parameters}
        self._started = 0
        self._open = self._reduced = False
        for _, parameter in named:
            parameter.register_post_accumulate_grad_hook(self._arrived)

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

    def _arrived(self, parameter: Tensor) -> None:
        if not self._open:
            self._open = True
            # As DistributedDataParallel has it: the engine calls this after its last node.
            torch.autograd.Variable._execution_engine.queue_callback(  # type: ignore[attr-defined]
                self._finish)
        self._where[parameter].take(parameter)
        while self._started < len(self._buckets) and self._buckets[self._started].complete:
            self._buckets[self._started].start()
            self._started += 1

    def _finish(self) -> None:
        for bucket in self._buckets[self._started:]:
            bucket.start()
        for bucket in self._buckets:
            bucket.finish()
        self._started, self._open, self._reduced = 0, False, True


class _Bucket:
    """Gradients of some parameters side by side, and for each a mark that it has one.

    Args:
        parameters: of one dtype.
        groups: the ranks.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], groups: Groups) -> None:
        self.parameters, self._groups = parameters, groups
        places, end = [], 0
        for parameter in parameters:
            places.append(end)
            end += -(-parameter.numel() // _ALIGN_ELEMENTS) * _ALIGN_ELEMENTS
        self._flat = torch.zeros(end + len(parameters), dtype=parameters[0].dtype,
                                 device=groups.device)
        self._gradients, self._marks = self._flat[:end], self._flat[end:]
        self._views = {p: self._flat.as_strided(p.shape, torch.empty_like(p).stride(), place)
                       for p, place in zip(parameters, places, strict=True)}
        self._arrived: set[Tensor] = set()
        self._missing: list[int] = []
        self._work: Work | None = None

    @property
    def complete(self) -> bool:
        """Whether every gradient of this backward pass is here."""
        return len(self._arrived) == len(self.parameters)

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

    def start(self) -> None:
        """Starts the all-reduce; gradients that are not here count as zeros."""
        self._marks.fill_(1)
        self._missing = []
        for index, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                if parameter not in self._arrived:  # of an earlier backward pass, the mean already
                    self.take(parameter)
            else:
                self._views[parameter].zero_()
                self._marks[index] = 0
                self._missing.append(index)
        self._work = start_all_reduce(self._flat, self._groups)

    def finish(self) -> None:
        """Waits for the sum and makes it the mean."""
        assert self._work is not None
        self._work.wait()
        self._work = None
        self._arrived.clear()
        self._gradients.mul_(1 / self._groups.world_size)
        if self._missing:
            found = self._marks.tolist()
            for index in self._missing:
                if found[index]:  # another rank has a gradient
                    parameter = self.parameters[index]
                    parameter.grad = self._views[parameter]


def _buckets(parameters: Iterable[nn.Parameter], groups: Groups) -> list[_Bucket]:
    """Parameters in order, in buckets of one dtype; the first is small."""
    parts: dict[torch.dtype, list[list[nn.Parameter]]] = {}
    filled: dict[torch.dtype, int] = {}
    for parameter in parameters:
        of_dtype = parts.setdefault(parameter.dtype, [])
        small = len(of_dtype) <= 1 or groups.device.type == "cpu"
        limit = _SMALL_BUCKET_BYTES if small else _BUCKET_BYTES
        if not of_dtype or filled[parameter.dtype] >= limit:
            of_dtype.append([])
            filled[parameter.dtype] = 0
        of_dtype[-1].append(parameter)
        filled[parameter.dtype] += parameter.numel() * parameter.element_size()
    return [_Bucket(part, groups) for of_dtype in parts.values() for part in of_dtype]


def _check_alike(named: Sequence[tuple[str, nn.Parameter]], groups: Groups) -> None:
    mine = [f"{name} {list(p.shape)} {p.dtype}" for name, p in named]
    for rank, theirs in enumerate(gather_objects_json(mine, groups)):
        if theirs != mine:
            here, there = next(((a, b) for a, b in zip_longest(mine, theirs) if a != b))
            raise ShardLabError(
                f"dense parameters differ: rank {groups.rank} has {here or 'no more'} where rank "
                f"{rank} has {there or 'no more'}; build the same model on every rank")
