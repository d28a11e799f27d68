"""A store of the reference face of `shardlab.ops.chunk_index.ChunkIndex`: rows in a dictionary.

Bytes are counted as the native face counts them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from shardlab.chunk_layout import FEW_SLOTS, GROWTH
from shardlab.ops.chunk_index import ALL_ROWS, StoreShape
from shardlab.ops.chunk_marks import MARK
from shardlab.ops.chunk_numbers import HELD_AGAINST, max_slots


@dataclass
class ReferenceRow:
    """A row by chunk: places, -1 for absent ones, and bits of utilities with their mark."""

    places: list[int]
    utilities: list[int]

    def mark(self, *, marked: bool = True) -> None:
        for k, place in enumerate(self.places):
            if place >= 0:
                self.utilities[k] = self.utilities[k] & (MARK - 1) | (MARK if marked else 0)

    def is_marked(self) -> bool:
        return any(code & MARK for code in self.utilities)


@dataclass
class ReferenceStore:
    """Fields that move are those of `StoreNumbers`; ``cells`` are the sketch's."""

    shape: StoreShape
    cells: Tensor
    budget: int = 0
    slots: int = FEW_SLOTS
    #: By key: block, row, chunks.
    rows: dict[int, tuple[int, int, ReferenceRow]] = field(default_factory=dict)
    used: int = 0
    top: int = 0
    committed: int = 0
    stack: list[int] = field(default_factory=list)
    refused: int = 0
    lines: set[int] | None = None  # that counted something, once anybody asks
    draws: int = 0  # times that rows were drawn in a call
    drawn: list[tuple[np.float32, int, int]] = field(default_factory=list)  # as `_draw` gives it
    whole: bool = False  # of whole rows
    offers: int = HELD_AGAINST  # that it was held against

    def __post_init__(self) -> None:
        self.top = self.shape.layout.shared
        self.committed = self.shape.in_slabs(self.top)

    def held(self, leaving: int = 0) -> int:
        return self.shape.layout.held_bytes(self.slots, self.committed,
                                            len(self.stack) + leaving)

    def grown(self, slots: int, committed: int) -> int:
        return self.shape.layout.grown_bytes(slots, committed, len(self.stack))

    def has_place(self) -> bool:
        if self.stack or self.top < self.committed:
            return True
        more = min(self.committed + self.shape.slab, self.shape.max_chunks)
        if more == self.committed or self.grown(self.slots, more) > self.budget:
            return False
        self.committed = more
        return True

    def has_slot(self) -> bool:
        if self.shape.layout.has_slot(len(self.rows), self.slots):
            return True
        slots = self.slots + self.slots // GROWTH + FEW_SLOTS
        if slots > max_slots(self.shape) or self.grown(slots, self.committed) > self.budget:
            return False
        self.slots = slots
        self.forget_drawn()
        return True

    def forget_drawn(self) -> None:
        self.offers = HELD_AGAINST

    def take_place(self) -> int:
        self.used += 1
        if self.stack:
            return self.stack.pop()
        self.top += 1
        return self.top - 1

    def fit(self) -> int:
        return min(self.shape.layout.fitting_slots(len(self.rows)), max_slots(self.shape))

    def in_order(self, part: tuple[int, int] = ALL_ROWS,
                 ) -> Iterator[tuple[int, int, int, ReferenceRow]]:
        """(key, block, row, chunks) by hash, of the n-th of m equal parts of all hashes."""
        number, parts = part
        bits = 8 * self.shape.layout.key_bytes
        for key in sorted(self.rows):
            if (number << bits) // parts <= key < (number + 1 << bits) // parts:
                yield key, *self.rows[key]
