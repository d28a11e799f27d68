"""One shard of a tensor train: cores, hot rows in front of them, and what a step remembers."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from shardlab.ops.rows import StepParameters
from shardlab.ops.tensor_train import (
    CoreGradients,
    Workspace,
    tensor_train_gradients,
    tensor_train_rows,
)
from shardlab.storage.base import LocalShard, StorageOptions
from shardlab.storage.levels import Clock
from shardlab.storage.tensor_train_cores import CoreArena
from shardlab.storage.tensor_train_hot import HotRows, fold
from shardlab.storage.tensor_train_init import init_core
from shardlab.storage_specs import TensorTrainSpec
from shardlab.tensor_train_shapes import hot_rows_shape

_ADAMS = ("adam", "row_wise_adam")


class TensorTrainShard:
    """One shard: its cores, and what a step needs to remember.

    Args:
        local: the shard.
        options: optimiser, seed, device.
        clock: of the storage.
    """

    def __init__(self, local: LocalShard, options: StorageOptions, clock: Clock) -> None:
        spec = local.storage
        assert isinstance(spec, TensorTrainSpec)
        self.local, self.spec, self.optimizer = local, spec, options.optimizer
        self.cores = CoreArena(local, options.optimizer, options.device, clock)
        self.workspace = Workspace()
        self.is_shared = not local.replicated and (
            (local.shard.rows, local.shard.columns)
            != (local.table.num_embeddings, local.table.embedding_dim))
        #: Gradients that wait for those of other ranks, where cores are shared.
        self.waiting: CoreGradients | None = None
        #: Rows of another storage that are being loaded, and how many elements are to come.
        self.collected: Tensor | None = None
        self.missing = 0
        self._product_ids: Tensor | None = None
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

    def rows(self, ids: Tensor, out: Tensor) -> None:
        """Writes fp32 [n, columns] of unique, ascending ids."""
        slots = ids[:0]
        if self.hot is not None:
            cached, slots = self.hot.find(ids)
            self.hot.hits += slots.numel()
            self.hot.misses += ids.numel() - slots.numel()
        if self.hot is None or not slots.numel():
            tensor_train_rows(self.cores.train(self.workspace), ids, out, self.workspace)
            self._product_ids = ids
            return
        cached, slots = cached.to(ids.device), slots.to(ids.device)
        out[~cached] = self.core_rows(ids[~cached])
        out[cached] = self.hot.rows[slots]

    def core_rows(self, ids: Tensor) -> Tensor:
        """What the cores make of unique, ascending ids; valid until the next call."""
        like = torch.empty(0, device=ids.device)
        out = self.workspace.take("rows", ids.numel() * self.columns, like).view(-1, self.columns)
        tensor_train_rows(self.cores.train(self.workspace), ids, out, self.workspace)
        self._product_ids = ids
        return out

    def learn(self, ids: Tensor, grads: Tensor, counts: Tensor, step: StepParameters,
              row_squares: Tensor | None) -> CoreGradients:
        """Steps the cached rows; the gradients that the others give to the cores.

        Args:
            ids: int64 [n], ascending.
            grads: fp32 [n, columns], scaled and clipped.
            counts: int64 [n], entries of every row.
            step: hyper-parameters.
            row_squares: fp32 [n], mean squares of whole rows, or -1 where the shard holds those;
                or None.
        """
        if self.hot is None:
            return self.gradients(ids, grads)
        squares = grads.square().mean(1)
        if row_squares is not None:
            squares = torch.where(row_squares < 0, squares, row_squares)
        if self.hot.counts_uses:
            self.hot.uses.note(ids.cpu(), counts.cpu(), squares.cpu())
        cached, slots = self.hot.find(ids)
        if slots.numel():
            cached = cached.to(ids.device)
            self.hot.update(slots, grads[cached], step,
                            None if row_squares is None else row_squares[cached])
            ids, grads = ids[~cached], grads[~cached]
        return self.gradients(ids, grads)

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
        rows = self.core_rows(ids.to(self.cores.data.device)).clone()
        state = hot.first_state(counts, squares, step).to(rows.device)
        old = torch.isin(ids, hot.ids)
        kept = stays.to(rows.device)
        rows[old.to(rows.device)] = hot.rows[kept]
        state[old.to(rows.device)] = hot.state[kept]
        hot.set(ids, rows, state)
        self.forget_products()

    def fold_rows(self, ids: Tensor, rows: Tensor) -> None:
        """Folds rows [n, columns] that were cached, ascending ids, into the first core."""
        where = ids.to(rows.device)
        learnt = rows - self.core_rows(where)
        self.cores.write_core(0, fold(self.cores.train(self.workspace), ids, learnt))
        if self.hot is not None:
            self.hot.learnt += float(learnt.double().square().sum())
            self.hot.lost += float((rows - self.core_rows(where)).double().square().sum())
        self.forget_products()

    def clear_hot_rows(self) -> None:
        """Forgets cached rows and counts: a checkpoint brings its own."""
        if self.hot is not None:
            self.hot.size, self.hot.uses.sizes = 0, [0, 0]

    def forget_products(self) -> None:
        """The cores have changed."""
        self._product_ids = None

    def gradients(self, ids: Tensor, grads: Tensor) -> CoreGradients:
        """Of all cores, from the gradients of rows [n, columns]."""
        known = self._product_ids
        kept = known is not None and (known is ids or (
            known.shape == ids.shape and torch.equal(known, ids)))
        return tensor_train_gradients(self.cores.train(self.workspace), ids, grads, self.workspace,
                                      products=kept)

    def step(self, grads: CoreGradients, step: StepParameters) -> None:
        """One step on cores that no other rank has a part of."""
        if moves_every_slice(step):
            grads = self.cores.all_slices(grads)
        self.cores.step(grads, self.core_step(step), range(len(grads.grads)))
        self.forget_products()

    def core_step(self, step: StepParameters) -> StepParameters:
        """The same step at the cores' learning rate."""
        scale = self.spec.lr_scale
        return step if scale == 1.0 else replace(step, lr=step.lr * scale)


def moves_every_slice(step: StepParameters) -> bool:
    """Whether the rule also moves slices that got no gradient."""
    return step.kind in _ADAMS or step.weight_decay > 0
