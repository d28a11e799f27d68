"""One save under way on one rank: its files are written, and rank 0 makes them a checkpoint.

Ranks talk through the part lists in the staging folder only, so that this runs in a thread that
takes no part in collectives.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shardlab.comm.groups import Groups
from shardlab.train.manifest import MANIFEST, ChunkEntry, Manifest
from shardlab.train.retention import STAGING, prune
from shardlab.train.table_files import NamedChunk, TableFiles, snapshot_chunks
from shardlab.train.tensor_file import (
    FileEntry,
    sync_folder,
    write_bytes,
    write_json,
    write_tensors,
)

if TYPE_CHECKING:
    from shardlab.sharded.row_watch import Snapshot

_POLL_S = 0.01


@dataclass
class SaveJob:
    """One save under way on this rank.

    Attributes:
        path: of the checkpoint.
        groups: the ranks.
        manifest: all but what ranks write.
        keep: newest checkpoints that stay; None: all.
        tables: writes this rank's rows.
        state: small files: (name without suffix, tree, tensors); a tree of None: tensors alone.
        snapshots: rows at the moment of the save, by collection.
        rest: chunks of tables that are written before training goes on.
        copies: copied chunks of tables.
        taken: set once training may go on.
        written: set once this rank's part is there, or has failed.
        ended: set once this rank has no more to do for it.
        cancelled: set once nobody waits for it any more.
        error: what went wrong on this rank.
        digest: of the manifest, on rank 0, once it is published.
    """

    path: Path
    groups: Groups
    manifest: Manifest
    keep: int | None
    tables: TableFiles
    state: list[tuple[str, Any, dict[str, Tensor]]]
    snapshots: dict[str, Snapshot] = field(default_factory=dict)
    rest: list[Iterator[NamedChunk]] = field(default_factory=list)
    copies: deque[NamedChunk] = field(default_factory=deque)
    taken: threading.Event = field(default_factory=threading.Event)
    written: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None
    digest: str | None = None

    @property
    def staging(self) -> Path:
        """Where files go before they are published."""
        return self.path.parent / (STAGING + self.path.name)

    def start(self) -> None:
        """Writes and publishes in a thread; errors are kept for `check`."""
        threading.Thread(target=self._run, daemon=True, name="checkpoint").start()

    def _run(self) -> None:
        try:
            if self.groups.device.type == "cuda":
                torch.cuda.set_device(self.groups.device)  # every thread has its own
            self._write()
            if self.groups.rank == 0 and self.error is None:
                self._publish()
        except BaseException as error:
            self.error = error
        finally:
            self.ended.set()

    def _write(self) -> None:
        """Writes this rank's files, and their list last."""
        part: dict[str, Any] = {"error": True}
        try:
            part = self._write_files()
        except Exception as error:
            self.error = error
        finally:
            self.taken.set()
            for snapshot in self.snapshots.values():
                snapshot.close()
            self._write_part(part)
            self.written.set()

    def _write_files(self) -> dict[str, Any]:
        self.tables.write(chain.from_iterable(self.rest))
        self.taken.set()
        copies = (self.copies.popleft() for _ in range(len(self.copies)))
        self.tables.write(chain(copies, *(snapshot_chunks(name, snapshot)
                                          for name, snapshot in self.snapshots.items())))
        files = list(self.tables.files)
        for name, tree, tensors in self.state:
            if tree is not None:
                files.append(write_json(self.staging / f"{name}.json", tree))
            files.append(write_tensors(self.staging / f"{name}.safetensors", tensors,
                                       self.tables.told))
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

    def _publish(self) -> None:
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
        self.tables.told(1)
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
            prune(self.path.parent, self.keep, self.tables.told)

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
