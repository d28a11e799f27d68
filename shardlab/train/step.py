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
    """

    model: ShardedModel
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | None
    device: torch.device
    dense_dtype: str
    world_size: int

    def train(self, batch: Batch, global_rows: int) -> tuple[Tensor, Tensor]:
        """One step on this rank's part of a global batch of ``global_rows`` rows.

        The loss is the mean over the global batch. Gradients are averaged over ranks, so a rank's
        part is its sum x world_size / global_rows; an empty part is 0, and the rank still takes
        part in every exchange.

        Returns:
            (logits [b], loss []), detached; the loss is this rank's part.
        """
        self.optimizer.zero_grad()
        logits = self._forward(batch)
        total = functional.binary_cross_entropy_with_logits(logits, batch.labels, reduction="sum")
        loss = total * (self.world_size / global_rows)
        with naming(self.model.groups, "dense", "all_reduce"):
            loss.backward()
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
