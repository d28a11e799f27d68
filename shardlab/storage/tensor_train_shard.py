"""One shard of a tensor train: cores, hot rows in front of them, and what a step remembers."""

from __future__ import annotations

import torch
from torch import Tensor

from shardlab.ops.step_parameters import StepParameters
from shardlab.ops.tensor_train import tensor_train_rows
from shardlab.ops.tensor_train_types import CoreGradients, Workspace
from shardlab.storage.base import LocalShard, StorageOptions
from shardlab.storage.tensor_train_cores import CoreArena, is_shared
from shardlab.storage.tensor_train_hot import HotRows, fold
from shardlab.storage.tensor_train_init import init_core
from shardlab.storage_specs import TensorTrainSpec
from shardlab.tensor_train_shapes import hot_rows_shape


class TensorTrainShard:
    """One shard: its cores, and what a step needs to remember.

    Args:
        local: the shard.
        options: optimiser, seed, device.
        cores: the shard's cores.
    """

    def __init__(self, local: LocalShard, options: StorageOptions, cores: CoreArena) -> None:
        spec = local.storage
        assert isinstance(spec, TensorTrainSpec)
        self.local, self.spec, self.optimizer = local, spec, options.optimizer
        self.cores, self.workspace = cores, Workspace()
        self.is_shared = is_shared(local)
        #: Gradients that wait for those of other ranks, where cores are shared.
        self.waiting: CoreGradients | None = None
        #: Rows of another storage that are being loaded, and how many elements are to come.
        self.collected: Tensor | None = None
        self.missing = 0
        self.hot = None if not spec.cache_fraction else HotRows(
            hot_rows_shape(local.shard.rows, spec.cache_fraction), self.columns,
            options.optimizer, options.device, (spec.cache_warmup_steps, spec.cache_refresh_steps))
        for number in range(len(self.cores.shape.row_factors)):
            self.cores.write_core(number, init_core(
                local.table, self.cores.place.whole, number, self.cores.place.area(number),
                spec.init, options.seed))

    @property
    def columns(self) -> int:
        """Of the shard."""
        return self.local.shard.columns

    def core_rows(self, ids: Tensor) -> Tensor:
        """What the cores make of unique, ascending ids; valid until the next call."""
        like = torch.empty(0, device=ids.device)
        out = self.workspace.take("rows", ids.numel() * self.columns, like).view(-1, self.columns)
        tensor_train_rows(self.cores.train(self.workspace), ids, out, self.workspace)
        return out

    def learn_hot(self, ids: Tensor, grads: Tensor, counts: Tensor, step: StepParameters,
                  row_squares: Tensor | None) -> tuple[Tensor, Tensor]:
        """Steps the cached rows; ids and gradients of the others, which the cores learn.

        Args:
            ids: int64 [n], ascending.
            grads: fp32 [n, columns], scaled and clipped.
            counts: int64 [n], entries of every row.
            step: hyper-parameters.
            row_squares: fp32 [n], mean squares of whole rows, or -1 where the shard holds those;
                or None.
        """
        assert self.hot is not None
        squares = grads.square().mean(1)
        if row_squares is not None:
            squares = torch.where(row_squares < 0, squares, row_squares)
        if self.hot.counts_uses:
            self.hot.uses.note(ids.cpu(), counts.cpu(), squares.cpu())
        cached, slots = self.hot.find(ids)
        if not slots.numel():
            return ids, grads
        cached = cached.to(ids.device)
        self.hot.update(slots, grads[cached], step,
                        None if row_squares is None else row_squares[cached])
        return ids[~cached], grads[~cached]

    def choose_hot_rows(self, step: int) -> None:
        """Chooses the cached rows anew where that is due; those that leave are folded."""
        hot = self.hot
        if hot is None or not hot.is_due(step):
            return
        ids, counts, squares = hot.choose(step)
        stays = torch.isin(hot.ids, ids)
        left = hot.ids[~stays].clone()
        if left.numel():
            self.fold_rows(left, hot.rows[~stays.to(hot.rows.device)])
        rows = self.core_rows(ids.to(self.cores.device)).clone()
        state = hot.first_state(counts, squares, step).to(rows.device)
        old = torch.isin(ids, hot.ids)
        kept = stays.to(rows.device)
        rows[old.to(rows.device)] = hot.rows[kept]
        state[old.to(rows.device)] = hot.state[kept]
        hot.set(ids, rows, state)

    def fold_rows(self, ids: Tensor, rows: Tensor) -> None:
        """Folds rows [n, columns] that were cached, ascending ids, into the first core."""
        where = ids.to(rows.device)
        learnt = rows - self.core_rows(where)
        self.cores.write_core(0, fold(self.cores.train(self.workspace), ids, learnt))
        if self.hot is not None:
            self.hot.learnt += float(learnt.double().square().sum())
            self.hot.lost += float((rows - self.core_rows(where)).double().square().sum())

    def clear_hot_rows(self) -> None:
        """Forgets cached rows and counts: a checkpoint brings its own."""
        if self.hot is not None:
            self.hot.size, self.hot.uses.sizes = 0, [0, 0]
