"""What pruned tables tell while they train: to a snapshot what rows were, to others what changed.

Index and pool change under one lock, which a snapshot's writer takes for a stripe of rows at a
time. A snapshot goes by rows, so places may change hands and chunks may move in between.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from shardlab.ops.unique import Uniques
from shardlab.storage.chunk_changes import ChunkChanges, Decision
from shardlab.storage.chunk_files import ChunkFiles
from shardlab.storage.chunk_snapshot import ChunkSnapshot
from shardlab.storage.kept_room import KeptRoom


class ChunkWatch:
    """Who watches pruned shards, whose storage tells everything before it does it.

    Args:
        files: of the shards.
    """

    def __init__(self, files: ChunkFiles) -> None:
        self._pruned, self._files = files.pruned, files
        self._snapshot: ChunkSnapshot | None = None
        self._changes: list[ChunkChanges] = []

    # ------------------------------------------------------------------ checkpoints
    def snapshot(self, changes: ChunkChanges | None, room: KeptRoom) -> ChunkSnapshot:
        """The shards at this moment: all rows, after which marks begin anew, or changed ones."""
        pruned = self._pruned
        with pruned.lock:
            for store in range(len(pruned.stores)):
                pruned.compact(store)
            taken = ChunkSnapshot(self._files, changes, room, self.end)
            if changes is None:
                pruned.forget_changes()
            self._snapshot = taken
            self._set_up()
        return taken

    def end(self, snapshot: ChunkSnapshot) -> None:
        """Nothing is kept for a snapshot any more."""
        with self._pruned.lock:
            if self._snapshot is snapshot:
                self._snapshot = None
                self._set_up()

    def watch_changes(self) -> ChunkChanges:
        """From now on, what changes."""
        self._changes.append(ChunkChanges(self._pruned))
        self._set_up()
        return self._changes[-1]

    def _set_up(self) -> None:
        self._pruned.index.notes_losses = self._snapshot is not None or bool(self._changes)

    # ------------------------------------------------------------------ training
    def before_update(self, uniques: Uniques) -> None:
        """These rows are about to be stepped."""
        if self._snapshot is not None:
            self._snapshot.keep(uniques)

    def after_offer(self) -> None:
        """Chunks were admitted, and places that were others' still hold what these were."""
        self._tell(decided=False)

    def _tell(self, *, decided: bool) -> None:
        if not self._pruned.index.notes_losses:
            return
        losses = self._pruned.index.take_losses()
        if not losses.rows.numel():
            return
        if self._snapshot is not None:
            self._snapshot.keep_losses(losses)
        for changes in self._changes:
            changes.note(losses, decided=decided)

    def wait(self) -> None:
        """Waits where a snapshot keeps more than it may; not under the lock."""
        if (snapshot := self._snapshot) is not None:
            snapshot.room.wait()

    def wait_to_decide(self, stores: Sequence[int]) -> None:
        """Waits until a snapshot can keep what decisions change; not under the lock."""
        if (snapshot := self._snapshot) is not None:
            snapshot.room.wait(lambda: snapshot.decision_bytes(stores))

    def decide(self, store: int, decay: float, thresholds: Tensor, key: int) -> Tensor:
        """`ChunkIndex.decide`."""
        if self._snapshot is not None:
            self._snapshot.hold(store)
        evicted = self._pruned.index.decide(store, decay, thresholds, key)
        for changes in self._changes:
            changes.decisions[store].append(Decision(decay, thresholds.clone(), key))
        self._tell(decided=True)
        return evicted
