"""The plain face of `shardlab.ops.cache`: the rules of placing, one row after the other.

A state is the dirty bit and, above it, the LRU rank (0 = used last) or the LFU count.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shardlab.ops.cache_index import CacheIndex

_LRU = 0
_FREQUENCY = 1
_MAX_COUNT = 127
#: A full set forgets half of its counts once in 2^10 misses on average.
_DECAY_BITS = 10
#: Rarest admission: one try in 2^10.
_MAX_ADMISSION_BITS = 10
_WORD = 2**32 - 1


def locate(rows: Tensor, sets: int) -> tuple[Tensor, Tensor]:
    """(set, tag) of rows, int64: consecutive rows in consecutive sets, turned by the tag's hash."""
    tags = rows // sets
    return (rows - tags * sets + _turn(tags, sets)) % sets, tags


def rows_of(sets_of: Tensor, tags: Tensor, sets: int) -> Tensor:
    """The rows that have these tags in these sets: the inverse of `locate`."""
    return tags * sets + (sets_of - _turn(tags, sets)) % sets


def _turn(tags: Tensor, sets: int) -> Tensor:
    x = (tags * 0x9E3779B1) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return (x * sets) >> 32


def records(meta: Tensor, table: Tensor, block: int) -> Tensor:
    """uint8 [sets, ways * (tag bytes + 1)]: the index of a block, as a view."""
    offset, _, sets, ways, tag_bytes, stride = table[block, :6].tolist()
    return meta[offset:offset + sets * stride].view(sets, stride)[:, :ways * (tag_bytes + 1)]


def tags_of(part: Tensor, ways: int, tag_bytes: int) -> Tensor:
    """int64 [m, ways]: tags of records [m, stride], -1 where a slot is empty."""
    dtype, empty = (torch.int16, 0xFFFF) if tag_bytes == 2 else (torch.int32, _WORD)
    # A copy, since a record may start at an odd address.
    tags = part[:, :ways * tag_bytes].clone(memory_format=torch.contiguous_format)
    tags = tags.view(dtype).long() & empty
    return torch.where(tags == empty, -1, tags)


def clear_blocks(meta: Tensor, table: Tensor, blocks: Iterable[int]) -> None:
    """Empties blocks."""
    for block in blocks:
        ways, tag_bytes, _, policy = table[block, 3:7].tolist()
        view = records(meta, table, block)
        view[:, :ways * tag_bytes] = 255
        view[:, ways * tag_bytes:] = torch.arange(ways, dtype=torch.uint8) * 2 * (policy == _LRU)


def wrong_input(table: Tensor, segments: Tensor, ids: Tensor) -> int:
    """-1; or the position of an id that is outside its block; or -2 - s for a bad segment s."""
    last = -1
    for number, (block, start, count) in enumerate(segments.tolist()):
        if (not last < block < table.shape[0] or start < 0 or count < 0
                or start + count > ids.numel()):
            return -2 - number
        last = block
    for block, start, count in segments.tolist():
        part = ids[start:start + count]
        wrong = ((part < 0) | (part >= table[block, 1])).nonzero()
        if wrong.numel():
            return int(start + wrong[0])
    return -1


def lookup_reference(meta: Tensor, table: Tensor, segments: Tensor, ids: Tensor) -> Tensor:
    """Plain-torch face of `cache_lookup`."""
    places = torch.empty(ids.numel(), dtype=torch.int64)
    for block, start, count in segments.tolist():
        sets, ways, tag_bytes = table[block, 2:5].tolist()
        set_of, tag = locate(ids[start:start + count], sets)
        found = tags_of(records(meta, table, block)[set_of], ways, tag_bytes) == tag[:, None]
        slot = set_of * ways + found.int().argmax(1)
        places[start:start + count] = torch.where(found.any(1), slot, -1)
    return places


def place_reference(index: CacheIndex, segments: Tensor, ids: Tensor, step: int,
                    mode: tuple[bool, bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Plain face of `cache_place`; mode: (touch, write)."""
    places = torch.empty(ids.numel(), dtype=torch.int64)
    counters = torch.zeros((len(index.blocks), 6), dtype=torch.int64)
    fills: list[tuple[int, int, int]] = []
    evictions: list[tuple[int, int, int, int]] = []
    for block, start, count in segments.tolist():
        call = _BlockCall(index, block, step, mode)
        part = call.place(ids[start:start + count])
        places[start:start + count] = torch.tensor(part, dtype=torch.int64)
        fills += [(block, row, place) for row, place in call.fills]
        evictions += [(block, slot, row, dirty) for slot, row, dirty in call.evictions]
        counters[block] = torch.tensor(call.counters(count))
    return (places, torch.tensor(fills, dtype=torch.int64).view(-1, 3),
            torch.tensor(evictions, dtype=torch.int64).view(-1, 4), counters)


@dataclass
class _Set:
    """A set: what its slots hold, and the ways that this call uses."""

    tags: list[int]
    dirty: list[int]
    ages: list[int]  # LRU ranks or LFU counts
    pins: set[int] = field(default_factory=set)


class _BlockCall:
    """One call of `cache_place` on one block."""

    def __init__(self, index: CacheIndex, block: int, step: int, mode: tuple[bool, bool]) -> None:
        self.index, self.block = index, block
        self.num_sets: int
        self.ways: int
        self.tag_bytes: int
        (_, _, self.num_sets, self.ways, self.tag_bytes, _, policy, admission,
         seed) = index.table[block].tolist()
        self.lru, self.by_frequency = policy == _LRU, admission == _FREQUENCY
        self.touch, self.write = mode
        seeded = _mix((_mix(seed & _WORD) + (seed >> 32)) & _WORD)
        self.key = (_mix(seeded ^ (step & _WORD)) + (step >> 32)) & _WORD
        self.view = records(index.meta, index.table, block)
        self.sets: dict[int, _Set] = {}
        self.fills: list[tuple[int, int]] = []
        self.evictions: list[tuple[int, int, int]] = []
        self.staged: dict[int, int] = {}
        self.refused = 0

    def place(self, rows: Tensor) -> list[int]:
        set_of, tag_of = locate(rows, self.num_sets)
        ids = list(zip(rows.tolist(), set_of.tolist(), tag_of.tolist(), strict=True))
        places = [self._find(number, tag) for _, number, tag in ids]
        for i, (row, number, tag) in enumerate(ids):
            if places[i] < 0:
                places[i] = self._bring_up(row, number, tag)
        self.index.occupied[self.block] += (len(self.fills) - len(self.staged)
                                            - len(self.evictions))
        for number, found in self.sets.items():
            self._store(number, found)
        return places

    def counters(self, count: int) -> list[int]:
        misses, staged = len(self.fills), len(self.staged)
        free = self.num_sets * self.ways - int(self.index.occupied[self.block])
        conflicts = min(staged - self.refused + len(self.evictions), free)
        return [count - misses, misses, conflicts, len(self.evictions), self.refused, staged]

    def _find(self, number: int, tag: int) -> int:
        found = self._load(number)
        if tag not in found.tags:
            return -1
        way = found.tags.index(tag)
        found.pins.add(way)
        if self.touch:
            self._use(found, way)
        found.dirty[way] |= self.write
        return number * self.ways + way

    def _use(self, found: _Set, way: int) -> None:
        ages = found.ages
        if self.lru:
            found.ages = [age + (age < ages[way]) for age in ages]
            found.ages[way] = 0
            return
        if ages[way] == _MAX_COUNT:
            found.ages = [age // 2 for age in ages]
        found.ages[way] += 1

    def _bring_up(self, row: int, number: int, tag: int) -> int:
        found = self._load(number)
        if tag in found.tags:  # by an earlier occurrence
            return number * self.ways + found.tags.index(tag)
        if row in self.staged:
            return self.staged[row]
        way = self._make_room(row, number, found)
        if way is None:
            place = self.num_sets * self.ways + len(self.staged)
            self.staged[row] = place
        else:
            place = number * self.ways + way
            found.tags[way], found.dirty[way] = tag, int(self.write)
            found.pins.add(way)
        self.fills.append((row, place))
        return place

    def _make_room(self, row: int, number: int, found: _Set) -> int | None:
        """A free way with the newcomer's age, or None."""
        count = 1
        if -1 in found.tags:
            way = found.tags.index(-1)
        else:
            drawn = self._draw(row)
            victim = self._victim(drawn >> 20, found)
            if victim is None:
                return None
            way, weakest = victim, found.ages[victim]
            if not self.lru and drawn % 2**_DECAY_BITS == 0:
                found.ages = [age // 2 for age in found.ages]
            if self.by_frequency:
                if (drawn >> 10) % 2**min(weakest, _MAX_ADMISSION_BITS):
                    self.refused += 1
                    return None
                count = weakest // 2 + 1
            left = rows_of(torch.tensor(number), torch.tensor(found.tags[way]), self.num_sets)
            self.evictions.append((number * self.ways + way, int(left), found.dirty[way]))
        if self.lru:
            self._use(found, way)
        else:
            found.ages[way] = count
        return way

    def _victim(self, tie: int, found: _Set) -> int | None:
        """Who leaves first; tie: 12 random bits."""
        start = tie * self.ways >> 12
        order = [(start + i) % self.ways for i in range(self.ways)]
        free = [way for way in order if way not in found.pins]
        if not free:
            return None
        if self.lru:
            return max(free, key=lambda way: found.ages[way])
        return min(free, key=lambda way: found.ages[way])

    def _draw(self, row: int) -> int:
        """32 random bits of (seed, step, row)."""
        return _mix((_mix((row & _WORD) ^ self.key) + (row >> 32)) & _WORD)

    def _load(self, number: int) -> _Set:
        if number not in self.sets:
            record = self.view[number:number + 1]
            states = record[0, self.ways * self.tag_bytes:].tolist()
            self.sets[number] = _Set(tags_of(record, self.ways, self.tag_bytes)[0].tolist(),
                                     [state & 1 for state in states],
                                     [state >> 1 for state in states])
        return self.sets[number]

    def _store(self, number: int, found: _Set) -> None:
        tags = b"".join((tag & (256**self.tag_bytes - 1)).to_bytes(self.tag_bytes, "little")
                        for tag in found.tags)
        states = bytes(2 * age + dirty for age, dirty in zip(found.ages, found.dirty, strict=True))
        self.view[number] = torch.frombuffer(bytearray(tags + states), dtype=torch.uint8)


def _mix(x: int) -> int:
    x = (x ^ (x >> 16)) * 0x7FEB352D & _WORD
    x = (x ^ (x >> 15)) * 0x846CA68B & _WORD
    return x ^ (x >> 16)
