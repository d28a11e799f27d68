"""The Criteo Kaggle tables: one per feature, full or capped."""

from __future__ import annotations

import pytest

from shardlab.errors import ConfigError
from shardlab.presets import (
    CRITEO_DENSE_NAMES,
    CRITEO_KAGGLE_CARDINALITIES,
    CRITEO_SPARSE_NAMES,
    criteo_kaggle_tables,
)
from shardlab.specs import BoundsMode, ExchangeKind, ShardingType, check_tables


def test_names_are_those_of_the_files():
    assert tuple(f"I{i}" for i in range(1, 14)) == CRITEO_DENSE_NAMES
    assert tuple(f"C{i}" for i in range(1, 27)) == CRITEO_SPARSE_NAMES
    assert len(CRITEO_KAGGLE_CARDINALITIES) == 26
    assert sum(CRITEO_KAGGLE_CARDINALITIES) == 33_762_577


def test_one_table_per_feature_with_full_cardinality():
    tables = criteo_kaggle_tables(16)
    check_tables(tables)
    assert [table.feature_names for table in tables] == [(name,) for name in CRITEO_SPARSE_NAMES]
    assert tuple(table.num_embeddings for table in tables) == CRITEO_KAGGLE_CARDINALITIES
    assert {table.embedding_dim for table in tables} == {16}


def test_cap_and_options_hold_for_every_table():
    tables = criteo_kaggle_tables(8, 100, sharding=ShardingType.ROW_WISE,
                                  exchange=ExchangeKind.POOLED, bounds=BoundsMode.IGNORE)
    assert max(table.num_embeddings for table in tables) == 100
    assert tables[8].num_embeddings == 3
    assert {(table.sharding, table.exchange, table.bounds) for table in tables} == {
        (ShardingType.ROW_WISE, ExchangeKind.POOLED, BoundsMode.IGNORE)}


@pytest.mark.parametrize(("dim", "cap", "message"), [
    (0, None, "embedding_dim must be a positive integer, found 0"),
    (4, 0, "max_rows must be a positive integer, found 0"),
])
def test_bad_sizes_are_refused(dim, cap, message):
    with pytest.raises(ConfigError, match=message):
        criteo_kaggle_tables(dim, cap)
