"""Shapes of tensor-train tables: how rows and columns split over cores (arXiv 2101.11714).

A table of rows x columns is a product of cores; core k is [r_(k-1), p_k, q_k, r_k], with the
product of the row factors p at least the rows, and that of the column factors q the columns. Choice
of factors: own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shardlab.errors import ConfigError

_MAX_PADDING = 0.02
_MIN_CORES, _MAX_CORES = 2, 4
_ID_BYTES = 8
#: Rows that are counted for each row that is cached: a row may come up from far below.
_TRACKED = 4
#: Fewer noted uses would have to be sorted several times a batch.
_MIN_PENDING = 4096


@dataclass(frozen=True)
class TensorTrainShape:
    """Factors and ranks of a table.

    Attributes:
        rows: of the table.
        row_factors: rows of every core; their product is at least ``rows``.
        column_factors: columns of every core; their product is the table's columns.
        ranks: r_0 ... r_d, the first and last 1; no bond is wider than either side can use.
    """

    rows: int
    row_factors: tuple[int, ...]
    column_factors: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def core_shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """(r_(k-1), p_k, q_k, r_k) of every core."""
        return tuple(zip(self.ranks[:-1], self.row_factors, self.column_factors, self.ranks[1:],
                         strict=True))

    @property
    def parameters(self) -> int:
        """Elements of all cores."""
        return sum(math.prod(shape) for shape in self.core_shapes)

    @property
    def padded_rows(self) -> int:
        """Rows that the cores can express."""
        return math.prod(self.row_factors)

    @property
    def padding(self) -> float:
        """Share of rows that the cores express beyond the table's."""
        return self.padded_rows / self.rows - 1

    @property
    def columns(self) -> int:
        """Columns of the table."""
        return math.prod(self.column_factors)

    @property
    def row_unit(self) -> int:
        """Rows that share a first digit: where a table may be cut by rows."""
        return math.prod(self.row_factors[1:])

    @property
    def column_unit(self) -> int:
        """Columns that share the first core's column: where a table may be cut by columns."""
        return math.prod(self.column_factors[1:])

    def piece(self, rows: int, columns: int) -> TensorTrainShape:
        """The shape of a rectangle: a part of the first core, and all of the others.

        Args:
            rows: of the rectangle, which begins at a multiple of `row_unit`.
            columns: of the rectangle, which begins at a multiple of `column_unit`.

        Raises:
            ConfigError: the columns are no multiple of `column_unit`.
        """
        if columns % self.column_unit:
            raise ConfigError(f"tensor_train of {self.columns} columns in factors "
                              f"{list(self.column_factors)}: cannot be cut to {columns} columns; "
                              f"cut at multiples of {self.column_unit}")
        return TensorTrainShape(
            rows, (-(-rows // self.row_unit), *self.row_factors[1:]),
            (columns // self.column_unit, *self.column_factors[1:]), self.ranks)


def tensor_train_shape(rows: int, columns: int, rank: int | Sequence[int], cores: int = 3,
                       row_factors: Sequence[int] | None = None,
                       column_factors: Sequence[int] | None = None) -> TensorTrainShape:
    """Factors and ranks for a table; factors that are not given are near-balanced and ascend.

    Chosen row factors express at most 2 % more rows than the table has.

    Args:
        rows: of the table.
        columns: of the table.
        rank: of every bond, or one per bond.
        cores: 2 to 4.
        row_factors: rows of every core.
        column_factors: columns of every core.

    Raises:
        ConfigError: sizes that are not positive, or factors and ranks that do not fit.
    """
    where = f"tensor_train of {rows} rows x {columns} columns"
    if rows < 1 or columns < 1 or not _MIN_CORES <= cores <= _MAX_CORES:
        raise ConfigError(f"{where}: expected at least one row and column and {_MIN_CORES} to "
                          f"{_MAX_CORES} cores, found {cores} cores")
    p = _checked(row_factors, cores, f"{where}: row_factors") or _balanced(rows, cores)
    q = _checked(column_factors, cores, f"{where}: column_factors") or \
        _exact(columns, cores)
    if math.prod(p) < rows:
        raise ConfigError(f"{where}: row_factors {list(p)} express {math.prod(p)} rows, fewer than "
                          f"{rows}; raise one of them")
    if math.prod(q) != columns:
        raise ConfigError(f"{where}: column_factors {list(q)} multiply to {math.prod(q)}, not to "
                          f"{columns}")
    wanted = [rank] * (cores - 1) if isinstance(rank, int) else list(rank)
    if len(wanted) != cores - 1 or any(r < 1 for r in wanted):
        raise ConfigError(f"{where}: {cores} cores have {cores - 1} bonds, each of rank 1 or more; "
                          f"found rank {rank}")
    sizes = [a * b for a, b in zip(p, q, strict=True)]
    ranks = [min(r, math.prod(sizes[:k + 1]), math.prod(sizes[k + 1:]))
             for k, r in enumerate(wanted)]
    return TensorTrainShape(rows, p, q, (1, *ranks, 1))


@dataclass(frozen=True)
class HotRowsShape:
    """Sizes of the cache of hot rows in front of the cores of a rectangle.

    Attributes:
        capacity: rows that it holds.
        tracked: rows whose uses are counted between two choices of the cached ones.
        pending: uses that are noted before they are added to the counts.
    """

    capacity: int
    tracked: int
    pending: int

    @property
    def index_bytes(self) -> int:
        """Ids of cached rows; ids and counts of the others."""
        return _ID_BYTES * (self.capacity + 2 * (self.tracked + self.pending))


def hot_rows_shape(rows: int, fraction: float) -> HotRowsShape:
    """Sizes for a cache of a share of the rows, at least one."""
    capacity = max(1, min(rows, round(fraction * rows)))
    tracked = min(rows, _TRACKED * capacity)
    return HotRowsShape(capacity, tracked, min(rows, max(tracked, _MIN_PENDING)))


def _checked(factors: Sequence[int] | None, cores: int, where: str) -> tuple[int, ...]:
    if not factors:
        return ()
    if len(factors) != cores or any(not isinstance(f, int) or f < 1 for f in factors):
        raise ConfigError(f"{where}: expected {cores} positive integers, one per core, found "
                          f"{list(factors)}")
    return tuple(factors)


def _balanced(rows: int, parts: int) -> tuple[int, ...]:
    """Ascending factors with a product in [rows, 1.02 rows] and the smallest largest factor."""
    return _search(rows, parts, int(rows * (1 + _MAX_PADDING)))


def _search(rows: int, parts: int, limit: int) -> tuple[int, ...]:
    if parts == 1:
        return (rows,)
    best: tuple[int, ...] = ()
    for first in range(_root(rows, parts), 0, -1):
        rest = -(-rows // first)
        # The others' largest factor grows as the first one shrinks.
        if best and _root(rest - 1, parts - 1) + 1 >= best[-1]:
            break
        found = tuple(sorted((first, *_search(rest, parts - 1, limit // first))))
        if math.prod(found) <= limit and (not best or found[-1] < best[-1]):
            best = found
    return best or (1,) * (parts - 1) + (rows,)


def _root(value: int, degree: int) -> int:
    """Floor of the root, at least 1 for a positive value, exact."""
    if value < 1:
        return 0
    guess = round(value ** (1 / degree))
    while guess**degree > value:
        guess -= 1
    while (guess + 1) ** degree <= value:
        guess += 1
    return guess


def _exact(columns: int, parts: int) -> tuple[int, ...]:
    """Ascending factors with exactly this product and the smallest largest factor."""
    if parts == 1:
        return (columns,)
    found = [tuple(sorted((first, *_exact(columns // first, parts - 1))))
             for first in range(1, _root(columns, parts) + 1) if columns % first == 0]
    return min(found, key=lambda factors: (factors[-1], sum(factors)))
