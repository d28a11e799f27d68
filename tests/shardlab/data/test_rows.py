"""Blocks of rows: keep, slice, join and turn into batches."""

from __future__ import annotations

import numpy as np
import torch

from shardlab.data.rows import Bags, RowBlock, concat_blocks, empty_block


def block(first: int, count: int, single: bool = False) -> RowBlock:
    """Rows ``first``.. with one bag of the row's index, row % 3 times (or once)."""
    rows = np.arange(first, first + count)
    lengths = None if single else (rows % 3).astype(np.int64)
    values = rows if single else np.repeat(rows, lengths)
    return RowBlock((rows % 2).astype(np.float32), rows[:, None].astype(np.float32),
                    [Bags(values.astype(np.int64), lengths)])


def bags_of(found: RowBlock) -> list[list[int]]:
    batch = found.to_batch(["f"], 0)
    return [bag.tolist() for bag in batch.sparse["f"].to_dense()]


def test_keep_and_slice_take_whole_bags() -> None:
    rows = block(0, 7)
    kept = np.array([True, False, True, True, False, True, True])
    assert bags_of(rows.keep(kept)) == [[], [2, 2], [], [5, 5], []]
    assert rows.keep(kept).skipped == 2
    assert rows.keep(np.ones(7, bool)) is rows
    assert bags_of(rows.slice(2, 6)) == [[2, 2], [], [4], [5, 5]]
    assert bags_of(rows.slice(3, 3)) == []


def test_concat_of_single_and_ragged() -> None:
    joined = concat_blocks([block(0, 3), block(3, 2, single=True), empty_block(1, 1)])
    assert bags_of(joined) == [[], [1], [2, 2], [3], [4]]
    assert joined.labels.tolist() == [0, 1, 0, 1, 0]
    single = concat_blocks([block(0, 2, single=True), empty_block(1, 1)])
    assert single.to_batch(["f"], 0).sparse.fixed_length == 1


def test_batch_moves_between_devices() -> None:
    batch = block(0, 4).to_batch(["f"], 9)
    assert len(batch) == 4
    assert batch.position == 9
    moved = batch.to("meta")
    assert moved.dense.device == moved.labels.device == moved.sparse.device() == \
        torch.device("meta")
    assert moved.position == 9
    assert torch.equal(batch.to("cpu").labels, batch.labels)
