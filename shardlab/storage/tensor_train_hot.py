"""Hot rows of a tensor train: dense fp32 rows in front of the cores.

For the first ``cache_warmup_steps`` optimiser steps uses are only counted. Then the most used rows
become dense: a cached row starts as the row that the cores make, with the squares of its gradients
so far as its optimiser state, and from there on trains itself; the cores get no gradient of it.
Every ``cache_refresh_steps`` the rows are chosen anew (never, where that is 0). A row that leaves
is folded into the first core: the slice of its first digit changes so that

    sum over leaving rows |change of the row - what it learnt|^2
        + w * leaving rows * mean over all rows of the slice |change of the row|^2

is least (a linear system of the rank's size per slice). Folding needs no other rank, whichever way
the table is cut. What the cores cannot take of a row is reported by `HotRows.kept_share`.
A checkpoint holds cached rows, their state and the counts.

Source: cache of decompressed rows, arXiv 2101.11714; folding: own (the published code drops what a
row learnt when the cache is filled anew).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from shardlab.ops.blocks import Blocks
from shardlab.ops.rows import update_rows
from shardlab.ops.step_parameters import StepParameters
from shardlab.ops.tensor_train import logical_cores
from shardlab.ops.tensor_train_types import TensorTrain
from shardlab.ops.unique import Uniques
from shardlab.storage.tensor_train_uses import UseCounts
from shardlab.storage_bytes import OPTIMIZER_STATE
from shardlab.tensor_train_shapes import HotRowsShape
from shardlab.tiers import allocate

_FP32_BYTES = 4
#: Weight of an average row of the table beside a leaving one, when that is folded: a row alone in
#: its slice keeps 90 % or more of what it learnt.
_OTHERS = 0.1


class HotRows:
    """Dense rows of one shard.

    Args:
        shape: sizes.
        columns: of the shard.
        optimizer: kind of row optimiser.
        device: where rows lie; the index lies on CPU.
        schedule: (warm-up steps, steps between later choices or 0).
    """

    def __init__(self, shape: HotRowsShape, columns: int, optimizer: str, device: torch.device,
                 schedule: tuple[int, int]) -> None:
        per_column, per_row = OPTIMIZER_STATE[optimizer]
        self.shape, self.columns, self.optimizer = shape, columns, optimizer
        row, state = _FP32_BYTES * columns, _FP32_BYTES * (per_column * columns + per_row)
        self.data = allocate(shape.capacity * (row + state), device)
        self.blocks = Blocks(torch.tensor([[0, row, shape.capacity * row, state, columns,
                                            shape.capacity]]))
        self._ids = torch.zeros(shape.capacity, dtype=torch.int64)
        self.size = 0
        self.uses = UseCounts(shape)
        self.next_choice, self._period = schedule
        #: Squared norms: of what folded rows had learnt, and of what the cores took.
        self.learnt, self.lost = 0.0, 0.0
        self.hits, self.misses = 0, 0

    @property
    def ids(self) -> Tensor:
        """int64 [size], ascending: rows of the shard that are cached."""
        return self._ids[:self.size]

    @property
    def rows(self) -> Tensor:
        """fp32 [size, columns], a view."""
        return self.blocks.rows(self.data, 0)[:self.size]

    @property
    def state(self) -> Tensor:
        """fp32 [size, state elements], a view."""
        if not int(self.blocks.table[0, 3]):
            return torch.empty(self.size, 0, device=self.data.device)
        return self.blocks.state(self.data, 0)[:self.size]

    @property
    def held_bytes(self) -> int:
        """Bytes of rows, states and index."""
        parts = (self.data, self._ids, self.uses.ids, self.uses.counts, self.uses.squares)
        return sum(part.numel() * part.element_size() for part in parts)

    @property
    def kept_share(self) -> float:
        """Of what leaving rows had learnt, the share that the cores took (of squared norms)."""
        return 1.0 - self.lost / self.learnt if self.learnt else 1.0

    @property
    def counts_uses(self) -> bool:
        """Whether another choice is to come."""
        return self.next_choice >= 0

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Which of some ascending ids are cached: bool [n] on CPU, and the slots of those."""
        if not self.size:
            return torch.zeros(ids.numel(), dtype=torch.bool), self.ids
        wanted = ids.cpu()
        slot = torch.searchsorted(self.ids, wanted).clamp_(max=self.size - 1)
        cached = self.ids[slot] == wanted
        return cached, slot[cached]

    def set(self, ids: Tensor, rows: Tensor, state: Tensor) -> None:
        """Holds these rows and no others; ids ascend."""
        self.size = ids.numel()
        self._ids[:self.size] = ids
        self.rows.copy_(rows)
        self.state.copy_(state)

    def update(self, slots: Tensor, grads: Tensor, step: StepParameters,
               squares: Tensor | None) -> None:
        """One step on cached rows; gradients fp32 [n, columns] are scaled and clipped."""
        count, device = slots.numel(), grads.device
        uniques = Uniques(slots.to(device), torch.tensor([0, count]),
                          torch.arange(count + 1, device=device),
                          self.columns * torch.arange(count, device=device))
        update_rows(self.data, self.blocks, uniques, None, grads.reshape(-1),
                    replace(step, scale=1.0, clip_value=0.0, rows=None), squares)

    # ------------------------------------------------------------------ choice
    def is_due(self, step: int) -> bool:
        """Whether rows are to be chosen after this optimiser step."""
        return self.counts_uses and step >= self.next_choice

    def choose(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """(ids, counts, squares) of the rows that shall be cached from now on."""
        self.next_choice = step + self._period if self._period else -1
        found = self.uses.hottest(self.shape.capacity)
        self.uses.halve()
        return found

    def first_state(self, counts: Tensor, squares: Tensor, step: int) -> Tensor:
        """State of rows that become dense, from the squares of their gradients so far."""
        per_column, per_row = OPTIMIZER_STATE[self.optimizer]
        state = torch.zeros(counts.numel(), per_column * self.columns + per_row)
        if self.optimizer in ("adagrad", "row_wise_adagrad"):
            state[:] = squares[:, None]
        elif self.optimizer in ("adam", "row_wise_adam"):
            state[:, self.columns:] = (squares / max(1, step))[:, None]
        return state


def fold(train: TensorTrain, ids: Tensor, learnt: Tensor) -> Tensor:
    """The first core after rows were folded into it.

    Args:
        train: fp32 cores.
        ids: int64 [n], ascending: leaving rows.
        learnt: fp32 [n, columns]: what they learnt beyond the rows that the cores make.

    Returns:
        fp32 [slices, elements], new.
    """
    cores = [core.double().cpu() for core in logical_cores(train)]
    first = cores[0].squeeze(1).clone()
    right, gram = _right_products(cores, train, ids.cpu())
    digit = ids.cpu() // train.shape.row_unit
    wanted = learnt.double().cpu().view(len(ids), first.shape[1], -1)
    others = _OTHERS * gram / train.shape.row_unit
    for slice_, count, start in _groups(digit):
        some = right[start:start + count]
        # [r, n * columns of the right part], and the same columns of what was learnt.
        matrix = some.permute(1, 0, 2).reshape(some.shape[1], -1)
        target = wanted[start:start + count].permute(1, 0, 2).reshape(first.shape[1], -1)
        system = matrix @ matrix.T + count * others
        ridge = 1e-12 * system.diagonal().mean() + torch.finfo(torch.float64).tiny
        system += ridge * torch.eye(len(system), dtype=torch.float64)
        first[slice_] += torch.linalg.solve(system, matrix @ target.T).T
    return first.flatten(1).float()


def _right_products(cores: list[Tensor], train: TensorTrain,
                    ids: Tensor) -> tuple[Tensor, Tensor]:
    """G2[i2] .. Gd[id] of every id [n, r_1, columns], and the sum of S S^T over all there are."""
    rest = ids % train.shape.row_unit
    product = torch.ones(len(ids), 1, 1, dtype=torch.float64)
    gram = torch.ones(1, 1, dtype=torch.float64)
    for core in reversed(cores[1:]):
        digit, rest = rest % core.shape[0], rest // core.shape[0]
        taken = core[digit]
        product = torch.einsum("nrqs,nsc->nrqc", taken, product).flatten(2)
        gram = torch.einsum("prqs,st,puqt->ru", core, gram, core)
    return product, gram


def _groups(digit: Tensor) -> list[tuple[int, int, int]]:
    """(value, how many, first place) of the runs of an ascending list."""
    values, counts = torch.unique_consecutive(digit, return_counts=True)
    starts = counts.cumsum(0) - counts
    return list(zip(values.tolist(), counts.tolist(), starts.tolist(), strict=True))
