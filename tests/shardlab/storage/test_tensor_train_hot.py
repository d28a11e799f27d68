"""Cached rows of tensor trains: counting, choice, training, folding, and checkpoints."""

from __future__ import annotations

import pytest
import torch

from shardlab.ops.tensor_train import materialise
from shardlab.ops.tensor_train_types import TensorTrain
from shardlab.specs import ShardingType
from shardlab.storage import LocalShard, StorageOptions, build_storage
from shardlab.storage.tensor_train_hot import fold
from shardlab.storage.tensor_train_uses import UseCounts
from shardlab.storage_bytes import OPTIMIZER_STATE, tier_bytes
from shardlab.table_plan import build_table_plan
from shardlab.tensor_train_shapes import HotRowsShape, hot_rows_shape
from tests.shardlab.storage.test_tensor_train import (
    rows_of,
    step_of,
    storage_of,
    table_of,
    uniques_of,
    update,
)


def cached_table(**changes):
    return table_of(cache_fraction=0.01, cache_warmup_steps=2, **changes)


def train(storage, batches, first=1):
    for number, (ids, grads) in enumerate(batches, first):
        storage.begin_step(number)
        update(storage, ids, grads)


def batches(count, seed=0, hot=range(10)):
    """Batches in which the rows of ``hot`` always occur, and others by chance."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        others = torch.randint(1000, (20,), generator=generator).tolist()
        ids = sorted({*hot, *others})
        found.append((ids, torch.randn(len(ids), 16, generator=generator)))
    return found


@pytest.mark.parametrize("optimizer", list(OPTIMIZER_STATE))
def test_bytes_count_rows_state_and_counts(optimizer):
    storage = storage_of(cached_table(), optimizer)
    (one,) = storage.trains
    held = sum(memory.data.numel() for memory in storage.memories) + one.hot.held_bytes
    assert storage.tier_bytes().total == held
    assert held == tier_bytes(storage.shards[0].storage, 1000, 16, optimizer).total


def test_counts_find_the_most_used_rows():
    counts = UseCounts(HotRowsShape(3, 12, 16))
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        others = torch.randint(100, 10_000, (13,), generator=generator)
        ids = torch.unique(torch.cat([torch.tensor([7, 50, 99]), others]))
        counts.note(ids, torch.where(ids < 100, ids, 1), torch.full((ids.numel(),), 0.5))
    ids, found, squares = counts.hottest(3)
    assert ids.tolist() == [7, 50, 99]
    assert found.tolist() == [50 * 7, 50 * 50, 50 * 99]
    assert squares.tolist() == [25.0] * 3
    counts.halve()
    assert counts.hottest(3)[1].tolist() == [25 * 7, 25 * 50, 25 * 99]


def test_counts_take_more_rows_at_once_than_they_note():
    counts = UseCounts(HotRowsShape(2, 8, 8))
    ids = torch.arange(100)
    counts.note(ids, ids, torch.zeros(100))
    assert counts.hottest(2)[0].tolist() == [98, 99]


def test_rows_are_cached_after_the_warm_up_and_then_train_alone():
    storage = storage_of(cached_table(), "sgd")
    (one,) = storage.trains
    steps = batches(3)
    train(storage, steps[:1])
    assert one.hot.size == 0
    train(storage, steps[1:2], first=2)
    assert one.hot.ids.tolist() == list(range(10))
    before = rows_of(storage)
    torch.testing.assert_close(one.hot.rows, one.core_rows(torch.arange(10)))
    first = [one.cores.read_core(core).clone() for core in range(3)]
    storage.begin_step(3)
    grads = torch.ones(10, 16)
    update(storage, list(range(10)), grads)
    after = rows_of(storage)
    torch.testing.assert_close(after[:10], before[:10] - 0.1)
    assert torch.equal(after[10:], before[10:])
    assert all(torch.equal(one.cores.read_core(core), first[core]) for core in range(3))


def test_reads_mix_cached_rows_and_products():
    storage = storage_of(cached_table(), "sgd")
    train(storage, batches(5))
    whole = rows_of(storage)
    ids = [0, 3, 9, 10, 500, 999]
    out = torch.empty(6 * 16)
    storage.read_scattered(uniques_of(ids, 1000, 16), None, out)
    torch.testing.assert_close(out.view(6, 16), whole[ids])
    assert storage.cache_counts(0)[:2] == [3, 3]


@pytest.mark.parametrize("optimizer", list(OPTIMIZER_STATE))
def test_a_cached_row_enters_with_the_squares_of_its_gradients(optimizer):
    storage = storage_of(cached_table(), optimizer)
    steps = batches(2)
    train(storage, steps)
    state = storage.trains[0].hot.state
    squares = sum(grads[:10].square().mean(1) for _, grads in steps)
    if optimizer == "sgd":
        assert state.numel() == 0
    elif "adagrad" in optimizer:
        torch.testing.assert_close(state, squares[:, None].expand_as(state))
    else:
        torch.testing.assert_close(state[:, 16:], (squares / 2)[:, None].expand_as(state[:, 16:]))
        assert not state[:, :16].any()


def test_leaving_rows_are_folded_into_the_cores():
    table = table_of(cache_fraction=0.004, cache_warmup_steps=2, cache_refresh_steps=3, rank=32)
    storage = storage_of(table, "sgd")
    (one,) = storage.trains
    start = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    train(storage, [([5, 300, 700, 950], start)] * 2)
    assert one.hot.ids.tolist() == [5, 300, 700, 950]
    generator = torch.Generator().manual_seed(3)
    storage.begin_step(3)
    update(storage, [5, 300, 700, 950], torch.randn(4, 16, generator=generator))
    learnt = rows_of(storage)
    before = one.core_rows(torch.arange(1000)).clone()
    storage.begin_step(5)
    for _ in range(9):
        one.hot.uses.note(torch.tensor([1, 2, 3, 4]), torch.full((4,), 9), torch.zeros(4))
    update(storage, [1], torch.zeros(1, 16))
    assert one.hot.ids.tolist() == [1, 2, 3, 4]
    after = rows_of(storage)
    left = [5, 300, 700, 950]
    error = (after[left] - learnt[left]).norm() / (learnt[left] - before[left]).norm()
    assert error < 0.3
    assert one.hot.kept_share == pytest.approx(1 - float(error)**2, abs=0.05)
    # Rows that share a slice of 20 columns of bond move along, by less than they would learn.
    others = [row for row in range(1000) if row not in left]
    moved = (after[others] - before[others]).norm(dim=1).mean()
    assert moved < 0.5 * (learnt[left] - before[left]).norm(dim=1).mean()


def test_a_row_alone_in_its_slice_keeps_nearly_all():
    storage = storage_of(table_of(rank=32), "sgd")
    one = storage.trains[0]
    cores = one.cores.train(one.workspace)
    ids = torch.tensor([123])
    learnt = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    folded = TensorTrain(cores.shape, (fold(cores, ids, learnt), *cores.cores[1:]))
    change = materialise(folded, ids) - materialise(cores, ids)
    assert (change - learnt).norm() < 0.3 * learnt.norm()


@pytest.mark.parametrize("optimizer", list(OPTIMIZER_STATE))
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_resumes_bit_for_bit_with_cache_and_counts(optimizer, stop):
    def make():
        return storage_of(cached_table(cache_refresh_steps=2), optimizer)

    steps = batches(8) if stop % 2 else batches(8, hot=range(50, 60))
    whole = make()
    train(whole, steps)
    first, second = make(), make()
    train(first, steps[:stop])
    second.begin_load()
    for chunk in first.chunks(1 << 20):
        second.load_chunk(chunk)
    train(second, steps[stop:], first=stop + 1)
    assert torch.equal(rows_of(second), rows_of(whole))
    assert torch.equal(second.trains[0].hot.ids, whole.trains[0].hot.ids)


@pytest.mark.parametrize("kind", [ShardingType.ROW_WISE, ShardingType.COLUMN_WISE])
def test_a_cache_moves_to_another_cut(kind):
    source = storage_of(cached_table(), "adagrad")
    train(source, batches(4, hot=[1, 2, 400, 450, 480, 600, 700, 800, 900, 999]))
    wanted = rows_of(source)
    (chunk,) = source.chunks(1 << 20)
    parts = []
    for rank in (0, 1):
        part = storage_of(cached_table(), "adagrad", kind=kind, ranks=(0, 1), rank=rank)
        part.begin_load()
        part.load_chunk(chunk)
        shard = part.shards[0].shard
        torch.testing.assert_close(
            rows_of(part), wanted[shard.row_start:shard.row_end, shard.col_start:shard.col_end])
        parts += part.chunks(1 << 20)
    whole = storage_of(cached_table(), "adagrad", seed=8)
    whole.begin_load()
    for part in parts:
        whole.load_chunk(part)
    torch.testing.assert_close(rows_of(whole), wanted)
    assert torch.equal(whole.trains[0].hot.ids, source.trains[0].hot.ids)


def test_without_a_cache_cached_rows_are_folded():
    source = storage_of(cached_table(rank=32), "sgd")
    train(source, batches(4, hot=[1, 400, 800]))
    plain = storage_of(table_of(rank=32), "sgd")
    plain.begin_load()
    for chunk in source.chunks(1 << 20):
        plain.load_chunk(chunk)
    ids = [1, 400, 800]
    wanted, found = rows_of(source)[ids], rows_of(plain)[ids]
    cores = source.trains[0].core_rows(torch.tensor(ids))
    assert (found - wanted).norm() < 0.5 * (cores - wanted).norm()


def test_a_cache_of_every_row_trains_like_a_plain_table():
    """After the warm-up, rows go their own way exactly as those of a plain fp32 table do."""
    table = table_of(rows=40, columns=4, rank=3, cache_fraction=1.0, cache_warmup_steps=1)
    storage = storage_of(table, "sgd")
    train(storage, [([0], torch.zeros(1, 4))])
    storage.trains[0].hot.uses.note(torch.arange(40), torch.ones(40, dtype=torch.int64),
                                    torch.zeros(40))
    one = storage.trains[0]
    one.hot.next_choice = 1
    one.choose_hot_rows(1)
    rows = rows_of(storage)
    plan = build_table_plan(table, ShardingType.TABLE_WISE, [0], storage=None)
    assert hot_rows_shape(40, 1.0).capacity == one.hot.size == 40
    generator = torch.Generator().manual_seed(2)
    for number in range(2, 6):
        ids = torch.unique(torch.randint(40, (9,), generator=generator))
        grads = torch.randn(ids.numel(), 4, generator=generator)
        storage.begin_step(number)
        update(storage, ids.tolist(), grads, step_of("sgd"))
        rows[ids] -= 0.1 * grads
    assert torch.equal(rows_of(storage), rows)
    assert plan.storage.cache_fraction == 1.0


def test_storage_builds_from_a_shard_of_a_plan():
    table = cached_table()
    plan = build_table_plan(table, ShardingType.DATA_PARALLEL, [0])
    local = LocalShard(table, plan.shards[0], plan.storage, True)
    storage = build_storage([local], StorageOptions("sgd", 0, torch.device("cpu")))
    assert not storage.trains[0].is_shared
