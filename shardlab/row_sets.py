"""Sets of rows as one line of text: ``0-63 70 81-90``, ascending; what a plan's JSON holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shardlab.errors import PlanError


def rows_to_text(rows: Sequence[int]) -> str:
    """The text of ascending rows; rows that follow each other become a range.

    Args:
        rows: ascending.
    """
    spans: list[list[int]] = []
    for row in rows:
        if spans and row == spans[-1][1] + 1:
            spans[-1][1] = row
        else:
            spans.append([row, row])
    return " ".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)


def rows_from_text(text: str) -> tuple[int, ...]:
    """The rows of a text of `rows_to_text`, as it lists them.

    Raises:
        PlanError: not such a text.
    """
    rows: list[int] = []
    for part in text.split() if isinstance(text, str) else [str(text)]:
        rows += _span(part)
    return tuple(rows)


def _span(part: str) -> Iterable[int]:
    low, dash, high = part.partition("-")
    if not low.isdigit() or (dash and not high.isdigit()):
        raise PlanError(f"rows must be written like '0-63 70', found {part!r}")
    return range(int(low), int(high or low) + 1)
