"""DCN v2: explicit feature crosses of growing degree, and a deep network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shardlab.models.mlp import MLP, Layer
from shardlab.models.tables import feature_columns
from shardlab.ops.linear import linear_relu


class CrossNet(nn.Module):
    """x_{l+1} = x_0 * (W_l x_l + b_l) + x_l, elementwise product; W_l = U_l V_l^T of a low rank
    when one is given.

    Source: Wang et al., "DCN V2", arXiv 2008.13535, equations 1 and 2.

    Args:
        width: columns of x.
        num_layers: number of crosses.
        rank: rank of every W_l; None: full.
    """

    def __init__(self, width: int, num_layers: int, rank: int | None = None) -> None:
        super().__init__()
        inputs = width if rank is None else rank
        self.down = nn.ParameterList() if rank is None else nn.ParameterList(
            nn.init.xavier_normal_(torch.empty(rank, width)) for _ in range(num_layers))
        self.up = nn.ModuleList(Layer(inputs, width, relu=False) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, width] to [B, width]."""
        first = x
        for index, up in enumerate(self.up):
            low = linear_relu(x, self.down[index], None, relu=False) if len(self.down) else x
            x = first * up(low) + x
        return x


class DCN(nn.Module):
    """Cross layers and a deep network over z, the dense features and the embeddings side by side.

    Stacked (the default): logit = w . deep(cross(z)). Parallel: logit = w . [cross(z), deep(z)].

    Source: Wang et al., "DCN V2", arXiv 2008.13535, figure 1.

    Args:
        ebc: the tables, of any dimensions.
        num_dense: number of dense features.
        deep_mlp: widths of the deep network's layers; the layer that gives the logit is added.
        cross_layers: number of cross layers.
        cross_rank: rank of their weights; None: full.
        parallel: whether the deep network stands beside the cross layers, not on top of them.
    """

    def __init__(self, ebc: nn.Module, num_dense: int, deep_mlp: Sequence[int],
                 cross_layers: int = 3, cross_rank: int | None = None,
                 parallel: bool = False) -> None:
        super().__init__()
        width = num_dense + sum(feature_columns(ebc))
        self.ebc, self.parallel = ebc, parallel
        self.cross = CrossNet(width, cross_layers, cross_rank)
        self.deep = MLP(width, deep_mlp)
        deep_width = deep_mlp[-1] if deep_mlp else width
        self.logit = Layer(deep_width + width if parallel else deep_width, 1, relu=False)

    def forward(self, dense: Tensor, features: Any) -> Tensor:
        """Logits [B] of dense [B, num_dense] and the sparse features."""
        z = torch.cat([dense, self.ebc(features).values()], dim=1)
        crossed = self.cross(z)
        top = torch.cat([crossed, self.deep(z)], dim=1) if self.parallel else self.deep(crossed)
        return self.logit(top).squeeze(1)
