"""DLRM: a bottom MLP over the dense features, dot interaction with the embeddings, a top MLP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from shardlab.errors import ConfigError
from shardlab.models.mlp import MLP
from shardlab.models.tables import common_columns, feature_columns
from shardlab.ops.interaction import dot_interaction, interaction_width


class DLRM(nn.Module):
    """logit = top([b, <v_i, v_j> for i < j]) with b = bottom(dense), v = [b, embeddings].

    Source: Naumov et al., arXiv 1906.00091.

    Args:
        ebc: the tables, all of one embedding dimension D.
        num_dense: number of dense features.
        bottom_mlp: widths of the bottom MLP's layers; the last one is D.
        top_mlp: widths of the top MLP's hidden layers; the layer that gives the logit is added.

    Raises:
        ConfigError: the tables differ in dimension, or the bottom MLP does not end in it.
    """

    def __init__(self, ebc: nn.Module, num_dense: int, bottom_mlp: Sequence[int],
                 top_mlp: Sequence[int]) -> None:
        super().__init__()
        columns = common_columns(ebc, "dlrm")
        if not bottom_mlp or bottom_mlp[-1] != columns:
            raise ConfigError(f"dlrm: bottom_mlp must end in the embedding dimension {columns}, "
                              f"found {list(bottom_mlp)}")
        self.num_features = len(feature_columns(ebc))
        self.ebc = ebc
        self.bottom = MLP(num_dense, bottom_mlp)
        self.top = MLP(interaction_width(self.num_features, columns), [*top_mlp, 1],
                       last_relu=False)

    def forward(self, dense: Tensor, features: Any) -> Tensor:
        """Logits [B] of dense [B, num_dense] and the sparse features."""
        # First, so that its backward comes last: gradients of the tables then travel behind it.
        below = self.bottom(dense)
        pooled = self.ebc(features).values()
        crossed = dot_interaction(below, pooled, self.num_features)
        return self.top(crossed).squeeze(1)
