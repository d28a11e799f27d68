"""What checkpoints take of a collection's rows while it trains on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from shardlab.sharded.row_watch import ChangedRows, RowWatch, Snapshot
from shardlab.storage import (
    KeptRoom,
    Storage,
    TableChunk,
    flush_rows,
    kept_parts,
    other_chunks,
    row_blocks,
)


class Snapshots:
    """Snapshots of a rank's rows, and which rows change between them.

    Args:
        storage: the rank's shards.
        settle: is called first: nothing is under way then, and all rows are in ``storage``.
        watches: those that are told before rows change; they come and go here.
    """

    def __init__(self, storage: Storage, settle: Callable[[], None],
                 watches: list[RowWatch]) -> None:
        self._storage, self._settle, self._watches = storage, settle, watches

    def take(self, changed: ChangedRows | None, buffer_bytes: int) -> Snapshot:
        """The rows at this moment, to be written while training goes on.

        It holds the shards that are kept as rows, or that keep themselves. Those of the other kinds
        come from `others`, which the caller takes before training goes on.

        Args:
            changed: hold only these rows, those of `watch_changes`; None: all.
            buffer_bytes: of rows that steps change before they are written.
        """
        self._settle()
        flush_rows(self._storage)
        parts, room = kept_parts(self._storage), KeptRoom(buffer_bytes)
        theirs = [None] * len(parts) if changed is None else changed.others
        taken = Snapshot(row_blocks(self._storage), changed and changed.marks, room, [
            part.snapshot(one, room) for part, one in zip(parts, theirs, strict=True)])
        self._watches.append(taken)
        return taken

    def others(self, max_bytes: int) -> Iterator[TableChunk]:
        """Streams the shards that a snapshot does not hold, right after `take`."""
        return other_chunks(self._storage, max_bytes)

    def drop(self, snapshot: Snapshot) -> None:
        """Ends a snapshot, whether it was written or not."""
        self._watches.remove(snapshot)
        snapshot.close()

    def watch_changes(self) -> ChangedRows:
        """From now on, which of the shards' rows steps change, where a snapshot holds them."""
        changed = ChangedRows(row_blocks(self._storage), [
            part.watch_changes() for part in kept_parts(self._storage)])
        self._watches.append(changed)
        return changed
