"""What a model asks of its tables: how many vectors of how many columns it will get."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from shardlab.errors import ConfigError
from shardlab.specs import EmbeddingBagConfig


class HasTables(Protocol):
    """A collection of tables, sharded or not yet."""

    tables: Sequence[EmbeddingBagConfig]


def feature_columns(ebc: HasTables) -> list[int]:
    """Columns of every feature, in the order of the collection's output."""
    return [table.embedding_dim for table in ebc.tables for _ in table.feature_names]


def common_columns(ebc: HasTables, model: str) -> int:
    """The one embedding dimension of all tables.

    Raises:
        ConfigError: tables differ; names one table of every dimension.
    """
    first = {table.embedding_dim: table.name for table in reversed(ebc.tables)}
    if len(first) > 1:
        found = ", ".join(f"{name!r} has {columns}" for columns, name in sorted(first.items()))
        raise ConfigError(f"{model} multiplies embeddings with each other, so all tables need one "
                          f"embedding_dim; table {found}; dcn takes tables of any dimension")
    return next(iter(first))
