"""How a table's rows are held, as plain data: the kinds of storage.

Three kinds: ``rows`` (a chain of levels, near to far), ``tensor_train`` and ``pruned``; and
`Choice`, out of which the planner picks one. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from shardlab.tensor_train_shapes import TensorTrainShape, tensor_train_shape

_FP32_BYTES = 4


class Tier(str, Enum):
    """Where bytes live, from near to far. Without CUDA, ``hbm`` is an arena of host memory."""

    HBM = "hbm"
    DDR = "ddr"
    SSD = "ssd"


#: Storage dtype -> (bits per element, bytes of scale per row). A scale is one byte: a cache's gain
#: is measured in percent of a row of 16 elements.
DTYPES: dict[str, tuple[int, int]] = {
    "fp32": (32, 0), "fp16": (16, 0), "bf16": (16, 0), "fp8": (8, 1), "int8": (8, 1),
    "int4": (4, 1)}
STATE_DTYPES = ("fp32", "fp16", "bf16")
POLICIES = ("lfu", "lru")
ADMISSIONS = ("always", "frequency")
ROUNDINGS = ("stochastic", "nearest")
TENSOR_TRAIN_INITS = ("sampled_gaussian", "gaussian", "uniform")


@dataclass(frozen=True)
class LevelSpec:
    """One level of a chain.

    Attributes:
        dtype: storage dtype of the rows on this level, a key of `DTYPES`.
        tier: where the level lives; None lets the planner pick.
        fraction: share of the table's rows that the level can hold; the home holds 1.0.
        policy: which row leaves a full set of a cache: ``lfu`` (with decay) or ``lru``.
        ways: slots of a set of a cache; the index of 21 fills a cache line.
        admission: ``always``, or by ``frequency``: only a row that beats the set's weakest.
    """

    dtype: str = "fp32"
    tier: Tier | None = None
    fraction: float = 1.0
    policy: str = "lfu"
    ways: int = 21
    admission: str = "frequency"


@dataclass(frozen=True)
class RowsSpec:
    """The ``rows`` storage: a chain of levels from near to far; the last one is the home.

    Attributes:
        levels: caches first, then the home.
        rounding: of rows narrower than fp32: ``stochastic`` (unbiased) or ``nearest``.
        state_dtype: dtype of the optimiser state, a member of `STATE_DTYPES`.
    """

    levels: tuple[LevelSpec, ...] = (LevelSpec(),)
    rounding: str = "stochastic"
    state_dtype: str = "fp32"

    @property
    def home(self) -> LevelSpec:
        """The level that holds every row."""
        return self.levels[-1]


@dataclass(frozen=True)
class TensorTrainSpec:
    """The ``tensor_train`` storage: a table as the product of small cores (arXiv 2101.11714).

    Attributes:
        rank: inner rank of every bond, or one per bond.
        cores: how many cores, 2 to 4.
        row_factors: rows of every core; empty: chosen, with at most 2 % padding.
        column_factors: columns of every core; empty: chosen.
        dtype: of the cores, ``fp32`` or ``bf16``.
        init: initial distribution, a member of `TENSOR_TRAIN_INITS`.
        cache_fraction: share of the rows that a cache of plain fp32 rows holds; 0 for none.
        tier: where the cores live; None lets the planner pick.
    """

    rank: int | tuple[int, ...]
    cores: int = 3
    row_factors: tuple[int, ...] = ()
    column_factors: tuple[int, ...] = ()
    dtype: str = "fp32"
    init: str = "sampled_gaussian"
    cache_fraction: float = 0.0
    tier: Tier | None = None

    def shape(self, rows: int, columns: int) -> TensorTrainShape:
        """Factors and ranks for a table, or a shard of one, of this size."""
        return tensor_train_shape(rows, columns, self.rank, self.cores, self.row_factors or None,
                                  self.column_factors or None)


@dataclass(frozen=True)
class PrunedSpec:
    """The ``pruned`` storage: chunks of important rows stay, others go (arXiv 2401.04408).

    Attributes:
        ratio: bytes held as a share of the dense fp32 table's, everything counted; or None.
        bytes: bytes held by the whole table; or None. One of the two is given.
        chunks: chunks of a row.
        dtype: of the chunks, ``fp32``, ``fp16`` or ``int8``.
        tier: where the chunks live; None lets the planner pick.
    """

    ratio: float | None = None
    bytes: int | None = None
    chunks: int = 4
    dtype: str = "fp32"
    tier: Tier | None = None

    def budget(self, rows: int, columns: int) -> int:
        """Bytes of a table of this size without optimiser state."""
        dense = rows * columns * _FP32_BYTES
        return min(dense, self.bytes if self.bytes is not None else round(dense * self.ratio))


@dataclass(frozen=True)
class Choice:
    """Storages in the order of the user's preference; the planner picks one.

    Attributes:
        options: two or more, none of them a Choice.
    """

    options: tuple[RowsSpec | TensorTrainSpec | PrunedSpec, ...]


StorageSpec = RowsSpec | TensorTrainSpec | PrunedSpec
StorageRequest = StorageSpec | Choice


def place_home(spec: StorageSpec, tier: Tier) -> StorageSpec:
    """The same storage with every level that named no tier on ``tier``."""
    if not isinstance(spec, RowsSpec):
        return spec if spec.tier else replace(spec, tier=tier)
    return replace(spec, levels=tuple(
        level if level.tier else replace(level, tier=tier) for level in spec.levels))


def home_tier(spec: StorageSpec) -> Tier | None:
    """Tier of the level that holds everything, None where the planner may pick."""
    return spec.home.tier if isinstance(spec, RowsSpec) else spec.tier


def describe_storage(spec: StorageSpec) -> str:
    """A few words: ``int8 on ddr under fp32 5% on hbm``, ``tensor_train rank 32``."""
    if isinstance(spec, TensorTrainSpec):
        cache = f" + {spec.cache_fraction:.4g} cached" if spec.cache_fraction else ""
        return f"tensor_train rank {spec.rank}{cache}"
    if isinstance(spec, PrunedSpec):
        budget = f"{spec.ratio:.4g}" if spec.ratio is not None else f"{spec.bytes} B"
        return f"pruned to {budget}"
    home = spec.home.dtype + (f" on {spec.home.tier.value}" if spec.home.tier else "")
    caches = [f"{level.dtype} {level.fraction:.4g}"
              + (f" on {level.tier.value}" if level.tier else "") for level in spec.levels[:-1]]
    return " under ".join([home, *reversed(caches)])
