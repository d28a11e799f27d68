"""Saves the checkpoints of a run, one after another: whole or incremental, at once or behind.

    start    all ranks: staging folder, caches flushed, snapshots taken, small state copied
    write    every rank, in a thread of its own or at once: its shards, its state, its part list
    publish  rank 0, when all parts are there: manifest, flush to the disk, rename
    finish   all ranks: learn how it went

Ranks meet in `start` and `finish` only; in between they talk through the part lists in the staging
folder, so a writer's thread never takes part in a collective.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shardlab.comm.collectives import gather_objects_json
from shardlab.comm.groups import Groups
from shardlab.errors import CheckpointError
from shardlab.train.manifest import MANIFEST, BaseEntry, Manifest, TableEntry
from shardlab.train.retention import STAGING, check_new
from shardlab.train.rng import capture_rng
from shardlab.train.save_job import SaveJob
from shardlab.train.state_tree import flatten_state
from shardlab.train.table_files import TableFiles, file_bytes, other_chunks

if TYPE_CHECKING:
    from shardlab.sharded import ShardedEmbeddingBagCollection, ShardedModel
    from shardlab.sharded.row_watch import ChangedRows

#: What is copied before it is written may take this share of a rank's tables ...
_BUFFER_SHARE = 0.05
#: ... and this many bytes in any case; at most half of it what is not kept as rows.
_BUFFER_BYTES = 32 << 20
#: An incremental checkpoint of more than this share of the rows would save little: a full one.
_WORTH_SHARE = 0.5
#: Ranks that wait for each other's files meet this often.
_TICK_S = 1.0
#: Ranks that are named, of those that are waited for.
_NAMED = 8
#: A run that ends by an error waits this long for the other ranks' parts.
_LEAVE_S = 10.0


@dataclass(frozen=True)
class SaveOptions:
    """How a run saves.

    Attributes:
        background: training goes on while files are written.
        incremental: save the rows that changed since the last full checkpoint only.
        full_every: then every so manieth checkpoint is a full one.
        keep: newest checkpoints that stay; None: all.
    """

    background: bool = False
    incremental: bool = False
    full_every: int = 8
    keep: int | None = None


class CheckpointWriter:
    """Saves the checkpoints of one run; every rank makes one and calls it alike.

    Args:
        model: the sharded model.
        optimizer: the optimiser that `shardlab.shard` returned.
        groups: the ranks of the job.
        options: how to save.
        on_progress: is told in words who writes and how much is written, whenever training waits
            for files and more of them is there, on any rank.

    Attributes:
        stalled_s: seconds that training has waited for checkpoints so far.
        progress: a number that grows as files of checkpoints are written and removed: bytes.
    """

    def __init__(self, model: ShardedModel, optimizer: torch.optim.Optimizer, groups: Groups,
                 options: SaveOptions | None = None,
                 on_progress: Callable[[str], None] = lambda text: None) -> None:
        self._model, self._optimizer, self._groups = model, optimizer, groups
        self._options, self._on_progress = options or SaveOptions(), on_progress
        self._job: SaveJob | None = None
        self._changed: dict[str, ChangedRows] = {}
        self._base: BaseEntry | None = None
        self._since_full = 0
        self.stalled_s = 0.0
        self.progress = 0

    def save(self, path: str | Path, extra: dict[str, Any] | None = None) -> Path:
        """Saves a checkpoint; where the options say so, training may go on before it is complete.

        Args:
            path: the new checkpoint folder; it must not exist.
            extra: the caller's own state: numbers, strings, lists, dicts, tensors; rank 0's.

        Returns:
            The folder.

        Raises:
            CheckpointError: on every rank, naming the rank that failed and its reason; also for
                the save before, if that failed behind the caller's back.
        """
        self.finish()
        started, path = time.perf_counter(), Path(path)
        self._model.sync_replicas()
        what = f"save {path}"
        together(self._groups, what, lambda: self._prepare(path))
        base = self._choose_base(path)
        taken: list[SaveJob] = []

        def take() -> bool:
            taken.append(self._take(path, base, extra))
            return bool(taken[0].rest)

        try:
            waits = together(self._groups, what, take)
        except CheckpointError:
            self._drop(taken[0] if taken else None)
            raise
        self._job = taken[0]
        self._job.start()
        if not self._options.background:
            self.finish()
        elif any(waits):
            self._wait(self._job, self._job.taken.wait)
        self.stalled_s += time.perf_counter() - started
        return path

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Lets a save that is under way come to its end, without a word between ranks.

        For runs that end by an error: the other ranks may not be there any more.
        """
        if self._job is not None:
            self._job.written.wait()
            self._job.ended.wait(_LEAVE_S)
            self._job.cancelled.set()

    @property
    def pending(self) -> bool:
        """Whether a save may be under way; the same on every rank."""
        return self._job is not None

    def finish(self) -> None:
        """Waits for the save that is under way, if any; every rank must call it.

        Raises:
            CheckpointError: it failed, on every rank, naming the rank that failed.
        """
        job = self._job
        if job is None:
            return
        started = time.perf_counter()
        self._job = None
        published = False
        try:
            self._wait(job, job.ended.wait)
            digest = together(self._groups, f"save {job.path}",
                              lambda: (job.check(), job.digest)[1])[0]
            published = True
        finally:
            job.cancelled.set()
            self._drop(job)
            if not published:
                self._base = None
            elif self._options.incremental and job.manifest.base is None:
                self._base, self._since_full = BaseEntry(job.path.name, digest), 0
            self.stalled_s += time.perf_counter() - started + sum(
                snapshot.room.waited_s for snapshot in job.snapshots.values())

    def _wait(self, job: SaveJob, wait: Callable[[float], bool]) -> None:
        """Waits until ``wait`` is true on all ranks. Ranks meet every `_TICK_S`: so no rank is late
        at a collective, however long another one writes, and all know whether anything moves."""
        seen = None
        while True:
            done = wait(_TICK_S)
            ranks = gather_objects_json([done, self.progress], self._groups)
            left = [rank for rank, (there, _) in enumerate(ranks) if not there]
            if not left:
                return
            if ranks != seen:
                seen = ranks
                whom = ", ".join(map(str, left[:_NAMED]))
                written = sum(progress for _, progress in ranks) / 1e6
                self._on_progress(f"checkpoint {job.path.name}, which rank {whom} writes, "
                                  f"{written:,.0f} MB so far")

    # ------------------------------------------------------------------ parts of save
    def _prepare(self, path: Path) -> None:
        if self._groups.rank != 0:
            return
        check_new(path)
        staging = path.parent / (STAGING + path.name)
        if staging.exists():
            shutil.rmtree(staging)
        staging.mkdir(parents=True)

    def _choose_base(self, path: Path) -> BaseEntry | None:
        """The full checkpoint to build on, or None: save a full one. The same on every rank."""
        base = self._base
        if base is None or self._since_full + 1 >= self._options.full_every:
            return None
        marks = self._changed.values()
        there = (path.parent / base.name / MANIFEST).is_file() if self._groups.rank == 0 else True
        known = all(changed.is_known for changed in marks)
        ranks = gather_objects_json([there and known, sum(changed.count() for changed in marks),
                                     sum(changed.num_rows() for changed in marks)], self._groups)
        rows = sum(rank[2] for rank in ranks)  # none: all tables are of kinds that are saved whole
        worth = rows > 0 and sum(rank[1] for rank in ranks) <= _WORTH_SHARE * rows
        return base if worth and all(rank[0] for rank in ranks) else None

    def _take(self, path: Path, base: BaseEntry | None, extra: dict[str, Any] | None) -> SaveJob:
        """Freezes this rank's state: nothing that training changes from now on gets into it."""
        manifest = Manifest(
            world_size=self._groups.world_size, tables=tables_of(self._model), files=(), chunks=(),
            optimizer=_kind_of(self._optimizer),
            steps=int(getattr(self._optimizer, "steps_taken", 0)), base=base)
        staging = path.parent / (STAGING + path.name)
        job = SaveJob(path, self._groups, manifest, self._options.keep,
                   TableFiles(staging, self._groups.rank, file_bytes=file_bytes(
                       max((c.tier_bytes().total for c in self._model.collections().values()),
                           default=0)), told=self._tell, replica=self._model.replica),
                      self._state(extra))
        if base is not None:
            self._since_full += 1
        try:
            self._take_tables(job)
        except BaseException:
            self._drop(job)
            raise
        return job

    def _take_tables(self, job: SaveJob) -> None:
        """Snapshots of the rows of all collections; copies of what is not kept as rows."""
        base = job.manifest.base
        for name, collection in self._model.collections().items():
            changed = self._changed.get(name)
            room = _buffer_bytes(collection)
            job.snapshots[name] = snapshot = collection.snapshots.take(
                None if base is None else changed, room)
            snapshot.room.limit -= self._take_others(job, name, collection, room // 2)
            if self._options.incremental and base is None:
                if changed is None:
                    self._changed[name] = collection.snapshots.watch_changes()
                else:
                    changed.clear()

    def _take_others(self, job: SaveJob, name: str, collection: ShardedEmbeddingBagCollection,
                     room: int) -> int:
        """Copies what is not kept as rows where that fits into ``room`` bytes; the rest is written
        before training goes on. Returns bytes that were copied."""
        copied = 0
        chunks = other_chunks(name, collection)
        for named in chunks:
            if named.chunk.replicated and self._groups.rank:
                continue  # rank 0 writes these
            if not self._options.background or copied + named.num_bytes > room:
                job.rest.append(chain([named], chunks))
                break
            copied += named.num_bytes
            job.copies.append(named.copy())
        return copied

    def _tell(self, count: int) -> None:
        self.progress += count

    def _state(self, extra: dict[str, Any] | None) -> list[tuple[str, Any, dict[str, Tensor]]]:
        rank = self._groups.rank
        state = [_frozen(f"rank-{rank:05d}", {"rng": capture_rng(self._groups.device),
                                              "buffers": _buffers(self._model)})]
        if rank == 0:
            dense = {name: tensor.to("cpu", copy=True)
                     for name, tensor in self._model.state_dict().items()}
            state += [("dense", None, dense),
                      _frozen("shared", {"optimizer": self._optimizer.state_dict(),
                                         "extra": extra or {}})]
        return state

    def _drop(self, job: SaveJob | None) -> None:
        collections = self._model.collections()
        for name, snapshot in (job.snapshots if job is not None else {}).items():
            collections[name].snapshots.drop(snapshot)


def together(groups: Groups, what: str, action: Callable[[], Any]) -> list[Any]:
    """Runs ``action`` on this rank; returns every rank's result, or raises on every rank.

    ``action`` must not communicate: a rank that failed would leave the others waiting.
    """
    result, failure = None, None
    try:
        result = action()
    except Exception as error:
        failure = error
    text = failure if failure is None or isinstance(failure, CheckpointError) else \
        f"{type(failure).__name__}: {failure}"
    outcomes = gather_objects_json([result, None if text is None else str(text)], groups)
    for rank, (_, message) in enumerate(outcomes):
        if message is not None:
            raise CheckpointError(f"cannot {what}: rank {rank}: {message}") from failure
    return [value for value, _ in outcomes]


def tables_of(model: ShardedModel) -> tuple[TableEntry, ...]:
    """The tables of a model, as a manifest lists them."""
    from shardlab.storage_specs import describe_storage

    entries = []
    for name, collection in model.collections().items():
        storages = {entry.table: describe_storage(entry.storage)
                    for entry in collection.plan.tables}
        entries += [TableEntry(name, table.name, table.num_embeddings, table.embedding_dim,
                               storages[table.name], table.pooling.value,
                               tuple(table.feature_names)) for table in collection.tables]
    return tuple(entries)


def _frozen(name: str, state: dict[str, Any]) -> tuple[str, Any, dict[str, Tensor]]:
    """A state tree whose tensors training cannot change."""
    tree, tensors = flatten_state(state)
    return name, json.loads(json.dumps(tree)), {key: value.clone()
                                                for key, value in tensors.items()}


def _buffers(model: ShardedModel) -> dict[str, Tensor]:
    """What ``state_dict`` has besides parameters: ranks keep these on their own."""
    buffers = {id(buffer) for buffer in model.buffers()}
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items()
            if id(tensor) in buffers}


def _buffer_bytes(collection: Any) -> int:
    return max(_BUFFER_BYTES, int(_BUFFER_SHARE * collection.tier_bytes().total))


def _kind_of(optimizer: torch.optim.Optimizer) -> str:
    return str(optimizer.param_groups[0].get("kind", type(optimizer).__name__))
