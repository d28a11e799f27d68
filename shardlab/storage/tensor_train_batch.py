"""What a step does for all tensor trains of a rank at once: rows, and steps of cores.

    rows        of cached rows from the cache, of all others from the cores, in one call
    step        of all cores of this rank alone, in one call
    gradients   of the cores that other ranks share, in one call
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from shardlab.ops.step_parameters import StepParameters
from shardlab.ops.tensor_train_batch import batch_gradients, batch_rows, batch_steps
from shardlab.ops.tensor_train_types import CoreGradients, TensorTrain, Workspace
from shardlab.storage.tensor_train_memory import CoreMemory
from shardlab.storage.tensor_train_shard import TensorTrainShard


@dataclass(frozen=True)
class _Read:
    """Ids whose leading products the workspace holds."""

    trains: list[TensorTrain]
    ids: Tensor
    edges: list[int]

    def holds(self, ids: Tensor, edges: list[int]) -> bool:
        return self.edges == edges and (self.ids is ids or torch.equal(self.ids, ids))


class TrainBatch:
    """All tensor trains of a rank.

    Args:
        trains: the shards.
        memories: where their cores lie.
    """

    def __init__(self, trains: list[TensorTrainShard], memories: list[CoreMemory]) -> None:
        self.trains, self.workspace = trains, Workspace()
        self._own = [memory.slices for memory in memories if not memory.kind.is_shared]
        self._shared = [(number, core) for number, train in enumerate(trains) if train.is_shared
                        for core in range(len(train.cores.shape.row_factors))]
        self._read: _Read | None = None

    def forget(self) -> None:
        """The cores have changed."""
        self._read = None

    def rows(self, ids: Tensor, edges: list[int]) -> tuple[Tensor, list[int]]:
        """Rows of ids, those of train t ids[edges[t]:edges[t + 1]], ascending, each once.

        Returns:
            fp32, flat, rows of all trains one behind the other, valid until the next call; and
            where each train's begin.
        """
        starts = [0, *accumulate((edges[number + 1] - edges[number]) * train.columns
                                 for number, train in enumerate(self.trains))]
        like = torch.empty(0, device=ids.device)
        flat = self.workspace.take("rows", starts[-1], like)
        core_ids, core_edges, hits = self._split(ids, edges)
        if not hits:
            self._core_rows(ids, edges, flat)
            return flat, starts[:-1]
        made = self.workspace.take("made", starts[-1], like)
        self._core_rows(core_ids, core_edges, made)
        at = 0
        for number, train in enumerate(self.trains):
            out = flat[starts[number]:starts[number + 1]].view(-1, train.columns)
            size = (core_edges[number + 1] - core_edges[number]) * train.columns
            rows = made[at:at + size].view(-1, train.columns)
            at += size
            if number not in hits:
                out.copy_(rows)
                continue
            cached, slots = (one.to(ids.device) for one in hits[number])
            assert train.hot is not None
            out[~cached] = rows
            out[cached] = train.hot.rows[slots]
        return flat, starts[:-1]

    def _split(self, ids: Tensor, edges: list[int]) -> tuple[
            Tensor, list[int], dict[int, tuple[Tensor, Tensor]]]:
        """Ids whose rows the cores make, where each train's begin, and the cached ones.

        Of every train that has cached rows among the ids: bool [n] which, and their slots.
        """
        hits, parts = {}, []
        for number, train in enumerate(self.trains):
            part = ids[edges[number]:edges[number + 1]]
            if train.hot is not None:
                cached, slots = train.hot.find(part)
                train.hot.hits += slots.numel()
                train.hot.misses += part.numel() - slots.numel()
                if slots.numel():
                    hits[number] = cached, slots
                    part = part[~cached.to(ids.device)]
            parts.append(part)
        if not hits:
            return ids, edges, hits
        return torch.cat(parts), [0, *accumulate(part.numel() for part in parts)], hits

    def _core_rows(self, ids: Tensor, edges: list[int], out: Tensor) -> None:
        trains = [train.cores.train(train.workspace) for train in self.trains]
        batch_rows(trains, ids, edges, out, self.workspace)
        self._read = _Read(trains, ids, edges)

    def step(self, ids: Tensor, edges: list[int], grads: Tensor, step: StepParameters) -> None:
        """One optimiser step on all cores that no other rank shares.

        Args:
            ids, edges: as in `rows`, of rows that the cores make.
            grads: fp32, flat: of those rows, scaled and clipped.
            step: hyper-parameters; its key is of the random bits of slices.
        """
        if self._own:
            batch_steps(self._products(ids, edges, grads), ids, edges, grads, self._own, step,
                        self.workspace)

    def shared_gradients(self, ids: Tensor, edges: list[int],
                         grads: Tensor) -> dict[int, CoreGradients]:
        """Gradients of the cores of every shard that other ranks share; valid until the next call.

        Args:
            ids, edges, grads: as `step` has them.
        """
        if not self._shared:
            return {}
        found = batch_gradients(self._products(ids, edges, grads), ids, edges, grads, self._shared,
                                [False] * len(self.trains), self.workspace)
        pairs: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for place, (number, core) in enumerate(self._shared):
            pairs.setdefault(number, []).append(
                found.core(place, self.trains[number].cores.size(core)[1]))
        return {number: CoreGradients(*map(tuple, zip(*parts, strict=True)))
                for number, parts in pairs.items()}

    def _products(self, ids: Tensor, edges: list[int], grads: Tensor) -> list[TensorTrain]:
        """The trains whose products of these ids the workspace holds, made anew if it must be."""
        if self._read is None or not self._read.holds(ids, edges):
            self._core_rows(ids, edges, self.workspace.take("made", grads.numel(), grads))
        assert self._read is not None
        return self._read.trains
