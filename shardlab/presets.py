"""Known sets of tables, ready for a job file: today the 26 tables of Criteo Kaggle."""

from __future__ import annotations

from shardlab.errors import ConfigError
from shardlab.specs import BoundsMode, EmbeddingBagConfig, ExchangeKind, ShardingType
from shardlab.storage_specs import RowsSpec, StorageRequest

#: Distinct values of C1..C26 over the full Criteo Kaggle week (45.8 million rows).
CRITEO_KAGGLE_CARDINALITIES: tuple[int, ...] = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992,
    5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)

#: Names of the dense columns; the files and the readers use them.
CRITEO_DENSE_NAMES: tuple[str, ...] = tuple(f"I{i}" for i in range(1, 14))

#: Names of the sparse columns, which are the features' names too.
CRITEO_SPARSE_NAMES: tuple[str, ...] = tuple(f"C{i}" for i in range(1, 27))


def criteo_kaggle_tables(
    embedding_dim: int,
    max_rows: int | None = None,
    *,
    storage: StorageRequest | None = None,
    sharding: ShardingType | tuple[ShardingType, ...] | None = None,
    exchange: ExchangeKind = ExchangeKind.AUTO,
    bounds: BoundsMode = BoundsMode.ERROR,
) -> list[EmbeddingBagConfig]:
    """The 26 Criteo Kaggle tables: table ``t_C1`` serves feature ``C1``, one id a bag.

    Args:
        embedding_dim: columns of every table, in fp32 elements.
        max_rows: rows that no table may exceed (readers hash ids to the table's size); None
            keeps the full cardinalities.
        storage: how rows are held, for every table; None: fp32 rows.
        sharding: wanted sharding type, or those allowed, for every table; None lets the planner
            choose.
        exchange: what crosses the wire, for every table.
        bounds: what happens to an id outside its table.

    Raises:
        ConfigError: ``embedding_dim`` or ``max_rows`` is not a positive integer.
    """
    if max_rows is not None and max_rows < 1:
        raise ConfigError(f"criteo_kaggle: max_rows must be a positive integer, found {max_rows}")
    return [
        EmbeddingBagConfig(
            num_embeddings=rows if max_rows is None else min(rows, max_rows),
            embedding_dim=embedding_dim, name=f"t_{feature}", feature_names=(feature,),
            storage=storage or RowsSpec(), sharding=sharding, exchange=exchange, bounds=bounds,
        )
        for feature, rows in zip(CRITEO_SPARSE_NAMES, CRITEO_KAGGLE_CARDINALITIES, strict=True)
    ]
