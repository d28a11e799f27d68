"""Bytes of pruned tables: the index of rows, the pool of chunks, the sketch; without torch.

    index   a key (4 B, or 8 B where there may be 2^32 rows), K places (4 B) and K utilities (2 B)
            a slot; 8 slots for 7 rows, or 4 for 3 where rows are one chunk of 128 B or more
    pool    payload and optimiser state of chunks, in slabs; a stack of free places (4 B each)
    sketch  a byte a cell, in lines of 64

Everything is counted in whole pages, as the system gives it. The native index (csrc/chunk_store)
grows by the same arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

PAGE_BYTES = 4096
LINE_BYTES = 64
PLACE_BYTES, UTILITY_BYTES = 4, 2
_NARROW_KEY_BYTES, _KEY_BYTES = 4, 8
#: Slots are added a sixteenth of them at a time, and some for stores of few rows.
GROWTH, FEW_SLOTS = 16, 32
#: Of so many slots one stays empty. Emptier indexes have shorter runs, which cost fewer lines of
#: the cache: that is worth the bytes where these are few beside a row's.
_DENSE_LOAD, _LOOSE_LOAD, _LOOSE_BYTES = 8, 4, 128
_TAIL_SHIFT, _MOST_TAIL = 4, 1024
#: A store of rows of several chunks keeps bytes for a stack of this part of its places.
RESERVE = 16
#: Parts of a store, as `ChunkLayout.part_bytes` names them.
PARTS = ("index", "utilities", "free_places", "payload", "state", "sketch")
#: A slab is at most this many chunks, and about a 64th of a pool.
_MOST_SLAB, _SLABS = 4096, 64
_LEAST_SLAB = 16


def in_pages(count: int) -> int:
    """Bytes in whole pages."""
    return -(-count // PAGE_BYTES) * PAGE_BYTES


def span_of(slots: int) -> int:
    """Slots of the array: those of homes, and a tail for the last runs."""
    return slots + FEW_SLOTS + min(slots >> _TAIL_SHIFT, _MOST_TAIL)


def value_bytes(chunks: int) -> int:
    """Bytes of a slot beside its key."""
    return chunks * (PLACE_BYTES + UTILITY_BYTES)


def key_bytes(rows: int) -> int:
    """Bytes of the keys of a store of some rows, which are numbered from 1."""
    return _NARROW_KEY_BYTES if rows < 1 << 8 * _NARROW_KEY_BYTES else _KEY_BYTES


def slab_chunks(budget: int, record_bytes: int) -> int:
    """Chunks that a pool of some bytes takes at a time: a power of two."""
    wanted = max(_LEAST_SLAB, min(_MOST_SLAB, budget // (_SLABS * record_bytes)))
    return 1 << (wanted.bit_length() - 1)


@dataclass(frozen=True)
class ChunkLayout:
    """What a store of chunks is made of.

    Attributes:
        chunks: chunks of a row.
        payload_bytes, state_bytes: of a chunk.
        sketch_lines: lines of 64 cells.
        shared: chunks that absent ones read as; they take the first places of the pool.
        key_bytes: of a row's key, as `key_bytes` tells.
    """

    chunks: int
    payload_bytes: int
    state_bytes: int
    sketch_lines: int = 0
    shared: int = 0
    key_bytes: int = _NARROW_KEY_BYTES

    @property
    def record_bytes(self) -> int:
        """A chunk with its optimiser state."""
        return self.payload_bytes + self.state_bytes

    @property
    def load(self) -> int:
        """Slots of which at most all but one are taken."""
        is_loose = self.chunks == 1 and self.record_bytes >= _LOOSE_BYTES
        return _LOOSE_LOAD if is_loose else _DENSE_LOAD

    def fitting_slots(self, rows: int) -> int:
        """Fewest slots for some rows."""
        return rows * self.load // (self.load - 1) + FEW_SLOTS

    def has_slot(self, rows: int, slots: int) -> bool:
        """Whether slots that some rows have taken hold one more."""
        return (rows + 1) * self.load <= slots * (self.load - 1)

    def held_bytes(self, slots: int, committed: int, free: int = 0) -> int:
        """Bytes of an index of ``slots`` and a pool of ``committed`` chunks.

        Args:
            slots: homes in the index.
            committed: chunks whose slabs are held.
            free: depth of the stack.
        """
        return sum(self.part_bytes(slots, committed, free).values())

    def part_bytes(self, slots: int, committed: int, free: int = 0) -> dict[str, int]:
        """`held_bytes` by part; arguments as there.

        Returns:
            Bytes of the ``index`` (rows and places), ``utilities``, ``free_places``, ``payload``
            and ``state`` of chunks, and the ``sketch``.
        """
        span = span_of(slots)
        utilities = UTILITY_BYTES * self.chunks * span
        return {"index": sum(self.index_bytes(span)) - utilities, "utilities": utilities,
                "free_places": in_pages(PLACE_BYTES * free),
                "payload": in_pages(committed * self.payload_bytes),
                "state": in_pages(committed * self.state_bytes),
                "sketch": in_pages(self.sketch_lines * LINE_BYTES)}

    @property
    def is_narrow(self) -> bool:
        """Whether keys are of 32 bits."""
        return self.key_bytes == _NARROW_KEY_BYTES

    @property
    def strides(self) -> tuple[int, int]:
        """Bytes from key to key and from value to value; the same where they lie together."""
        value = value_bytes(self.chunks)
        return (self.key_bytes + value,) * 2 if self.chunks == 1 else (self.key_bytes, value)

    def index_bytes(self, span: int) -> tuple[int, int]:
        """Bytes of the arrays of keys and of values of a span of slots.

        Values of rows of one chunk lie behind their keys, and take none of their own.
        """
        key, value = self.strides
        return in_pages(key * span), 0 if self.chunks == 1 else in_pages(value * span)

    def grown_bytes(self, slots: int, committed: int, free: int) -> int:
        """Bytes that a store must have before it grows to this; arguments as of `held_bytes`.

        A row of several chunks that makes way for one of fewer leaves places behind, and the stack
        needs pages for them.
        """
        reserve = committed // RESERVE + self.chunks if self.chunks > 1 else 0
        return self.held_bytes(slots, committed, max(free, reserve))

    def full_bytes(self, rows: int) -> int:
        """Bytes with every chunk of ``rows`` rows present."""
        return self.held_bytes(self.fitting_slots(rows), self.shared + rows * self.chunks)

    def likely_chunks(self, budget: int, sketch: float) -> int:
        """Chunks that a budget holds where rows have all of theirs.

        Args:
            budget: bytes.
            sketch: cells of the sketch per chunk.
        """
        return max(1, int(budget / (self.likely_bytes + sketch)))

    @property
    def likely_bytes(self) -> float:
        """Bytes of a chunk with its part of the index, where rows have all of theirs."""
        return self.record_bytes + self.slot_bytes / self.chunks

    @property
    def slot_bytes(self) -> float:
        """Bytes of the index that a row takes."""
        return (self.key_bytes + value_bytes(self.chunks)) * self.load / (self.load - 1)
