"""What a table is, as plain data: names, sizes, storage, and how it is looked up.

Nothing here imports torch: the planner reads these on a login node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from shardlab.errors import ConfigError
from shardlab.storage_specs import Choice, PrunedSpec, RowsSpec, StorageRequest, usual_chunks
from shardlab.storage_text import parse_storage
from shardlab.words import parse_enum

#: Rows of a table without a bound. Any int64 id is one: it is hashed to 63 bits before anything
#: else, so that rows are spread evenly however they are cut. Of n ids, two share a row with a
#: probability of n^2 / 2^64.
UNBOUNDED = (1 << 63) - 1


class PoolingType(str, Enum):
    """How the rows of a bag become one vector."""

    SUM = "sum"
    MEAN = "mean"


class BoundsMode(str, Enum):
    """What happens to an id outside [0, num_embeddings).

    ``error`` raises; ``clamp_to_zero`` reads and trains row 0; ``ignore`` drops the id, so that
    its bag is pooled as if the id were not there (a mean still divides by the bag's length).
    """

    ERROR = "error"
    CLAMP_TO_ZERO = "clamp_to_zero"
    IGNORE = "ignore"


class ShardingType(str, Enum):
    """TorchRec's names of the ways to lay a table's rectangles over ranks."""

    DATA_PARALLEL = "data_parallel"
    TABLE_WISE = "table_wise"
    COLUMN_WISE = "column_wise"
    ROW_WISE = "row_wise"
    TABLE_ROW_WISE = "table_row_wise"
    TABLE_COLUMN_WISE = "table_column_wise"
    GRID_SHARD = "grid_shard"


class ExchangeKind(str, Enum):
    """What crosses the wire: unique rows, or bags pooled at the owner.

    ``auto`` leaves it to the planner, which takes what costs less time (at world size 1:
    ``pooled``, which never copies a row).
    """

    AUTO = "auto"
    ROWS = "rows"
    POOLED = "pooled"


@dataclass(frozen=True)
class EmbeddingBagConfig:
    """One table, with TorchRec's field names where it has them.

    Attributes:
        num_embeddings: rows; ``unbounded``: any int64 id, in a pruned table with a budget in bytes.
        embedding_dim: columns, fp32 elements as the model sees them.
        name: unique name of the table.
        feature_names: features that read this table, each pooled on its own.
        pooling: how a bag becomes one vector.
        weight_init_min: lower end of the uniform initial weights; None: -1/sqrt(rows).
        weight_init_max: upper end; None: +1/sqrt(rows).
        storage: how and where rows are held; see `storage_text.parse_storage`.
        sharding: wanted sharding type, or those that the planner may choose from; None: any.
        ranks: the only ranks that may hold a part of the table; empty: all.
        max_column_splits: most column blocks that the planner may cut; None: as many as it likes.
        exchange: what crosses the wire.
        bounds: what happens to an id outside the table.
        pooling_factor: ids per bag that the planner assumes.
    """

    num_embeddings: int
    embedding_dim: int
    name: str
    feature_names: tuple[str, ...] = ()
    pooling: PoolingType = PoolingType.SUM
    weight_init_min: float | None = None
    weight_init_max: float | None = None
    storage: StorageRequest = field(default_factory=RowsSpec)
    sharding: ShardingType | tuple[ShardingType, ...] | None = None
    exchange: ExchangeKind = ExchangeKind.AUTO
    bounds: BoundsMode = BoundsMode.ERROR
    pooling_factor: float = 1.0
    ranks: tuple[int, ...] = ()
    max_column_splits: int | None = None

    def __post_init__(self) -> None:
        where = f"table {self.name!r}"
        rows: object = self.num_embeddings
        if rows == "unbounded":
            object.__setattr__(self, "num_embeddings", UNBOUNDED)
        for label, value in (("num_embeddings", self.num_embeddings),
                             ("embedding_dim", self.embedding_dim)):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{where}: {label} must be a positive integer, found {value!r}")
        names = (self.feature_names,) if isinstance(self.feature_names, str) \
            else tuple(self.feature_names)
        if len(set(names)) != len(names):
            raise ConfigError(f"{where}: feature_names repeats a name: {list(names)}")
        fields: dict[str, Any] = {
            "feature_names": names or (self.name,),
            "pooling": parse_enum(PoolingType, _plain(self.pooling), f"{where}: pooling"),
            "storage": _in_chunks(parse_storage(self.storage, f"{where}: storage"),
                                  self.embedding_dim, f"{where}: storage"),
            "sharding": _parse_sharding(self.sharding, f"{where}: sharding"),
            "ranks": _parse_ranks(self.ranks, f"{where}: ranks"),
            "exchange": parse_enum(ExchangeKind, self.exchange, f"{where}: exchange"),
            "bounds": parse_enum(BoundsMode, self.bounds, f"{where}: bounds"),
        }
        for key, value in fields.items():
            object.__setattr__(self, key, value)
        if self.embedding_dim % 2 and _holds_int4(self.storage):
            raise ConfigError(f"{where}: storage int4 packs two columns in a byte and needs an "
                              f"even embedding_dim, found {self.embedding_dim}; take "
                              f"{self.embedding_dim + 1} or int8")

        if self.num_embeddings == UNBOUNDED and not _fits_unbounded(self.storage):
            raise ConfigError(f"{where}: num_embeddings unbounded needs storage {{kind: pruned, "
                              "budget: {bytes: 2GB}, start: empty}}, which says how much of it is "
                              "held")
        splits = self.max_column_splits
        if splits is not None and (not isinstance(splits, int) or splits < 1):
            raise ConfigError(f"{where}: max_column_splits must be a positive integer, found "
                              f"{splits!r}")

    @property
    def allowed_sharding(self) -> tuple[ShardingType, ...]:
        """The sharding types that the table asks for; empty: the planner may take any."""
        if self.sharding is None:
            return ()
        return (self.sharding,) if isinstance(self.sharding, ShardingType) else self.sharding

    @property
    def init_range(self) -> tuple[float, float]:
        """(low, high) of the uniform initial weights."""
        bound = self.num_embeddings ** -0.5
        low = -bound if self.weight_init_min is None else self.weight_init_min
        high = bound if self.weight_init_max is None else self.weight_init_max
        return low, high


def _parse_sharding(value: Any, where: str) -> ShardingType | tuple[ShardingType, ...] | None:
    """A type, several types (one of a list is that type), or None for ``auto``."""
    if value is None or value == "auto":
        return None
    if isinstance(value, str):
        kind: ShardingType = parse_enum(ShardingType, value, where)
        return kind
    if not isinstance(value, Sequence) or not value:
        raise ConfigError(f"{where}: expected a sharding type or a list of them, found {value!r}")
    kinds = tuple(dict.fromkeys(parse_enum(ShardingType, entry, where) for entry in value))
    return kinds[0] if len(kinds) == 1 else kinds


def _parse_ranks(value: Any, where: str) -> tuple[int, ...]:
    ranks = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else None
    if ranks is None or not all(type(rank) is int and rank >= 0 for rank in ranks):
        raise ConfigError(f"{where}: expected a list of ranks, such as [0, 1], found {value!r}")
    return tuple(sorted(set(ranks)))


def _in_chunks(storage: StorageRequest, columns: int, where: str) -> StorageRequest:
    """The same storage with the width of its chunks, where it has chunks."""
    if isinstance(storage, Choice):
        options = tuple(_in_chunks(option, columns, where) for option in storage.options)
        return replace(storage, options=options)  # type: ignore[arg-type]  # no choice in a choice
    if not isinstance(storage, PrunedSpec):
        return storage
    chunks = storage.chunks or usual_chunks(columns)
    width = storage.width or columns // chunks
    if not width or columns % width or (not storage.width and columns % chunks):
        known = [part for part in range(1, columns + 1) if columns % part == 0]
        raise ConfigError(f"{where}: {columns} columns cannot be cut into {chunks} equal "
                          f"chunks; take chunks: one of {known}")
    return replace(storage, width=width, chunks=columns // width)


def _fits_unbounded(storage: StorageRequest) -> bool:
    options = storage.options if isinstance(storage, Choice) else (storage,)
    return all(isinstance(spec, PrunedSpec) and spec.start == "empty"
               and (spec.bytes is not None or (spec.ratio or 1.0) < 1e-3) for spec in options)


def _holds_int4(storage: StorageRequest) -> bool:
    options = storage.options if isinstance(storage, Choice) else (storage,)
    return any(level.dtype == "int4" for option in options if isinstance(option, RowsSpec)
               for level in option.levels)


def _plain(value: Any) -> Any:
    """TorchRec's enums carry upper-case values: accept them by their lower-case value."""
    inner = getattr(value, "value", value)
    return inner.lower() if isinstance(inner, str) else inner


def check_tables(tables: Sequence[EmbeddingBagConfig]) -> None:
    """Refuses duplicate table names and features that two tables claim.

    Raises:
        ConfigError: lists every clash.
    """
    problems: list[str] = []
    owner: dict[str, str] = {}
    names = [table.name for table in tables]
    problems += [f"table {name!r} is defined {names.count(name)} times"
                 for name in sorted(set(names)) if names.count(name) > 1]
    for table in tables:
        for feature in table.feature_names:
            if owner.setdefault(feature, table.name) != table.name:
                problems.append(f"feature {feature!r} is claimed by tables "
                                f"{owner[feature]!r} and {table.name!r}")
    if not tables:
        problems.append("no tables: an EmbeddingBagCollection needs at least one")
    if problems:
        raise ConfigError(problems)
