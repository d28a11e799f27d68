"""A stand-in for a sharded collection: the same face over plain, whole tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from shardlab.jagged import KeyedTensor
from shardlab.specs import EmbeddingBagConfig

NUM_DENSE = 3


class PlainTables(nn.Module):
    """One feature per table, except the last, which two features read; ids are [B, F]."""

    def __init__(self, columns: Sequence[int] = (8, 8, 8), rows: int = 11) -> None:
        super().__init__()
        names = [("f0",), ("f1",), ("f2", "f3")]
        self.tables = [
            EmbeddingBagConfig(name=f"t{i}", num_embeddings=rows, embedding_dim=d,
                               feature_names=names[i]) for i, d in enumerate(columns)]
        self.weights = nn.ParameterList(torch.randn(rows, d) for d in columns)

    def forward(self, ids: Tensor) -> KeyedTensor:
        features = [(name, i) for i, table in enumerate(self.tables)
                    for name in table.feature_names]
        return KeyedTensor.from_tensor_list(
            [name for name, _ in features],
            [self.weights[table][ids[:, column]] for column, (_, table) in enumerate(features)])


def make_batch(batch: int) -> tuple[Tensor, Tensor]:
    """(dense [batch, NUM_DENSE], ids [batch, 4])."""
    return torch.randn(batch, NUM_DENSE), torch.randint(0, 11, (batch, 4))


def gradients(model: nn.Module, logits: Tensor) -> dict[str, Tensor]:
    """Gradient of every parameter under a loss that weighs samples differently."""
    model.zero_grad()
    (logits.float() * torch.arange(1.0, logits.numel() + 1)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}
