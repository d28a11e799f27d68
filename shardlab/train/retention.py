"""Which checkpoints of a folder there are, which of them stay, and making one stand alone."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from shardlab.errors import CheckpointError
from shardlab.train.checkpoint_reader import CheckpointReader
from shardlab.train.manifest import ALL, MANIFEST, PRESENT, read_manifest
from shardlab.train.table_files import NamedChunk, TableFiles
from shardlab.train.tensor_file import sync_folder, tell_nobody, write_bytes

_STEP_NAME = re.compile(r"step-(\d+)")
STAGING, _TRASH = ".tmp-", ".trash-"
_WHOLE = "whole"


def latest(folder: str | Path) -> Path | None:
    """The complete checkpoint ``step-N`` with the highest N in a folder, or None."""
    found = _steps(Path(folder))
    return found[-1] if found else None


def prune(folder: str | Path, keep: int, told: Callable[[int], None] = tell_nobody) -> None:
    """Removes all but the ``keep`` newest checkpoints, and what crashed saves left behind.

    What a kept checkpoint builds on stays, too. A checkpoint is renamed before its files go, so a
    crash in between leaves no half of one. Only one process may call this, and not during a save.
    Where a manifest is damaged nobody knows what it builds on: all older checkpoints stay then.

    Args:
        folder: of the checkpoints.
        keep: how many stay.
        told: is told of every file that is removed.
    """
    folder = Path(folder)
    steps = _steps(folder)
    old = steps[:-keep]
    try:
        bases = {read_manifest(path).base for path in steps[-keep:]}
    except CheckpointError:
        old = []
    else:
        names = {base.name for base in bases if base is not None}
        old = [path for path in old if path.name not in names]
    for path in old:
        path.rename(folder / (_TRASH + path.name))
    for path in folder.glob(".*"):
        if path.name.startswith((STAGING, _TRASH)):
            for file in path.iterdir():
                file.unlink()
                told(1)
            path.rmdir()


def compact(path: str | Path) -> None:
    """Makes an incremental checkpoint a full one, in place; one that is full stays as it is.

    The merged rows are written beside the old files, then the manifest is replaced in one move: at
    any instant the checkpoint loads, with the same content. Memory is bounded by a few chunks.

    Raises:
        CheckpointError: it or its base is missing or damaged.
    """
    path = Path(path)
    reader = CheckpointReader(path)
    if reader.base is None:
        return
    for left in path.glob(f"{_WHOLE}-*"):  # of a compaction that was killed
        left.unlink()
    written = TableFiles(path, 0, prefix=_WHOLE)
    written.write(NamedChunk(collection, chunk, ALL if chunk.present is None else PRESENT)
                  for collection, chunk in reader.chunks(lambda _: True))
    old = {chunk.file for chunk in reader.manifest.chunks}
    kept = tuple(entry for entry in reader.manifest.files if entry.name not in old)
    manifest = replace(reader.manifest, files=(*written.files, *kept),
                       chunks=tuple(written.chunks), base=None)
    manifest.check_coverage()
    staging = path / (STAGING + MANIFEST)
    write_bytes(staging, manifest.to_bytes())
    sync_folder(path)
    os.replace(staging, path / MANIFEST)
    sync_folder(path)
    for name in old:
        (path / name).unlink()


def verify(path: str | Path) -> int:
    """Reads every file of a checkpoint, and of the one it builds on, against its checksum.

    Returns:
        Bytes that were judged.

    Raises:
        CheckpointError: names the first file that is missing, torn or damaged.
    """
    reader = CheckpointReader(path)
    reader.verify()
    readers = [reader] if reader.base is None else [reader, reader.base]
    return sum(entry.bytes for each in readers for entry in each.manifest.files)


def _steps(folder: Path) -> list[Path]:
    steps = [(int(match[1]), path) for path in folder.glob("step-*")
             if (match := _STEP_NAME.fullmatch(path.name)) and (path / MANIFEST).is_file()]
    return [path for _, path in sorted(steps)]


def check_new(path: Path) -> None:
    """Refuses a target that exists.

    Raises:
        CheckpointError: names it.
    """
    if path.exists():
        raise CheckpointError(f"{path} exists; save under a new name or remove it first")
