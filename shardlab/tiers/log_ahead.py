"""Records of a log that were read ahead, and those that were written since. Source: own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardlab.tiers.disk_tickets import ReadTicket
from shardlab.tiers.log_segments import Ints

Bytes = NDArray[np.uint8]
Bools = NDArray[np.bool_]
#: (keys, places, moment) -> whether rows still lie there and were not written since.
#: Bytes of recent writes to hold; what was written earlier is read from disk again.
_MOST_RECENT = 16 << 20
Unchanged = Callable[[Ints, Ints, int], Bools]


@dataclass(frozen=True)
class _Ahead:
    """One read: keys ascend."""

    keys: Ints
    places: Ints
    records: Bytes
    ticket: ReadTicket
    moment: int


def _find(keys: Ints, wanted: Ints) -> tuple[Ints, Bools]:
    """(position in sorted ``keys``, whether it is there) of every wanted key."""
    if not keys.size:
        return np.zeros(wanted.size, dtype=np.int64), np.zeros(wanted.size, dtype=np.bool_)
    at = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
    return at, np.asarray(keys[at] == wanted)


class ReadAhead:
    """What was read ahead and perhaps not used yet: the batch that comes, and the one behind it."""

    def __init__(self) -> None:
        self._reads: deque[_Ahead] = deque(maxlen=2)

    def __bool__(self) -> bool:
        return bool(self._reads)

    @property
    def oldest(self) -> int:
        """The moment of the oldest read that is held."""
        return self._reads[0].moment

    def add(self, keys: Ints, places: Ints, records: Bytes, ticket: ReadTicket,
            moment: int) -> None:
        """Holds a read, and lets go of the one before the last."""
        self._reads.append(_Ahead(keys, places, records, ticket, moment))

    def clear(self) -> None:
        """Lets go of all."""
        self._reads.clear()

    def has(self, keys: Ints, places: Ints, unchanged: Unchanged) -> Bools:
        """Whether the last read has the newest records of rows, or will have."""
        if not self._reads:
            return np.zeros(keys.size, dtype=np.bool_)
        last = self._reads[-1]
        _, found = _find(last.keys, keys)
        return found & unchanged(keys, places, last.moment)

    def take(self, keys: Ints, places: Ints, wanted: Ints, out: Bytes,
             unchanged: Unchanged) -> Bools:
        """Copies what is still the newest to ``out``.

        Args:
            keys: int64 [n].
            places: int64 [n], where the rows lie now.
            wanted: positions to fill.
            out: uint8 [n, record bytes].
            unchanged: tells what was written since a moment.

        Returns:
            bool [wanted], whether it was here.
        """
        done = np.zeros(wanted.size, dtype=np.bool_)
        for ahead in reversed(self._reads):
            rest = np.flatnonzero(~done)
            at, found = _find(ahead.keys, keys[wanted[rest]])
            rest, at = rest[found], at[found]
            positions = wanted[rest]
            good = unchanged(keys[positions], places[positions], ahead.moment)
            if not good.any():
                continue
            ahead.ticket.wait()
            out[positions[good]] = ahead.records[at[good]]
            done[rest[good]] = True
        return done


class RecentWrites:
    """Records that were written since the oldest read ahead: these need not be read."""

    def __init__(self) -> None:
        self._held = 0
        self._writes: deque[tuple[int, Ints, Ints, Bytes]] = deque()

    def add(self, keys: Ints, records: Bytes, moment: int) -> None:
        """Holds records that were written at a moment."""
        order = np.argsort(keys)
        self._writes.append((moment, keys[order], order, records))
        self._held += records.nbytes
        while self._held > _MOST_RECENT:
            self._held -= self._writes.popleft()[3].nbytes

    def forget(self, moment: int) -> None:
        """Lets go of what was written by a moment."""
        while self._writes and self._writes[0][0] <= moment:
            self._held -= self._writes.popleft()[3].nbytes

    def take(self, keys: Ints, wanted: Ints, out: Bytes) -> Bools:
        """Copies records to ``out`` [n, record bytes]; returns bool [wanted], whether they were
        here. The rows must not wait: what was written last is then the newest."""
        done = np.zeros(wanted.size, dtype=np.bool_)
        for _, held, order, records in reversed(self._writes):
            rest = np.flatnonzero(~done)
            if not rest.size:
                break
            at, found = _find(held, keys[wanted[rest]])
            out[wanted[rest[found]]] = records[order[at[found]]]
            done[rest[found]] = True
        return done
