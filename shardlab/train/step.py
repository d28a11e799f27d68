"""One training step, and one prediction: the same lines for every rank, device and batch size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.lr_scheduler import LRScheduler

from shardlab.comm import naming

if TYPE_CHECKING:
    from shardlab.data.batch import Batch
    from shardlab.sharded import ShardedModel
    from shardlab.train.finite import FiniteGuard

_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class StepRunner:
    """Runs steps of binary cross-entropy on logits.

    Attributes:
        model: maps (dense [b, d], features) to logits [b].
        optimizer: the optimiser that `shardlab.shard` returned.
        scheduler: stepped after the optimiser; None: constant learning rates.
        device: device type and index for autocast.
        dense_dtype: ``fp32``, or ``bf16`` for autocast.
        world_size: ranks.
        guard: looks for what is not finite; None: nobody does.
    """

    model: ShardedModel
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | None
    device: torch.device
    dense_dtype: str
    world_size: int
    guard: FiniteGuard | None = None

    def train(self, batch: Batch, global_rows: int, number: int = 0
              ) -> tuple[Tensor, Tensor] | None:
        """One step on this rank's part of a global batch of ``global_rows`` rows.

        The loss is the mean over the global batch. Gradients are averaged over ranks, so a rank's
        part is its sum x world_size / global_rows; an empty part is 0, and the rank still takes
        part in every exchange.

        Args:
            batch: this rank's part.
            global_rows: rows of all ranks' parts.
            number: of the step, for messages.

        Returns:
            (logits [b], loss []), detached; the loss is this rank's part. None: the batch was left
            out on all ranks, because something in it was not finite.

        Raises:
            NotFiniteError: a loss or gradient is not finite; nothing was updated.
        """
        self.optimizer.zero_grad()
        logits = self._forward(batch)
        total = functional.binary_cross_entropy_with_logits(logits, batch.labels, reduction="sum")
        loss = total * (self.world_size / global_rows)
        if self.guard is not None:
            self.guard.check_loss(loss, batch, number)
        with naming(self.model.groups, "dense", "all_reduce"):
            loss.backward()
        if self.guard is not None and not self.guard.check_gradients(loss, batch, number):
            self.optimizer.skip_step()  # type: ignore[attr-defined]
            return None
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return logits.detach(), loss.detach()

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """Logits [b] of this rank's part of a batch."""
        return self._forward(batch)

    def _forward(self, batch: Batch) -> Tensor:
        dtype = _AUTOCAST[self.dense_dtype]
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            logits = self.model(batch.dense, batch.sparse)
        scores: Tensor = logits.float()
        return scores
