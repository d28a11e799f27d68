"""How rows are rounded when they are encoded."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rounding:
    """How rows are rounded, and which random bits they take.

    Attributes:
        stochastic: rounds stochastically, else to nearest, ties to even.
        key: of the seed, the step and the table: `rounding_key` ^ `table_key`.
        row_start: row of the whole table that row 0 is, where ``rows`` is None.
        col_start: column of the whole table that column 0 is.
        rows: int64 [n]: row of the whole table of every row, or None.
    """

    stochastic: bool = True
    key: int = 0
    row_start: int = 0
    col_start: int = 0
    rows: Tensor | None = None
