"""What a table is, as plain data: names, sizes, storage chain, and the bytes they take.

Nothing here imports torch: the planner reads these on a login node. The byte arithmetic is the
one the runtime allocates by, so that prediction and allocation cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from shardlab.errors import ConfigError, nearest_name


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

    ``auto`` leaves it to the planner's byte count (at world size 1: ``pooled``, which never
    copies a row).
    """

    AUTO = "auto"
    ROWS = "rows"
    POOLED = "pooled"


class Tier(str, Enum):
    """Where bytes live. On a machine without CUDA, ``hbm`` is an arena of host memory."""

    HBM = "hbm"
    DDR = "ddr"
    SSD = "ssd"


#: Bytes per stored element, by storage dtype.
DTYPE_BYTES: dict[str, int] = {"fp32": 4}

#: fp32 optimiser state of one row: (elements per column, elements per row).
OPTIMIZER_STATE: dict[str, tuple[int, int]] = {
    "sgd": (0, 0),
    "adagrad": (1, 0),
    "row_wise_adagrad": (0, 1),
    "adam": (2, 0),
    "row_wise_adam": (1, 1),
}
_STATE_BYTES = 4


@dataclass(frozen=True)
class LevelSpec:
    """One level of a storage chain.

    Attributes:
        dtype: storage dtype of the rows on this level.
        tier: where the level lives; None lets the planner pick.
        fraction: share of the table's rows that the level can hold; the home holds 1.0.
    """

    dtype: str = "fp32"
    tier: Tier | None = None
    fraction: float = 1.0


@dataclass(frozen=True)
class RowsSpec:
    """The ``rows`` storage: a chain of levels from near to far; the last one is the home."""

    levels: tuple[LevelSpec, ...] = (LevelSpec(),)

    @property
    def home(self) -> LevelSpec:
        """The level that holds every row."""
        return self.levels[-1]


StorageSpec = RowsSpec


def parse_storage(value: Any, where: str) -> StorageSpec:
    """Reads a ``storage:`` entry: a dtype name, ``{dtype: ...}``, ``{levels: [...]}`` or a spec.

    Args:
        value: what the user wrote.
        where: the place to name in an error, such as "table 'user': storage".

    Raises:
        ConfigError: unknown word, key, dtype or tier, or a chain that this version cannot hold.
    """
    if isinstance(value, RowsSpec):
        return value
    if value is None:
        return RowsSpec()
    if isinstance(value, str):
        return RowsSpec((_parse_level({"dtype": value}, where),))
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected a dtype name or a mapping, found {value!r}")
    if "levels" not in value:
        return RowsSpec((_parse_level(value, where),))
    _refuse_unknown(value, ["levels"], where)
    levels = value["levels"]
    if not isinstance(levels, Sequence) or isinstance(levels, str) or len(levels) != 1:
        raise ConfigError(f"{where}.levels: expected a list of one level, found {levels!r}")
    return RowsSpec((_parse_level(levels[0], f"{where}.levels[0]"),))


def _parse_level(value: Mapping[str, Any], where: str) -> LevelSpec:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected a mapping, found {value!r}")
    _refuse_unknown(value, ["dtype", "tier"], where)
    dtype = value.get("dtype", "fp32")
    if dtype not in DTYPE_BYTES:
        known = ", ".join(DTYPE_BYTES)
        raise ConfigError(f"{where}: unknown storage dtype {dtype!r}; known: {known}")
    tier = value.get("tier")
    return LevelSpec(dtype=dtype, tier=None if tier is None else parse_enum(Tier, tier, where))


def _refuse_unknown(value: Mapping[str, Any], known: list[str], where: str) -> None:
    for key in value:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{nearest_name(str(key), known)}; "
                              f"known: {', '.join(known)}")


def parse_enum(kind: type[Enum], value: Any, where: str) -> Any:
    """Returns the member of ``kind`` with this value, or raises a ConfigError listing them."""
    try:
        return kind(value)
    except ValueError:
        known = [member.value for member in kind]
        raise ConfigError(f"{where}: unknown {kind.__name__} {value!r}"
                          f"{nearest_name(str(value), known)}; known: {', '.join(known)}") from None


@dataclass(frozen=True)
class EmbeddingBagConfig:
    """One table, with TorchRec's field names where it has them.

    Attributes:
        num_embeddings: rows.
        embedding_dim: columns, fp32 elements as the model sees them.
        name: unique name of the table.
        feature_names: features that read this table, each pooled on its own.
        pooling: how a bag becomes one vector.
        weight_init_min: lower end of the uniform initial weights; None: -1/sqrt(rows).
        weight_init_max: upper end; None: +1/sqrt(rows).
        storage: how and where rows are held; see `parse_storage`.
        sharding: wanted sharding type; None lets the planner choose.
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
    storage: StorageSpec = field(default_factory=RowsSpec)
    sharding: ShardingType | None = None
    exchange: ExchangeKind = ExchangeKind.AUTO
    bounds: BoundsMode = BoundsMode.ERROR
    pooling_factor: float = 1.0

    def __post_init__(self) -> None:
        where = f"table {self.name!r}"
        for label, value in (("num_embeddings", self.num_embeddings),
                             ("embedding_dim", self.embedding_dim)):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{where}: {label} must be a positive integer, found {value!r}")
        names = (self.feature_names,) if isinstance(self.feature_names, str) \
            else tuple(self.feature_names)
        if len(set(names)) != len(names):
            raise ConfigError(f"{where}: feature_names repeats a name: {list(names)}")
        sharding = None if self.sharding in (None, "auto") else \
            parse_enum(ShardingType, self.sharding, f"{where}: sharding")
        fields: dict[str, Any] = {
            "feature_names": names or (self.name,),
            "pooling": parse_enum(PoolingType, _plain(self.pooling), f"{where}: pooling"),
            "storage": parse_storage(self.storage, f"{where}: storage"),
            "sharding": sharding,
            "exchange": parse_enum(ExchangeKind, self.exchange, f"{where}: exchange"),
            "bounds": parse_enum(BoundsMode, self.bounds, f"{where}: bounds"),
        }
        for key, value in fields.items():
            object.__setattr__(self, key, value)

    @property
    def init_range(self) -> tuple[float, float]:
        """(low, high) of the uniform initial weights."""
        bound = self.num_embeddings ** -0.5
        low = -bound if self.weight_init_min is None else self.weight_init_min
        high = bound if self.weight_init_max is None else self.weight_init_max
        return low, high


def _plain(value: Any) -> Any:
    """TorchRec's enums carry upper-case values: accept them by their lower-case value."""
    inner = getattr(value, "value", value)
    return inner.lower() if isinstance(inner, str) else inner


@dataclass(frozen=True)
class RecordLayout:
    """Bytes of one row of a shard: payload, then optimiser state, in one span.

    Attributes:
        payload_bytes: the row itself in its storage dtype.
        state_bytes: fp32 optimiser state.
        record_bytes: distance between two rows.
    """

    payload_bytes: int
    state_bytes: int

    @property
    def record_bytes(self) -> int:
        return self.payload_bytes + self.state_bytes


def record_layout(level: LevelSpec, columns: int, optimizer: str) -> RecordLayout:
    """Layout of a record of ``columns`` elements under an optimiser of `OPTIMIZER_STATE`."""
    per_column, per_row = OPTIMIZER_STATE[optimizer]
    return RecordLayout(payload_bytes=columns * DTYPE_BYTES[level.dtype],
                        state_bytes=_STATE_BYTES * (per_column * columns + per_row))


@dataclass(frozen=True)
class TierBytes:
    """Bytes held on each tier."""

    hbm: int = 0
    ddr: int = 0
    ssd: int = 0

    def __add__(self, other: TierBytes) -> TierBytes:
        return TierBytes(self.hbm + other.hbm, self.ddr + other.ddr, self.ssd + other.ssd)

    @property
    def total(self) -> int:
        return self.hbm + self.ddr + self.ssd


def tier_bytes(spec: StorageSpec, tier: Tier, rows: int, columns: int,
               optimizer: str) -> TierBytes:
    """Bytes that a shard of ``rows`` x ``columns`` takes when its home lies on ``tier``."""
    size = rows * record_layout(spec.home, columns, optimizer).record_bytes
    return TierBytes(**{tier.value: size})


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
