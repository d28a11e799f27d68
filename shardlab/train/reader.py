"""What the trainer needs of a reader; the readers of `shardlab.data` have it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from shardlab.data.batch import Batch


class Reader(Protocol):
    """This rank's part of a set of rows, in batches.

    Every rank yields the same number of batches in a pass, empty ones where its rows have ended,
    because every step is an exchange between all ranks.
    """

    def __iter__(self) -> Iterator[Batch]:
        """Batches from where `seek` was last set (at first: the start) to the end of the pass."""

    def seek(self, position: int) -> None:
        """The next pass starts at this `Batch.position`; 0 is the start."""

    def __len__(self) -> int:
        """Batches of a whole pass."""

    def global_rows(self, position: int) -> int:
        """Rows of all ranks together in the batch whose `Batch.position` this is."""
