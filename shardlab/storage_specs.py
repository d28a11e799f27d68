"""How a table's rows are held, as plain data: the kinds of storage.

Three kinds: ``rows`` (a chain of levels, near to far), ``tensor_train`` and ``pruned``; and
`Choice`, out of which the planner picks one. Nothing here imports torch.
"""

from __future__ import annotations

import math
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
    "int4": (4, 1), "fp8_e5m2": (8, 1)}
STATE_DTYPES = ("fp32", "fp16", "bf16")
POLICIES = ("lfu", "lru")
ADMISSIONS = ("always", "frequency")
ROUNDINGS = ("stochastic", "nearest")
PRUNED_DTYPES = ("fp32", "fp16", "int8")
PRUNED_STARTS = ("empty", "dense")
PRUNED_ABSENT = ("zeros", "shared")
PRUNED_ADMITTED = ("zeros", "initial")
#: Columns of the narrowest chunk that is taken where nobody says how many.
_LEAST_COLUMNS = 16
#: `PrunedSpec.normalize` in one unit for all tables.
TOGETHER = "together"
TENSOR_TRAIN_INITS = ("isometric", "sampled_gaussian", "gaussian", "uniform")


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
        init: initial distribution, a member of `TENSOR_TRAIN_INITS`; ``isometric`` also balances
            the cores' learning rates (`shardlab.storage.tensor_train_init`).
        lr_scale: the cores' learning rate as a multiple of the rows', or of the balanced ones.
        cache_fraction: share of the rows that a cache of plain fp32 rows holds; 0 for none.
        cache_warmup_steps: optimiser steps that only count uses; then the hottest rows are cached.
        cache_refresh_steps: steps between later choices of the cached rows; 0: the first one stays.
        tier: where the cores live; None lets the planner pick.
    """

    rank: int | tuple[int, ...]
    cores: int = 3
    row_factors: tuple[int, ...] = ()
    column_factors: tuple[int, ...] = ()
    dtype: str = "fp32"
    init: str = "isometric"
    lr_scale: float = 1.0
    cache_fraction: float = 0.0
    cache_warmup_steps: int = 1000
    cache_refresh_steps: int = 0
    tier: Tier | None = None

    def shape(self, rows: int, columns: int) -> TensorTrainShape:
        """Factors and ranks for a table of this size.

        Raises:
            ConfigError: factors that do not fit.
        """
        return tensor_train_shape(rows, columns, self.rank, self.cores, self.row_factors or None,
                                  self.column_factors or None)

    def resolve(self, rows: int, columns: int) -> TensorTrainSpec:
        """The same storage with all factors and ranks of a table of this size.

        First digits that no row has are left out. What is resolved resolves to itself.

        Raises:
            ConfigError: factors that do not fit.
        """
        whole = self.shape(rows, columns)
        used = replace(self, row_factors=(-(-rows // whole.row_unit), *whole.row_factors[1:]),
                       column_factors=whole.column_factors)
        return replace(used, rank=used.shape(rows, columns).ranks[1:-1])

    def piece_shape(self, rows: int, columns: int) -> TensorTrainShape:
        """Shape of a rectangle of the table that this was resolved for.

        Unresolved, the rectangle is taken for a table.

        Raises:
            ConfigError: factors that do not fit, or a cut between the columns of a core.
        """
        known = self.row_factors and self.column_factors and isinstance(self.rank, tuple)
        spec = self if known else self.resolve(rows, columns)
        assert isinstance(spec.rank, tuple)
        whole = TensorTrainShape(math.prod(spec.row_factors), spec.row_factors,
                                 spec.column_factors, (1, *spec.rank, 1))
        return whole.piece(rows, columns)


@dataclass(frozen=True)
class PrunedSpec:
    """The ``pruned`` storage: chunks of important rows stay, others go (arXiv 2401.04408).

    Tables with the same schedule (the fields from ``start`` on) share one budget.

    Attributes:
        ratio: bytes held, everything counted, as a share of the dense fp32 weights; 1: nothing is
            ever pruned. Or None.
        bytes: bytes held by the whole table, everything counted; or None. One of the two is given.
        chunks: chunks of a row; 1 admits and evicts whole rows; 0: `usual_chunks`.
        dtype: of the chunks, ``fp32``, ``fp16`` or ``int8``.
        tier: where the chunks live; None lets the planner pick.
        width: columns of a chunk; 0: columns / chunks.
        start: ``empty``: chunks are admitted as their rows come, within the budget from the first
            step on; ``dense``: all chunks are there at first, with initial weights.
        warmup: steps before the first decision.
        ramp: steps in which a dense start's budget falls to the target.
        period: steps from decision to decision.
        gamma: what is left of a utility after a step.
        hysteresis: a chunk is admitted above the threshold of eviction by this share.
        headroom: share of the budget that a decision leaves free for admissions.
        evidence: typical accesses that stand behind an admission: where it takes more of them,
            absent rows are counted by chance, the rest for them, so that about as many are counted;
            0: all are.
        sketch: cells (bytes) for the utilities of absent chunks, per chunk that the budget holds.
        slack: share by which a rank may exceed its part of the budget.
        normalize: counts gradient norms in units of the 95th percentile of their table's, as of
            the last decision, so that tables compete fairly, and steps early and late;
            ``together``: in one unit of all tables that share a budget, the geometric mean of
            theirs, so that steps compete fairly and a table counts by how much it learns.
        absent: what an absent chunk reads as: ``zeros``, or a chunk that all absent ones of the
            table share (``shared``) and train.
        admitted: what an admitted chunk starts from: ``zeros``, or its initial weights in a dense
            table (``initial``).
    """

    ratio: float | None = None
    bytes: int | None = None
    chunks: int = 0
    dtype: str = "fp32"
    tier: Tier | None = None
    width: int = 0
    start: str = "empty"
    warmup: int = 0
    ramp: int = 1000
    period: int = 100
    gamma: float = 0.996
    hysteresis: float = 0.25
    headroom: float = 0.01
    evidence: float = 8.0
    sketch: float = 2.0
    slack: float = 0.1
    normalize: bool | str = TOGETHER
    absent: str = "zeros"
    admitted: str = "zeros"

    def budget(self, rows: int, columns: int) -> int:
        """Bytes of a table of this size, everything counted; ratio 1 stands for no budget."""
        if self.bytes is not None:
            return self.bytes
        assert self.ratio is not None
        return round(rows * columns * _FP32_BYTES * self.ratio)

    @property
    def is_full(self) -> bool:
        """Whether nothing is ever pruned."""
        return self.ratio == 1.0

    @property
    def shares_absent(self) -> bool:
        """Whether absent chunks read as one that they share."""
        return self.absent == "shared" and not self.is_full

    def chunk_columns(self, columns: int) -> int:
        """Columns of a chunk, in a table or a shard with this many columns."""
        return self.width or columns // (self.chunks or usual_chunks(columns))

    @property
    def schedule(self) -> tuple[object, ...]:
        """What tables that share a budget have in common."""
        return (self.start, self.warmup, self.ramp, self.period, self.gamma, self.hysteresis,
                self.headroom, self.slack, self.normalize, self.is_full)


def usual_chunks(columns: int) -> int:
    """Chunks of a row where nobody says: the most up to 4 of no less than 16 columns each.

    Narrower ones cost more in index and state than they save (docs/pruned.md), and less than a
    cache line of fp32 is never fetched.
    """
    return max(part for part in (1, 2, 3, 4)
               if columns % part == 0 and (part == 1 or columns // part >= _LEAST_COLUMNS))


@dataclass(frozen=True)
class Choice:
    """Storages in the order of the user's preference; the planner picks one.

    Attributes:
        options: two or more, none of them a Choice.
    """

    options: tuple[RowsSpec | TensorTrainSpec | PrunedSpec, ...]


StorageSpec = RowsSpec | TensorTrainSpec | PrunedSpec
StorageRequest = StorageSpec | Choice


def resolve_storage(request: StorageRequest, rows: int, columns: int) -> StorageRequest:
    """The same storage with whatever follows from the table's size filled in.

    Raises:
        ConfigError: a shape that the table cannot have.
    """
    if isinstance(request, Choice):
        options = tuple(resolve_storage(option, rows, columns) for option in request.options)
        return replace(request, options=options)  # type: ignore[arg-type]
    return request.resolve(rows, columns) if isinstance(request, TensorTrainSpec) else request


def cut_units(request: StorageRequest, rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns at whose multiples a table may be cut, in every storage of a request.

    Raises:
        ConfigError: a shape that the table cannot have.
    """
    if isinstance(request, Choice):
        units = [cut_units(option, rows, columns) for option in request.options]
        return math.lcm(*(unit for unit, _ in units)), math.lcm(*(unit for _, unit in units))
    if isinstance(request, TensorTrainSpec):
        shape = request.resolve(rows, columns).piece_shape(rows, columns)
        return shape.row_unit, shape.column_unit
    if isinstance(request, PrunedSpec):
        return 1, request.width or 1
    packs_two = isinstance(request, RowsSpec) and any(
        level.dtype == "int4" for level in request.levels)
    return 1, 2 if packs_two else 1


def place_home(spec: StorageSpec, tier: Tier) -> StorageSpec:
    """The same storage with every level that named no tier on ``tier``."""
    if not isinstance(spec, RowsSpec):
        return spec if spec.tier else replace(spec, tier=tier)
    return replace(spec, levels=tuple(
        level if level.tier else replace(level, tier=tier) for level in spec.levels))


def home_tier(spec: StorageSpec) -> Tier | None:
    """Tier of the level that holds everything, None where the planner may pick."""
    return spec.home.tier if isinstance(spec, RowsSpec) else spec.tier


def has_cache(spec: StorageSpec) -> bool:
    """Whether some rows are also held elsewhere than in their home."""
    if isinstance(spec, TensorTrainSpec):
        return spec.cache_fraction > 0
    return isinstance(spec, RowsSpec) and len(spec.levels) > 1


_LEAST_SHARE = 1e-9


def describe_storage(spec: StorageSpec) -> str:
    """A few words: ``int8 on ddr under fp32 5% on hbm``, ``tensor_train rank 32``."""
    if isinstance(spec, TensorTrainSpec):
        cache = f" + {spec.cache_fraction:.4g} cached" if spec.cache_fraction else ""
        ranks = (spec.rank,) if isinstance(spec.rank, int) else spec.rank
        rank = ", ".join(str(rank) for rank in (ranks[:1] if len(set(ranks)) == 1 else ranks))
        return f"tensor_train rank {rank}{cache}"
    if isinstance(spec, PrunedSpec):
        if spec.ratio is None:
            return f"pruned to {spec.bytes} B"
        # The planner takes bytes as a share, which of a table without a bound says nothing.
        return f"pruned to {spec.ratio:.4g}" if spec.ratio > _LEAST_SHARE else "pruned to its bytes"
    home = spec.home.dtype + (f" on {spec.home.tier.value}" if spec.home.tier else "")
    caches = [f"{level.dtype} {level.fraction:.4g}"
              + (f" on {level.tier.value}" if level.tier else "") for level in spec.levels[:-1]]
    return " under ".join([home, *reversed(caches)])
