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
from shardlab.ops.tensor_train_svd import decompose
from shardlab.ops.tensor_train_types import train_numbers
from shardlab.storage.base import TableChunk
from shardlab.storage.rows import STATE_NAMES
from shardlab.storage.tensor_train_hot import HotRows
from shardlab.storage.tensor_train_shard import TensorTrainShard
from shardlab.storage_bytes import OPTIMIZER_STATE
from shardlab.tensor_train_shapes import TensorTrainShape

#: Rows that another tensor train makes at a time.
_COLLECTED_ROWS = 1 << 18


def save_train(train: TensorTrainShard) -> TableChunk:
    """A shard's cores with their state."""
    cores, shard = train.cores, train.local.shard
    extra = {"tensor_train": torch.tensor(train_numbers(cores.shape))}
    for core in range(len(cores.shape.row_factors)):
        values = cores.read_core(core)
        extra[f"core{core}"] = values.to("cpu", copy=True)
        state = cores.read_state(core)
        for name, part in _split_state(state, values.shape[1], train.optimizer).items():
            extra[f"core{core}/{name}"] = part
    if train.hot is not None:
        extra |= {f"hot/{name}": value for name, value in _save_hot(train, train.hot).items()}
    return TableChunk(train.local.table.name, shard.row_start, shard.col_start,
                      torch.empty(0, shard.columns), {}, train.local.replicated,
                      present=torch.empty(0, dtype=torch.int64), span=shard.rows, extra=extra)


def _split_state(state: Tensor, elements: int, optimizer: str) -> dict[str, Tensor]:
    per_column, per_row = OPTIMIZER_STATE[optimizer]
    sizes = [elements] * per_column + [1] * per_row
    parts = torch.split(state, sizes, dim=1) if sizes else ()
    return {name: part.contiguous()
            for name, part in zip(STATE_NAMES[optimizer], parts, strict=True)}


def load_train(train: TensorTrainShard, chunk: TableChunk) -> None:
    """Takes the part of a chunk that lies in the shard.

    Raises:
        CheckpointError: the chunk's state is another optimiser's, or its rows cannot be taken.
    """
    shape, whole = train.cores.shape, train.cores.place.whole
    found = chunk.extra["tensor_train"].tolist() if "tensor_train" in chunk.extra else []
    if not _fits(found, whole):
        for part in chunk.dense(_COLLECTED_ROWS):
            _collect(train, part)
        return
    names = [name for name in chunk.extra if name.startswith("core0/")]
    wanted = {f"core0/{name}" for name in STATE_NAMES[train.optimizer]}
    if names and set(names) != wanted:
        raise CheckpointError(f"table {chunk.table!r}: checkpoint holds optimiser state "
                              f"{sorted(names)}, {train.optimizer} needs {sorted(wanted)}")
    count = len(shape.row_factors)
    first_slices, first_columns = found[1], found[1 + count]
    for core in range(count):
        _load_core(train, chunk, core, (chunk.row_start // whole.row_unit, first_slices,
                                        chunk.col_start // whole.column_unit, first_columns))
    if "hot/ids" in chunk.extra:
        _load_hot(train, chunk)
        if train.hot is not None:
            _load_uses(train, train.hot, chunk)


def _save_hot(train: TensorTrainShard, hot: HotRows) -> dict[str, Tensor]:
    """Cached rows, their state and the counts; rows are those of the table."""
    first = train.local.shard.row_start
    saved = {"ids": hot.ids + first, "rows": hot.rows.to("cpu", copy=True),
             "state": hot.state.to("cpu", copy=True),
             "next": torch.tensor(hot.next_choice), "norms": torch.tensor(
                 [hot.learnt, hot.lost], dtype=torch.float64)}
    uses = hot.uses.saved()
    uses["ids"] = uses["ids"] + first
    return saved | {f"uses.{name}": value for name, value in uses.items()}


def _load_hot(train: TensorTrainShard, chunk: TableChunk) -> None:
    """Takes the cached rows of a chunk that lie in the shard.

    Chunks of column pieces bring the same rows: each fills in its columns. Rows that find no room,
    because several caches became one or there is none, are folded into the cores.
    """
    shard, saved, hot = train.local.shard, chunk.extra, train.hot
    inside = (saved["hot/ids"] >= shard.row_start) & (saved["hot/ids"] < shard.row_end)
    ids, theirs = saved["hot/ids"][inside] - shard.row_start, saved["hot/rows"].shape[1]
    mine, source = _overlap(range(shard.col_start, shard.col_end),
                            range(chunk.col_start, chunk.col_start + theirs))
    if not mine or not ids.numel():
        return
    old = torch.empty(0, dtype=torch.int64) if hot is None else hot.ids.clone()
    merged = torch.unique(torch.cat([old, ids]))
    rows = train.core_rows(merged.to(train.cores.device)).cpu().clone()
    place = torch.searchsorted(merged, ids)
    to, taken = slice(mine.start, mine.stop), slice(source.start, source.stop)
    if hot is not None:
        before = torch.searchsorted(merged, old)
        rows[before] = hot.rows.cpu()
    rows[place, to] = saved["hot/rows"][inside][:, taken]
    fits = 0 if hot is None else hot.shape.capacity
    if hot is not None:
        state = torch.zeros(merged.numel(), hot.state.shape[1])
        state[before] = hot.state.cpu()
        per_column, _ = OPTIMIZER_STATE[train.optimizer]
        given = saved["hot/state"][inside]
        for part in range(per_column):
            at, first = part * hot.columns, part * theirs
            state[place, at + to.start:at + to.stop] = \
                given[:, first + taken.start:first + taken.stop]
        state[place, per_column * hot.columns:] = given[:, per_column * theirs:]
        hot.set(merged[:fits], rows[:fits], state[:fits])
    if merged.numel() > fits:
        train.fold_rows(merged[fits:], rows[fits:].to(train.cores.device))


def _load_uses(train: TensorTrainShard, hot: HotRows, chunk: TableChunk) -> None:
    """Takes the counts of a chunk's rows in the shard; of column pieces, the first brings them."""
    shard, saved = train.local.shard, chunk.extra
    hot.next_choice = int(saved["hot/next"])
    hot.learnt, hot.lost = saved["hot/norms"].tolist()
    if chunk.col_start > shard.col_start:
        return
    uses = {name.removeprefix("hot/uses."): value for name, value in saved.items()
            if name.startswith("hot/uses.")}
    inside = (uses["ids"] >= shard.row_start) & (uses["ids"] < shard.row_end)
    tracked = int(inside[:int(uses["tracked"])].sum())
    hot.uses.load({"ids": uses["ids"][inside] - shard.row_start, "counts": uses["counts"][inside],
                   "squares": uses["squares"][inside], "tracked": torch.tensor(tracked)})


def _fits(numbers: list[int], whole: TensorTrainShape) -> bool:
    """Whether the chunk's cores are parts of a table of the same factors and ranks."""
    mine = train_numbers(whole)
    count = mine[0]
    private = (1, 1 + count)  # slices and columns of the first core
    return len(numbers) == len(mine) and all(
        a == b for at, (a, b) in enumerate(zip(numbers, mine, strict=True)) if at not in private)


def _collect(train: TensorTrainShard, chunk: TableChunk) -> None:
    """Takes rows; when all of the table are there, its cores are those that come closest."""
    table, shard = train.local.table, train.local.shard
    size = (table.num_embeddings, table.embedding_dim)
    if (shard.rows, shard.columns) != size:
        raise CheckpointError(
            f"table {table.name!r}: rows of another storage, or cores of other factors, are "
            "decomposed where one rank holds the whole table; load them with sharding table_wise, "
            "save, and cut the table then")
    if train.collected is None:
        train.collected, train.missing = torch.zeros(size), size[0] * size[1]
    rows, columns = chunk.weights.shape
    train.collected[chunk.row_start:chunk.row_start + rows,
                    chunk.col_start:chunk.col_start + columns] = chunk.weights
    train.missing -= rows * columns
    if not train.missing:
        for core, values in enumerate(decompose(train.collected, train.cores.shape)):
            train.cores.write_core(core, values)
        train.collected = None


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
    _load_state(train, chunk, core, (rows, from_rows, to, source))


def _load_state(train: TensorTrainShard, chunk: TableChunk, core: int,
                area: tuple[range, range, slice, slice]) -> None:
    """Copies the state of slices; "row-wise" parts are one number per slice."""
    rows, from_rows, to, source = area
    elements = train.cores.size(core)[1]
    per_column, _ = OPTIMIZER_STATE[train.optimizer]
    state = train.cores.read_state(core)
    for number, name in enumerate(STATE_NAMES[train.optimizer]):
        if f"core{core}/{name}" not in chunk.extra:
            continue
        part = chunk.extra[f"core{core}/{name}"][from_rows.start:from_rows.stop]
        at = number * elements
        if number < per_column:
            state[rows.start:rows.stop, at + to.start:at + to.stop] = part[:, source]
        else:
            state[rows.start:rows.stop, per_column * elements] = part[:, 0]
    train.cores.write_state(core, state)


def _overlap(mine: range, theirs: range) -> tuple[range, range]:
    """What two ranges share, counted from the start of each."""
    first, last = max(mine.start, theirs.start), max(mine.start, theirs.start,
                                                     min(mine.stop, theirs.stop))
    return (range(first - mine.start, last - mine.start),
            range(first - theirs.start, last - theirs.start))
