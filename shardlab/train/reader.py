"""What the trainer needs of a reader; the readers of `shardlab.data` have it."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from shardlab.data.batch import Batch


class Reader(Protocol):
    """This rank's part of a range of rows, in batches.

    Every rank yields the same number of batches, empty ones where it has no row, because every
    step is an exchange between all ranks. A batch's ``position`` is the row behind the global
    batch that it is a part of, so the sizes of global batches follow without asking other ranks.

    Attributes:
        start: first row of the range, counted over all ranks.
    """

    start: int

    def __iter__(self) -> Iterator[Batch]:
        """Batches from ``start`` on."""

    def __len__(self) -> int:
        """Batches from ``start`` on; the same on every rank."""


_Reader = TypeVar("_Reader", bound=Reader)


def reader_from(reader: _Reader, position: int | None) -> _Reader:
    """The same reader, starting behind a batch's ``position``; None: at its own start."""
    if position is None:
        return reader
    rest = copy(reader)
    rest.start = position
    return rest
