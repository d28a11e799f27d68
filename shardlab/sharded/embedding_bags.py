"""`EmbeddingBagCollection` as the user writes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from shardlab.errors import ShardLabError
from shardlab.jagged import KeyedTensor
from shardlab.specs import EmbeddingBagConfig, check_tables


class EmbeddingBagCollection(nn.Module):
    """Several tables and the features that read them; holds no weights until it is sharded.

    Args:
        tables: unique names; every feature belongs to one table.

    Raises:
        ConfigError: duplicate tables or features.
    """

    def __init__(self, tables: Sequence[EmbeddingBagConfig]) -> None:
        super().__init__()
        check_tables(tables)
        self.tables = tuple(tables)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The tables, under TorchRec's name."""
        return list(self.tables)

    @property
    def feature_names(self) -> list[str]:
        """All features, in the order of the output's columns."""
        return [name for table in self.tables for name in table.feature_names]

    def forward(self, features: Any) -> KeyedTensor:
        """Refuses to run: tables are only ever built in shards.

        Raises:
            ShardLabError: always.
        """
        raise ShardLabError(
            "this EmbeddingBagCollection holds no weights yet; call `model, optimizer = "
            "shardlab.shard(model)` first (it works on one process, too)")
