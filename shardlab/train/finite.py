"""Losses and gradients that are NaN or infinite: found before the step, named, or left out."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from shardlab.comm.collectives import all_reduce_
from shardlab.comm.groups import Groups
from shardlab.errors import NotFiniteError

if TYPE_CHECKING:
    from shardlab.data.batch import Batch
    from shardlab.jagged import KeyedTensor
    from shardlab.sharded import ShardedModel

#: Batches in a row that may be left out; more of them are no accident of the data.
MOST_SKIPPED = 10


class FiniteGuard:
    """Looks at every step between its backward and its update.

    Looking at a number waits for the device, so that GPUs are looked at step by step only where
    batches are to be skipped; otherwise the loss is, at every log interval. On CPUs it reads every
    gradient once.

    Args:
        model: the sharded model.
        groups: the ranks.
        on_nan: ``stop`` raises on the rank that finds it, before anything is updated;
            ``skip_batch`` leaves the batch out on all ranks.
    """

    def __init__(self, model: ShardedModel, groups: Groups, on_nan: str) -> None:
        self._model, self._groups = model, groups
        self._skips = on_nan == "skip_batch"
        self.running = self._skips or groups.device.type == "cpu"
        self.skipped = 0
        self._in_a_row = 0
        self._pooled: list[tuple[str, KeyedTensor, list[Tensor]]] = []
        self._parameters = [*model.parameters()]  # walking the modules costs more than their sums
        if self.running:
            for name, collection in model.collections().items():
                if isinstance(collection, nn.Module):
                    collection.register_forward_hook(
                        lambda module, _, out, name=name: self._note(name, module, out))

    def _note(self, name: str, module: nn.Module, out: KeyedTensor) -> None:
        """Keeps what a collection gave, and the gradient that comes back for it."""
        if not module.training or not out.values().requires_grad:
            return
        grads: list[Tensor] = []
        self._pooled.append((name, out, grads))
        out.values().register_hook(lambda grad: grads.append(grad))

    def check_loss(self, loss: Tensor, batch: Batch, step: int) -> None:
        """Before the backward. Raises NotFiniteError for a bad loss where the run is to stop."""
        if self.running and not self._skips and not isfinite(loss.item()):
            raise NotFiniteError(self._where("loss", batch, step))

    def check_gradients(self, loss: Tensor, batch: Batch, step: int) -> bool:
        """Before the update; whether this step may be taken, the same on every rank.

        Raises:
            NotFiniteError: it may not, and the run is to stop; or `MOST_SKIPPED` batches in a row
                had to be left out.
        """
        if not self.running:
            return True
        good = (not self._skips or isfinite(loss.item())) and self._gradients_finite()
        where = "" if good else self._where("gradient", batch, step)
        self._pooled.clear()
        if not self._skips:
            if not good:
                raise NotFiniteError(where)
            return True
        flag = torch.tensor([float(good)], device=self._groups.device)
        if all_reduce_(flag, self._groups, op="min").item():
            self._in_a_row = 0
            return True
        self.skipped, self._in_a_row = self.skipped + 1, self._in_a_row + 1
        if self._in_a_row > MOST_SKIPPED:
            raise NotFiniteError(f"{MOST_SKIPPED} batches in a row were left out; "
                                 f"{where or 'another rank found what is not finite'}")
        if where:
            print(f"rank {self._groups.rank}: batch left out: {where}", flush=True)
        return False

    def _gradients_finite(self) -> bool:
        """A sum is finite if all its terms are; one that overflows is as wrong."""
        sums = [p.grad.sum() for p in self._parameters if p.grad is not None]
        sums += [grad.sum() for _, _, found in self._pooled for grad in found]
        if self._groups.device.type == "cpu":
            return all(isfinite(value.item()) for value in sums)
        return not sums or bool(torch.stack(sums).isfinite().all())  # waits for the device once

    def _where(self, what: str, batch: Batch, step: int) -> str:
        """Names the first place that is not finite, in the order in which a step computes."""
        begin = f"step {step}, rank {self._groups.rank}, batch that ends at row {batch.position}: "
        for place in (self._in_inputs(batch), self._in_rows(), self._in_gradients()):
            if place is not None:
                break
        else:
            place = f"the {what} is not finite, dense inputs and table rows are"
        self._pooled.clear()
        return begin + place + "; nothing was updated. Check this batch, lower the learning " \
            "rates, clip gradients, or set train.on_nan=skip_batch, and resume from the last " \
            "checkpoint"

    @staticmethod
    def _in_inputs(batch: Batch) -> str | None:
        for name, values in (("dense feature", batch.dense), ("label", batch.labels)):
            bad = (~values.reshape(len(values), -1).isfinite()).nonzero()
            if len(bad):
                sample, column = bad[0].tolist()
                number = f" {column}" if name == "dense feature" else ""
                return f"{name}{number} of sample {sample} is not finite"
        return None

    def _in_rows(self) -> str | None:
        for name, out, _ in self._pooled:
            place = self._feature(name, out, out.values().detach())
            if place is not None:
                return f"the rows read for {place} are not finite"
        return None

    def _in_gradients(self) -> str | None:
        for name, out, grads in self._pooled:
            for grad in grads:
                place = self._feature(name, out, grad)
                if place is not None:
                    return f"the gradient of {place} is not finite"
        for name, parameter in self._model.named_parameters():
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                return f"the gradient of parameter {name} is not finite"
        return None

    def _feature(self, name: str, out: KeyedTensor, values: Tensor) -> str | None:
        """The first feature whose columns of [B, columns] are not finite, with its table."""
        bad = (~values.isfinite()).nonzero()
        if not len(bad):
            return None
        column = int(bad[:, 1].min())
        sample = int(bad[bad[:, 1] == column][0, 0])
        for key, width in zip(out.keys(), out.length_per_key(), strict=True):
            if column < width:
                tables = [table.name for table in self._model.collections()[name].tables
                          if key in (table.feature_names or (table.name,))]
                return f"feature {key!r} (table {', '.join(map(repr, tables))}), sample {sample},"
            column -= width
        return None
