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
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shardlab.comm.collectives import gather_objects_json
from shardlab.comm.groups import Groups
from shardlab.errors import CheckpointError
from shardlab.train.manifest import MANIFEST, BaseEntry, ChunkEntry, Manifest, TableEntry
from shardlab.train.retention import STAGING, check_new, prune
from shardlab.train.rng import capture_rng
from shardlab.train.state_tree import flatten_state
from shardlab.train.table_files import TableFiles, file_bytes, snapshot_chunks, whole_chunks
from shardlab.train.tensor_file import (
    FileEntry,
    sync_folder,
    write_bytes,
    write_json,
    write_tensors,
)

if TYPE_CHECKING:
    from shardlab.sharded import ShardedModel
    from shardlab.sharded.row_watch import ChangedRows, Snapshot

#: Rows that steps change before they are written may take this share of a rank's tables ...
_BUFFER_SHARE = 0.05
#: ... and this many bytes in any case.
_BUFFER_BYTES = 32 << 20
#: An incremental checkpoint of more than this share of the rows would save little: a full one.
_WORTH_SHARE = 0.5
_POLL_S = 0.01
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


@dataclass
class _Job:
    """One save under way on this rank.

    Attributes:
        state: small files: (name without suffix, tree, tensors); a tree of None: tensors alone.
        tables: writes this rank's rows.
    """

    path: Path
    groups: Groups
    manifest: Manifest
    keep: int | None
    tables: TableFiles
    snapshots: dict[str, Snapshot]
    state: list[tuple[str, Any, dict[str, Tensor]]]
    written: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None
    digest: str | None = None

    @property
    def staging(self) -> Path:
        """Where files go before they are published."""
        return self.path.parent / (STAGING + self.path.name)

    def write(self) -> None:
        """Writes this rank's files, and their list last; an error is kept for `finish`."""
        part: dict[str, Any] = {"error": True}
        try:
            part = self._write_files()
        except Exception as error:
            self.error = error
        finally:
            for snapshot in self.snapshots.values():
                snapshot.close()
            self._write_part(part)
            self.written.set()

    def _write_files(self) -> dict[str, Any]:
        for name, snapshot in self.snapshots.items():
            self.tables.write(snapshot_chunks(name, snapshot))
        files = list(self.tables.files)
        for name, tree, tensors in self.state:
            if tree is not None:
                files.append(write_json(self.staging / f"{name}.json", tree))
            files.append(write_tensors(self.staging / f"{name}.safetensors", tensors))
        return {"files": [vars(entry) for entry in files],
                "chunks": [vars(entry) for entry in self.tables.chunks]}

    def _write_part(self, part: dict[str, Any]) -> None:
        target = self._part(self.groups.rank)
        beside = target.with_suffix(".new")
        try:
            write_json(beside, part)
            beside.rename(target)
        except OSError as error:
            self.error = self.error or error

    def _part(self, rank: int) -> Path:
        return self.staging / f"part-{rank:05d}.json"

    def write_and_publish(self) -> None:
        """What the thread does."""
        try:
            self.write()
            if self.groups.rank == 0 and self.error is None:
                self.publish()
        except BaseException as error:
            self.error = error

    def publish(self) -> None:
        """Gathers the parts of all ranks and makes them a checkpoint; not where one failed."""
        parts = [self._await_part(rank) for rank in range(self.groups.world_size)]
        whole = [part for part in parts if part is not None and "error" not in part]
        if len(whole) < len(parts):
            return
        manifest = Manifest(
            world_size=self.manifest.world_size, tables=self.manifest.tables,
            files=tuple(FileEntry(**entry) for part in whole for entry in part["files"]),
            chunks=tuple(ChunkEntry.from_dict(entry) for part in whole for entry in part["chunks"]),
            optimizer=self.manifest.optimizer, steps=self.manifest.steps, base=self.manifest.base)
        manifest.check_files(self.staging)
        manifest.check_coverage()
        for rank in range(self.groups.world_size):
            self._part(rank).unlink()
        text = manifest.to_bytes()
        write_bytes(self.staging / MANIFEST, text)
        sync_folder(self.staging)
        self.staging.rename(self.path)
        sync_folder(self.path.parent)
        self.digest = json.loads(text)["xxh3"]
        if self.keep is not None:
            prune(self.path.parent, self.keep)

    def _await_part(self, rank: int) -> dict[str, Any] | None:
        while not self.cancelled.is_set():
            try:
                part: dict[str, Any] = json.loads(self._part(rank).read_bytes())
                return part
            except FileNotFoundError:
                time.sleep(_POLL_S)
        return None

    def check(self) -> None:
        """Raises what went wrong on this rank."""
        if self.error is not None:
            raise self.error


class CheckpointWriter:
    """Saves the checkpoints of one run; every rank makes one and calls it alike.

    Args:
        model: the sharded model.
        optimizer: the optimiser that `shardlab.shard` returned.
        groups: the ranks of the job.
        options: how to save.

    Attributes:
        stalled_s: seconds that training has waited for checkpoints so far.
    """

    def __init__(self, model: ShardedModel, optimizer: torch.optim.Optimizer, groups: Groups,
                 options: SaveOptions | None = None) -> None:
        self._model, self._optimizer, self._groups = model, optimizer, groups
        self._options = options or SaveOptions()
        self._job: _Job | None = None
        self._thread: threading.Thread | None = None
        self._changed: dict[str, ChangedRows | None] = {}
        #: Collections whose changes some rank does not know: they are saved whole by all.
        self._unmarked: set[str] = set()
        self._base: BaseEntry | None = None
        self._since_full = 0
        self.stalled_s = 0.0

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
        taken: list[_Job] = []
        try:
            together(self._groups, what, lambda: taken.append(self._take(path, base, extra)))
        except CheckpointError:
            self._drop(taken[0] if taken else None)
            raise
        self._job = taken[0]
        if self._options.background:
            self._thread = threading.Thread(target=self._job.write_and_publish, daemon=True,
                                            name="checkpoint")
            self._thread.start()
        else:
            self._job.write()
            self.finish()
        self.stalled_s += time.perf_counter() - started
        return path

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Lets a save that is under way come to its end, without a word between ranks.

        For runs that end by an error: the other ranks may not be there any more.
        """
        if self._thread is not None and self._job is not None:
            self._job.written.wait()
            self._thread.join(_LEAVE_S)
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
        job, thread = self._job, self._thread
        if job is None:
            return
        started, what = time.perf_counter(), f"save {job.path}"
        self._job = self._thread = None
        published = False
        try:
            job.written.wait()
            together(self._groups, what, job.check)
            if thread is not None:
                thread.join()
            elif self._groups.rank == 0:
                _keep_error(job, job.publish)
            digest = together(self._groups, what, lambda: (job.check(), job.digest)[1])[0]
            published = True
        finally:
            job.cancelled.set()
            self._drop(job)
            if not published:
                self._base = None
            elif self._options.incremental and job.manifest.base is None:
                self._base, self._since_full = BaseEntry(job.path.name, digest), 0
            self.stalled_s += time.perf_counter() - started + sum(
                snapshot.waited_s for snapshot in job.snapshots.values())

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
        marks = [changed for changed in self._changed.values() if changed is not None]
        there = (path.parent / base.name / MANIFEST).is_file() if self._groups.rank == 0 else True
        unmarked = [name for name, changed in self._changed.items() if changed is None]
        ranks = gather_objects_json([
            there, sum(changed.count() for changed in marks),
            sum(mark.numel() for changed in marks for mark in changed.marks), unmarked],
            self._groups)
        self._unmarked = {name for rank in ranks for name in rank[3]}
        worth = sum(rank[1] for rank in ranks) <= _WORTH_SHARE * sum(rank[2] for rank in ranks)
        return base if worth and all(rank[0] for rank in ranks) else None

    def _take(self, path: Path, base: BaseEntry | None, extra: dict[str, Any] | None) -> _Job:
        """Freezes this rank's state: nothing that training changes from now on gets into it."""
        manifest = Manifest(
            world_size=self._groups.world_size, tables=tables_of(self._model), files=(), chunks=(),
            optimizer=_kind_of(self._optimizer),
            steps=int(getattr(self._optimizer, "steps_taken", 0)), base=base)
        staging = path.parent / (STAGING + path.name)
        job = _Job(path, self._groups, manifest, self._options.keep,
                   TableFiles(staging, self._groups.rank, file_bytes=file_bytes(
                       max((c.tier_bytes().total for c in self._model.collections().values()),
                           default=0)), replica=self._model.replica), {}, self._state(extra))
        if base is not None:
            self._since_full += 1
        try:
            self._take_tables(job)
        except BaseException:
            self._drop(job)
            raise
        return job

    def _take_tables(self, job: _Job) -> None:
        """Snapshots of all collections; one that cannot be read while it trains is written now."""
        base = job.manifest.base
        for name, collection in self._model.collections().items():
            changed = self._changed.get(name)
            whole = base is None or name in self._unmarked
            snapshot = collection.snapshot(None if whole else changed, _buffer_bytes(collection))
            if snapshot is None:
                job.tables.write(whole_chunks(name, collection))
            else:
                job.snapshots[name] = snapshot
            if self._options.incremental and base is None:
                if name not in self._changed:
                    self._changed[name] = collection.watch_changes()
                elif changed is not None:
                    changed.clear()

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

    def _drop(self, job: _Job | None) -> None:
        collections = self._model.collections()
        for name, snapshot in (job.snapshots if job is not None else {}).items():
            collections[name].drop_snapshot(snapshot)


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


def _keep_error(job: _Job, action: Callable[[], None]) -> None:
    try:
        action()
    except Exception as error:
        job.error = error
