"""Checkpoints of a whole training: saved atomically, verified on loading, without pickle.

A checkpoint is a folder:

    manifest.json                   written last; files with sizes and CRC-32, tables, rectangles
    rows-00001-00000.safetensors    table rows and their optimiser state, written by rank 1
    dense.safetensors               dense parameters under the model's own names (rank 0)
    shared.json, .safetensors       optimiser (hyper-parameters, step count, dense state), extra
    rank-00001.json, .safetensors   random generators and buffers of rank 1

Saving writes into a hidden folder beside the target, flushes everything to the disk, and renames
it once every rank is done: at any instant the target is either absent or complete. All ranks must
see one file system. Memory stays bounded: tables are streamed in chunks.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shardlab.comm.collectives import gather_objects_json
from shardlab.comm.groups import Groups
from shardlab.errors import CheckpointError
from shardlab.train.manifest import (
    MANIFEST,
    ChunkEntry,
    Manifest,
    TableEntry,
    read_manifest,
)
from shardlab.train.rng import capture_rng, restore_rng
from shardlab.train.state_tree import flatten_state, unflatten_state
from shardlab.train.table_files import load_tables, write_tables
from shardlab.train.tensor_file import (
    FileEntry,
    read_json,
    read_tensors,
    sync_folder,
    write_json,
    write_tensors,
)

if TYPE_CHECKING:
    from shardlab.sharded import ShardedModel

_STEP_NAME = re.compile(r"step-(\d+)")
_STAGING, _TRASH = ".tmp-", ".trash-"


def save(path: str | Path, model: ShardedModel, optimizer: torch.optim.Optimizer, groups: Groups,
         extra: dict[str, Any] | None = None) -> Path:
    """Saves everything that a bit-identical continuation needs; every rank must call it.

    Args:
        path: the new checkpoint folder; it must not exist.
        model: the sharded model.
        optimizer: the optimiser that `shardlab.shard` returned.
        groups: the ranks of the job.
        extra: the caller's own state (step, data position, scheduler state ...): numbers, strings,
            lists, dicts, tensors; rank 0's is stored.

    Returns:
        The folder.

    Raises:
        CheckpointError: on every rank, naming the rank that failed and its reason. What was at
            ``path`` before is untouched.
    """
    path = Path(path)
    staging = path.parent / (_STAGING + path.name)
    _together(groups, f"save {path}", lambda: _prepare(path, staging) if groups.rank == 0 else None)
    written = _together(groups, f"save {path}",
                        lambda: _write_rank(staging, model, optimizer, groups, extra))
    manifest = Manifest(
        world_size=groups.world_size, tables=_tables_of(model),
        files=tuple(FileEntry(**entry) for rank in written for entry in rank["files"]),
        chunks=tuple(ChunkEntry.from_dict(entry) for rank in written for entry in rank["chunks"]))
    _together(groups, f"save {path}",
              lambda: _publish(staging, path, manifest) if groups.rank == 0 else None)
    return path


def load(path: str | Path, model: ShardedModel, optimizer: torch.optim.Optimizer,
         groups: Groups) -> dict[str, Any]:
    """Loads a checkpoint into a sharded model; every rank must call it.

    World size, plan and tiers may differ from those it was saved with. Random generators and
    buffers (such as batch-norm statistics) are restored on every rank that the saved job also had;
    a rank beyond keeps its generators and takes rank 0's buffers.

    Args:
        path: the checkpoint folder.
        model: the sharded model, with the same tables and dense parameters.
        optimizer: the optimiser that `shardlab.shard` returned.
        groups: the ranks of the job.

    Returns:
        The ``extra`` that was saved.

    Raises:
        CheckpointError: on every rank: missing, torn, corrupted or foreign files (by name), or
            tables and parameters that do not fit. Nothing is loaded from a file before its
            checksum was verified, but files read before a bad one have been: load another
            checkpoint before training on.
    """
    path = Path(path)
    extra: dict[str, Any] = {}
    _together(groups, f"load {path}",
              lambda: extra.update(_read_rank(path, model, optimizer, groups)))
    return extra


def latest(folder: str | Path) -> Path | None:
    """The complete checkpoint ``step-N`` with the highest N in a folder, or None."""
    found = _steps(Path(folder))
    return found[-1] if found else None


def prune(folder: str | Path, keep: int) -> None:
    """Removes all but the ``keep`` newest checkpoints, and what crashed saves left behind.

    A checkpoint is renamed before its files go, so a crash in between leaves no half of one.
    Only one process may call this, and not during a save.
    """
    folder = Path(folder)
    for path in _steps(folder)[:-keep]:
        path.rename(folder / (_TRASH + path.name))
    for path in folder.glob(".*"):
        if path.name.startswith((_STAGING, _TRASH)):
            shutil.rmtree(path)


def _steps(folder: Path) -> list[Path]:
    steps = [(int(match[1]), path) for path in folder.glob("step-*")
             if (match := _STEP_NAME.fullmatch(path.name)) and (path / MANIFEST).is_file()]
    return [path for _, path in sorted(steps)]


def _together(groups: Groups, what: str, action: Callable[[], Any]) -> list[Any]:
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


def _prepare(path: Path, staging: Path) -> None:
    if path.exists():
        raise CheckpointError(f"{path} exists; save under a new name or remove it first")
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)


def _write_rank(staging: Path, model: ShardedModel, optimizer: torch.optim.Optimizer,
                groups: Groups, extra: dict[str, Any] | None) -> dict[str, Any]:
    """Writes this rank's files; returns their entries as plain data."""
    files, chunks = write_tables(staging, model.collections(), groups.rank)
    files += _write_state(staging, f"rank-{groups.rank:05d}", {
        "rng": capture_rng(groups.device), "buffers": _buffers(model)})
    if groups.rank == 0:
        dense = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        files.append(write_tensors(staging / "dense.safetensors", dense))
        files += _write_state(staging, "shared", {"optimizer": optimizer.state_dict(),
                                                  "extra": extra or {}})
    return {"files": [vars(entry) for entry in files], "chunks": [vars(entry) for entry in chunks]}


def _write_state(folder: Path, name: str, state: dict[str, Any]) -> list[FileEntry]:
    tree, tensors = flatten_state(state)
    return [write_json(folder / f"{name}.json", tree),
            write_tensors(folder / f"{name}.safetensors", tensors)]


def _read_state(folder: Path, manifest: Manifest, name: str) -> Any:
    tree = read_json(folder, manifest.file(f"{name}.json", folder))
    return unflatten_state(tree, read_tensors(folder, manifest.file(f"{name}.safetensors", folder)))


def _publish(staging: Path, path: Path, manifest: Manifest) -> None:
    manifest.check_files(staging)
    manifest.check_coverage()
    write_json(staging / MANIFEST, manifest.to_dict())
    sync_folder(staging)
    staging.rename(path)
    sync_folder(path.parent)


def _read_rank(path: Path, model: ShardedModel, optimizer: torch.optim.Optimizer,
               groups: Groups) -> dict[str, Any]:
    manifest = read_manifest(path)
    manifest.check_tables(_tables_of(model))
    manifest.check_coverage()
    manifest.check_files(path)
    shared = _read_state(path, manifest, "shared")
    had_rank = groups.rank < manifest.world_size
    own = _read_state(path, manifest, f"rank-{groups.rank:05d}") if had_rank else None
    _load_dense(path, manifest, model, own["buffers"] if own else {})
    try:
        optimizer.load_state_dict(shared["optimizer"])
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: the optimiser state does not fit: {error}") from error
    load_tables(path, manifest, model.collections(), groups.rank)
    if own:
        restore_rng(own["rng"], groups.device)
    return shared["extra"]


def _buffers(model: ShardedModel) -> dict[str, Tensor]:
    """What ``state_dict`` has besides parameters: ranks keep these on their own."""
    buffers = {id(buffer) for buffer in model.buffers()}
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items()
            if id(tensor) in buffers}


def _load_dense(path: Path, manifest: Manifest, model: ShardedModel,
                buffers: dict[str, Tensor]) -> None:
    """Loads parameters and buffers of rank 0, and this rank's own buffers where it has some."""
    stored = read_tensors(path, manifest.file("dense.safetensors", path)) | buffers
    wanted = model.state_dict()
    problems = [f"parameter {name!r} is not in the checkpoint" for name in wanted.keys() - stored]
    problems += [f"the checkpoint has parameter {name!r}, which the model does not"
                 for name in stored.keys() - wanted.keys()]
    problems += [f"parameter {name!r} is {tuple(wanted[name].shape)} in the model, "
                 f"{tuple(stored[name].shape)} in the checkpoint"
                 for name in wanted.keys() & stored.keys()
                 if wanted[name].shape != stored[name].shape]
    if problems:
        raise CheckpointError("the checkpoint does not fit the model:\n"
                              + "\n".join(sorted(problems)))
    model.load_state_dict(stored)


def _tables_of(model: ShardedModel) -> tuple[TableEntry, ...]:
    return tuple(TableEntry(name, table.name, table.num_embeddings, table.embedding_dim)
                 for name, collection in model.collections().items()
                 for table in collection.tables)
