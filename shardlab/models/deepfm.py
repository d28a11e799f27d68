"""DeepFM: a linear model, a factorisation machine and a deep network over the same embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shardlab.models.mlp import MLP, Layer
from shardlab.models.tables import common_columns, feature_columns

#: Initial spread of the dense features' vectors: pairs of raw features of magnitude 10 then add
#: some 0.1 to the first logits.
_FIELD_STD = 0.01


class DeepFM(nn.Module):
    """logit = linear(z) + sum over pairs of fields i < j of <v_i, v_j> + deep(z).

    The fields are the pooled embeddings v_f and, per dense feature x_i, the vector x_i V_i; z is
    the dense features and the embeddings side by side. The pairs' sum is half of
    |sum of v|^2 - sum of |v|^2.

    The paper gives every id a weight of its own for the linear part. Here that weight is the
    embedding's product with one learned vector per feature: it needs no second table, and an
    embedding of D columns can hold the scalar in one of them.

    Source: Guo et al., "DeepFM", arXiv 1703.04247.

    Args:
        ebc: the tables, all of one embedding dimension D.
        num_dense: number of dense features.
        deep_mlp: widths of the deep network's hidden layers; the layer that gives the logit is
            added.

    Raises:
        ConfigError: the tables differ in dimension.
    """

    def __init__(self, ebc: nn.Module, num_dense: int, deep_mlp: Sequence[int]) -> None:
        super().__init__()
        self.columns = common_columns(ebc, "deepfm")
        width = num_dense + sum(feature_columns(ebc))
        self.ebc = ebc
        self.dense_vectors = nn.Parameter(torch.empty(num_dense, self.columns))
        nn.init.normal_(self.dense_vectors, std=_FIELD_STD)
        self.linear = Layer(width, 1, relu=False)
        self.deep = MLP(width, [*deep_mlp, 1], last_relu=False)

    def forward(self, dense: Tensor, features: Any) -> Tensor:
        """Logits [B] of dense [B, num_dense] and the sparse features."""
        pooled = self.ebc(features).values()
        z = torch.cat([dense, pooled], dim=1)
        return (self.linear(z) + self.deep(z)).squeeze(1) + self._pairs(dense, pooled)

    def _pairs(self, dense: Tensor, pooled: Tensor) -> Tensor:
        vectors = pooled.view(pooled.shape[0], pooled.shape[1] // self.columns, self.columns)
        total = vectors.sum(1) + dense @ self.dense_vectors
        squares = vectors.square().sum(1) + dense.square() @ self.dense_vectors.square()
        return 0.5 * (total.square() - squares).sum(1)
