"""What a step does for all tensor trains of a rank at once: rows, and gradients of cores.

    rows        of cached rows from the cache, of all others from the cores, in one call
    gradients   of all cores, in one call, in the order of the memories that step them
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from shardlab.ops.step_parameters import StepParameters
from shardlab.ops.tensor_train import SliceGradients, TensorTrain, Workspace
from shardlab.ops.tensor_train_batch import batch_gradients, batch_rows
from shardlab.storage.tensor_train_memory import CoreMemory
from shardlab.storage.tensor_train_shard import TensorTrainShard, moves_every_slice


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
        self._order = [owner for memory in memories for owner in memory.owners]
        self._place = {owner: number for number, owner in enumerate(self._order)}
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

    def gradients(self, ids: Tensor, edges: list[int], grads: Tensor,
                  step: StepParameters) -> SliceGradients:
        """Gradients of all cores, memory after memory; valid until the next call.

        Args:
            ids, edges: as in `rows`, of rows that the cores make.
            grads: fp32, flat: of those rows, scaled and clipped.
            step: tells whether slices without a gradient move, too.
        """
        if self._read is None or not self._read.holds(ids, edges):
            self._core_rows(ids, edges, self.workspace.take("made", grads.numel(), grads))
        assert self._read is not None
        moves = moves_every_slice(step)
        return batch_gradients(self._read.trains, ids, edges, grads, self._order,
                               [moves and not train.is_shared for train in self.trains],
                               self.workspace)

    def gradient_of(self, found: SliceGradients, number: int,
                    core: int) -> tuple[Tensor, Tensor]:
        """(touched, gradients [slices, elements]) of one core, out of `gradients`."""
        return found.core(self._place[number, core], self.trains[number].cores.size(core)[1])
