"""Collectives by name. A world of one takes the same calls; they then move nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardlab.comm.faults import naming
from shardlab.comm.gather import gather_json
from shardlab.comm.groups import Groups
from shardlab.comm.shared_memory import SharedMemoryLane
from shardlab.comm.shared_sum import start_sum

_REDUCE = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


@dataclass
class WireBytes:
    """Payload bytes that this rank sent to other ranks, since the start.

    Attributes:
        ids_bytes, rows_bytes, gradients_bytes: by direction. Gradients include the sums of squares
            that column shards of a row-wise optimiser tell each other.
        sync_bytes: what replicas of the tables told each other.
        inside_bytes: what of all these went to ranks of the same host.
        tables: by table [ids, rows, gradients]; what is common to all tables, the heads of messages
            and the sums of squares, and what replicas sent, is in no table's.
    """

    ids_bytes: int = 0
    rows_bytes: int = 0
    gradients_bytes: int = 0
    sync_bytes: int = 0
    inside_bytes: int = 0
    tables: dict[str, list[int]] = field(default_factory=dict)

    def count(self, direction: int, sizes: Sequence[int], groups: Groups) -> None:
        """Counts bytes by rank of a lane; ``direction`` as of `add`, 3: between replicas."""
        name = ("ids_bytes", "rows_bytes", "gradients_bytes", "sync_bytes")[direction]
        setattr(self, name, getattr(self, name) + sum(sizes))
        self.inside_bytes += sum(size for size, near in zip(sizes, groups.near, strict=False)
                                 if near)

    def add(self, direction: int, names: Sequence[str], sizes: Sequence[int]) -> None:
        """Counts bytes of tables; ``direction``: 0 ids, 1 rows, 2 gradients."""
        for name, size in zip(names, sizes, strict=True):
            self.tables.setdefault(name, [0, 0, 0])[direction] += size

    def __iadd__(self, other: WireBytes) -> WireBytes:
        self.ids_bytes += other.ids_bytes
        self.rows_bytes += other.rows_bytes
        self.gradients_bytes += other.gradients_bytes
        self.inside_bytes += other.inside_bytes
        if other.sync_bytes:  # with stale rows another thread adds to it, and this one adds none
            self.sync_bytes += other.sync_bytes
        for name, sizes in other.tables.items():
            for direction, size in enumerate(sizes):
                self.add(direction, [name], [size])
        return self

    @property
    def total(self) -> int:
        return self.ids_bytes + self.rows_bytes + self.gradients_bytes + self.sync_bytes

    @property
    def across_bytes(self) -> int:
        """Bytes that went to other hosts."""
        return self.total - self.inside_bytes


class Work:
    """A collective under way.

    Args:
        finish: waits for it; None: nothing is under way.
        pass_on: does what comes before the last wait, once; None: there is nothing.
    """

    def __init__(self, finish: Callable[[], None] | None = None,
                 pass_on: Callable[[], None] | None = None) -> None:
        self._finish, self._pass_on = finish, pass_on

    def pass_on(self) -> None:
        """Of several under way, all do this before one waits: they then wait together.

        Raises:
            ExchangeError: a rank ended, stalled or cannot be reached.
        """
        if self._pass_on is not None:
            self._pass_on()

    def wait(self) -> None:
        """Blocks until the result is there (on CUDA: until the stream may read it).

        Raises:
            ExchangeError: a rank ended, stalled or cannot be reached.
        """
        if self._finish is not None:
            self._finish()
            self._finish = None


def all_to_all(out: Tensor, source: Tensor, out_splits: Sequence[int],
               source_splits: Sequence[int], groups: Groups, phase: str = "exchange") -> Work:
    """Starts sending piece r of ``source`` to rank r.

    Args:
        out: 1-D; piece r of it comes from rank r.
        source: 1-D, same dtype; must stay as it is until the wait is over.
        out_splits, source_splits: elements per rank.
        groups: the ranks; uses the `exchange` lane.
        phase: of the step, for the error of a fault.

    Raises:
        ExchangeError: (here or in the wait) a rank ended, stalled or cannot be reached.
    """
    if groups.exchange is None:
        return Work()
    with naming(groups, phase, "all_to_all"):
        finish = groups.exchange.all_to_all(out, source, out_splits, source_splits)

    def named() -> None:
        with naming(groups, phase, "all_to_all"):
            finish()

    return Work(named)


def all_reduce_(tensor: Tensor, groups: Groups, op: str = "sum") -> Tensor:
    """Reduces in place over all ranks; ``op`` is sum, max or min."""
    if groups.process_group is not None:
        with naming(groups, "overhead", "all_reduce"):
            dist.all_reduce(tensor, _REDUCE[op], group=groups.process_group)
    return tensor


def start_all_reduce(tensor: Tensor, groups: Groups, scale: float = 1.0) -> Work:
    """Starts adding up a contiguous ``tensor`` over all ranks, in place.

    Uses the `sums` lane, or two stages where there are some, or `process_group`. Waits are in the
    order of starts.

    Args:
        tensor: what this rank adds.
        groups: the ranks.
        scale: multiplies the sums.

    Raises:
        ExchangeError: (here or in the wait) a rank ended, stalled or cannot be reached.
    """
    if groups.process_group is None:
        return Work()
    staged = None if groups.stages is None else groups.stages.sums
    if groups.sums is not None and staged is None:
        return _start_shared_sum(tensor, groups, groups.sums, scale)
    with naming(groups, "dense", "all_reduce"):
        if staged is not None:
            done = staged.start(tensor)
        else:
            done = dist.all_reduce(tensor, group=groups.process_group, async_op=True).wait

    def finish() -> None:
        with naming(groups, "dense", "all_reduce"):
            done()
        if scale != 1.0:
            tensor.mul_(scale)

    return Work(finish)


def _start_shared_sum(tensor: Tensor, groups: Groups, lane: SharedMemoryLane,
                      scale: float) -> Work:
    """Of ranks that share memory; every rank scales the piece that it adds up."""
    with naming(groups, "dense", "all_reduce"):
        started = start_sum(tensor, lane, groups.rank, groups.world_size, scale=scale)

    def named(part: Callable[[], None]) -> Callable[[], None]:
        def call() -> None:
            with naming(groups, "dense", "all_reduce"):
                part()
        return call

    return Work(named(started), named(started.pass_on))


def broadcast_(tensor: Tensor, groups: Groups) -> Tensor:
    """Rank 0's tensor on every rank, in place."""
    if groups.process_group is not None:
        sent = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
        with naming(groups, "overhead", "broadcast"):
            dist.broadcast(sent, group=groups.process_group, group_src=0)
    return tensor


def barrier(groups: Groups) -> None:
    """Waits until every rank is here."""
    if groups.process_group is not None:
        with naming(groups, "overhead", "barrier"):
            dist.barrier(group=groups.process_group)


def broadcast_text(text: str | None, groups: Groups) -> str:
    """Rank 0's text on every rank; the others pass None."""
    if groups.process_group is None:
        assert text is not None
        return text
    data = bytearray((text or "").encode())
    size = torch.tensor([len(data)], device=groups.device)
    with naming(groups, "overhead", "broadcast"):
        dist.broadcast(size, 0, group=groups.process_group)
        body = torch.zeros(int(size), dtype=torch.uint8, device=groups.device)
        if groups.rank == 0 and data:
            body.copy_(torch.frombuffer(data, dtype=torch.uint8))
        dist.broadcast(body, 0, group=groups.process_group)
    return bytes(body.cpu().tolist()).decode()


def gather_objects_json(value: Any, groups: Groups) -> list[Any]:
    """Every rank's JSON-able value, by rank, on every rank."""
    with naming(groups, "overhead", "all_gather"):
        return gather_json(value, groups)
