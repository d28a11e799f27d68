"""Checkpoints of a whole training: saved atomically, verified on loading, without pickle.

A checkpoint is a folder:

    manifest.json                   written last; files with sizes and XXH3, tables, rectangles
    rows-00001-00000.safetensors    table rows and their optimiser state, written by rank 1
    dense.safetensors               dense parameters under the model's own names (rank 0)
    shared.json, .safetensors       optimiser (hyper-parameters, step count, dense state), extra
    rank-00001.json, .safetensors   random generators and buffers of rank 1

Saving writes into a hidden folder beside the target, flushes everything to the disk, and renames
it once every rank is done: at any instant the target is either absent or complete. All ranks must
see one file system. Memory stays bounded: tables are streamed in chunks. `CheckpointWriter` saves
the checkpoints of a run in the background, and only what changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shardlab.comm.groups import Groups
from shardlab.errors import CheckpointError
from shardlab.train.checkpoint_reader import CheckpointReader
from shardlab.train.checkpoint_writer import CheckpointWriter, tables_of, together
from shardlab.train.rng import restore_rng
from shardlab.train.table_files import load_tables

if TYPE_CHECKING:
    from shardlab.sharded import ShardedModel


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
    return CheckpointWriter(model, optimizer, groups).save(path, extra)


def load(path: str | Path, model: ShardedModel, optimizer: torch.optim.Optimizer,
         groups: Groups) -> dict[str, Any]:
    """Loads a checkpoint into a sharded model; every rank must call it.

    World size, plan, tiers and storages may differ from those it was saved with. Random generators
    and buffers (such as batch-norm statistics) are restored on every rank that the saved job also
    had; a rank beyond keeps its generators and takes rank 0's buffers.

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
    together(groups, f"load {path}",
             lambda: extra.update(_read_rank(path, model, optimizer, groups)))
    return extra


def _read_rank(path: Path, model: ShardedModel, optimizer: torch.optim.Optimizer,
               groups: Groups) -> dict[str, Any]:
    reader = CheckpointReader(path)
    reader.manifest.check_tables(tables_of(model))
    shared = reader.state("shared")
    had_rank = groups.rank < reader.manifest.world_size
    own = reader.state(f"rank-{groups.rank:05d}") if had_rank else None
    _load_dense(reader, model, own["buffers"] if own else {})
    if groups.rank == 0:  # files of ranks that are not there any more: damage is damage
        reader.verify_states()
    try:
        if shared["optimizer"] is not None:  # an imported one has none: the job's own goes on
            optimizer.load_state_dict(shared["optimizer"])
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: the optimiser state does not fit: {error}") from error
    load_tables(reader, model.table_groups.rank, model.collections())
    if own and own["rng"] is not None:
        restore_rng(own["rng"], groups.device)
    return dict(shared["extra"])


def _load_dense(reader: CheckpointReader, model: ShardedModel, buffers: dict[str, Tensor]) -> None:
    """Loads parameters and buffers of rank 0, and this rank's own buffers where it has some."""
    stored = reader.dense() | buffers
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
