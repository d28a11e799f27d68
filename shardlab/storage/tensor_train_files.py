"""Tensor trains in checkpoints: cores and state of a shard as one chunk that lists no rows.

The chunk's ``extra`` holds what makes rows. A shard takes from it whatever part of the cores it
holds, so that a table may be cut anew; a storage of another kind takes the rows that it makes.
Rows of another storage, or of cores of other factors, are collected and then decomposed
(`shardlab.ops.tensor_train_svd`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from shardlab.errors import CheckpointError
from shardlab.ops.tensor_train import train_numbers
from shardlab.storage.base import TableChunk
from shardlab.storage.rows import STATE_NAMES
from shardlab.storage.tensor_train import TensorTrainShard
from shardlab.storage_bytes import OPTIMIZER_STATE


def save_train(train: TensorTrainShard, optimizer: str) -> TableChunk:
    """A shard's cores with their state."""
    cores, shard = train.cores, train.local.shard
    extra = {"tensor_train": torch.tensor(train_numbers(cores.shape))}
    for core in range(len(cores.shape.row_factors)):
        values = cores.read_core(core)
        extra[f"core{core}"] = values.to("cpu", copy=True)
        state = cores.read_state(core)
        for name, part in _split_state(state, values.shape[1], optimizer).items():
            extra[f"core{core}/{name}"] = part
    return TableChunk(train.local.table.name, shard.row_start, shard.col_start,
                      torch.empty(0, shard.columns), {}, train.local.replicated,
                      present=torch.empty(0, dtype=torch.int64), span=shard.rows, extra=extra)


def _split_state(state: Tensor, elements: int, optimizer: str) -> dict[str, Tensor]:
    per_column, per_row = OPTIMIZER_STATE[optimizer]
    sizes = [elements] * per_column + [1] * per_row
    parts = torch.split(state, sizes, dim=1) if sizes else ()
    return {name: part.contiguous()
            for name, part in zip(STATE_NAMES[optimizer], parts, strict=True)}


def load_train(train: TensorTrainShard, chunk: TableChunk, optimizer: str) -> None:
    """Takes the part of a chunk that lies in the shard.

    Raises:
        CheckpointError: the chunk's state is another optimiser's, or its rows cannot be taken.
    """
    if "tensor_train" not in chunk.extra:
        raise CheckpointError(f"table {chunk.table!r}: rows cannot be loaded into a tensor train")
    shape, whole = train.cores.shape, train.cores.place.whole
    found = chunk.extra["tensor_train"].tolist()
    names = [name for name in chunk.extra if name.startswith("core0/")]
    wanted = {f"core0/{name}" for name in STATE_NAMES[optimizer]}
    if names and set(names) != wanted:
        raise CheckpointError(f"table {chunk.table!r}: checkpoint holds optimiser state "
                              f"{sorted(names)}, {optimizer} needs {sorted(wanted)}")
    count = len(shape.row_factors)
    first_slices, first_columns = found[1], found[1 + count]
    train.forget_products()
    for core in range(count):
        _load_core(train, chunk, core, (chunk.row_start // whole.row_unit, first_slices,
                                        chunk.col_start // whole.column_unit, first_columns))


def _load_core(train: TensorTrainShard, chunk: TableChunk, core: int,
               area: tuple[int, int, int, int]) -> None:
    """Copies the slices and columns of a core that both have."""
    cores = train.cores
    before, _, _, after = cores.shape.core_shapes[core]
    mine = cores.place.area(core)
    theirs = mine if core else (range(area[0], area[0] + area[1]),
                                range(area[2], area[2] + area[3]))
    (rows, from_rows), (columns, from_columns) = (
        _overlap(here, there) for here, there in zip(mine, theirs, strict=True))
    if not rows or not columns:
        return
    # The first core has r_0 = 1, so a slice is [q][r]; of the others whole slices are taken.
    width = after if core == 0 else before * after
    to = slice(columns.start * width, columns.stop * width)
    source = slice(from_columns.start * width, from_columns.stop * width)
    values = cores.read_core(core).clone()
    values[rows.start:rows.stop, to] = chunk.extra[f"core{core}"][
        from_rows.start:from_rows.stop, source].to(values.device)
    cores.write_core(core, values)
    state, at = cores.read_state(core), 0
    for name, part in chunk.extra.items():
        if not name.startswith(f"core{core}/"):
            continue
        elements = values.shape[1] if part.shape[1] > 1 or state.shape[1] - at >= values.shape[1] \
            else 1
        target = slice(at + to.start, at + to.stop) if elements > 1 else slice(at, at + 1)
        taken = source if elements > 1 else slice(0, 1)
        state[rows.start:rows.stop, target] = part[from_rows.start:from_rows.stop, taken]
        at += elements
    cores.write_state(core, state)


def _overlap(mine: range, theirs: range) -> tuple[range, range]:
    """What two ranges share, counted from the start of each."""
    first, last = max(mine.start, theirs.start), max(mine.start, theirs.start,
                                                     min(mine.stop, theirs.stop))
    return (range(first - mine.start, last - mine.start),
            range(first - theirs.start, last - theirs.start))
