"""The ``pruned`` storage: dense when nothing is pruned, zeros where absent, bytes within budget."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

import shardlab as sl
from shardlab.comm import build_groups
from shardlab.errors import CheckpointError, ConfigError
from shardlab.ops.chunk_index import Offers
from shardlab.ops.step_parameters import StepParameters
from shardlab.ops.unique import Uniques
from shardlab.plan import ShardingPlan
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType
from shardlab.storage import LocalShard, StorageOptions, build_storage
from shardlab.storage.pruned import PrunedStorage
from shardlab.table_plan import Shard, build_table_plan
from tests.harness import run_ranks

SIZES = (1000, 50, 20_000)
DENSE = {"kind": "pruned", "budget": {"ratio": 1.0}, "chunks": 4}
OPTIMIZERS = [sl.optim.RowWiseAdagrad(lr=0.1), sl.optim.Adam(lr=0.01),
              sl.optim.SGD(lr=0.1, weight_decay=0.01), sl.optim.RowWiseAdam(lr=0.01),
              sl.optim.Adagrad(lr=0.1, clip_value=1e-3)]


def pruned(ratio=0.1, **options):
    return {"kind": "pruned", "budget": {"ratio": ratio}, "chunks": 4, **options}


def tables(storage, dim=16, **options):
    return [EmbeddingBagConfig(num_embeddings=rows, embedding_dim=dim, name=f"t{i}",
                               storage=storage[i] if isinstance(storage, list) else storage,
                               **options) for i, rows in enumerate(SIZES)]


class Model(nn.Module):
    def __init__(self, found):
        super().__init__()
        self.ebc = sl.EmbeddingBagCollection(found)
        width = sum(table.embedding_dim for table in found)
        self.head = nn.Linear(width, 1)

    def forward(self, features):
        return self.head(self.ebc(features).values())


def build(found, optimizer=None, plan=None, groups=None):
    torch.manual_seed(0)
    model, stepper = sl.shard(Model(found), plan, optimizer=optimizer or OPTIMIZERS[0],
                              groups=groups)
    return model, stepper, model.collections()["ebc"]


def batch(seed, length=1, size=32, shift=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.full((3 * size,), length) if length >= 0 else \
        torch.randint(0, 4, (3 * size,), generator=generator)
    limits = torch.repeat_interleave(torch.tensor(SIZES).repeat_interleave(size), lengths)
    ids = (torch.rand(int(lengths.sum()), generator=generator) ** 4 * limits).long()
    return sl.KeyedJaggedTensor(["t0", "t1", "t2"], (ids + shift) % limits, lengths=lengths)


def train(parts, steps, first=0, **options):
    model, optimizer, _ = parts
    outputs = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        out = model(batch(step, **options))
        (out - 1).square().mean().backward()
        optimizer.step()
        outputs.append(out.detach())
    return outputs


@pytest.mark.parametrize("length", [1, 3, -1], ids=["one", "three", "jagged"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda one: one.kind)
def test_nothing_pruned_is_the_dense_table_bit_for_bit(optimizer, length):
    plain = train(build(tables("fp32"), optimizer), 6, length=length)
    parts = build(tables(DENSE), optimizer)
    assert all(map(torch.equal, train(parts, 6, length=length), plain))
    storage = parts[2].storage
    assert storage.index.numbers(0).used == 4 * sum(SIZES)
    assert storage.admitted.sum() == storage.evicted.sum() == 0


def test_one_chunk_rows_of_narrow_dtypes_are_those_of_the_plain_table():
    for dtype in ("fp16", "int8"):
        plain = train(build(tables(dtype)), 4)
        assert all(map(torch.equal, train(build(tables(
            {**DENSE, "dtype": dtype, "chunks": 1})), 4), plain))


@pytest.mark.parametrize(("dtype", "absent", "admitted"), [
    ("fp32", "zeros", "zeros"), ("fp16", "zeros", "zeros"), ("int8", "zeros", "zeros"),
    ("fp32", "shared", "zeros"), ("int8", "shared", "zeros"), ("fp16", "zeros", "initial"),
    ("int8", "shared", "initial")])
@pytest.mark.parametrize("length", [1, -1], ids=["one", "jagged"])
def test_faces_agree(monkeypatch, dtype, absent, admitted, length):
    options = {"dtype": dtype, "chunks": 2, "period": 4, "absent": absent, "admitted": admitted}
    ratio = 0.022 if dtype == "int8" else 0.02
    mine = build(tables(pruned(ratio, **options)))
    plain = train(mine, 9, length=length, size=256)
    monkeypatch.setenv("SHARDLAB_FACE", "reference")
    reference = build(tables(pruned(ratio, **options)))
    for a, b in zip(plain, train(reference, 9, length=length, size=256), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    one, two = mine[2].storage, reference[2].storage
    assert one.tier_bytes() == two.tier_bytes()
    assert one.admitted.tolist() == two.admitted.tolist()
    assert one.evicted.sum() > 0
    for block in range(3):
        a, b = one.index.list_rows(block), two.index.list_rows(block)
        assert torch.equal(a.rows, b.rows)
        assert torch.equal(a.places, b.places)


def test_absent_chunks_read_as_zeros_and_cost_nothing():
    parts = build(tables(pruned(0.1, start="empty")))
    collection = parts[2]
    assert collection.tier_bytes().total < 1 << 16
    with torch.no_grad():
        features = collection(batch(0, length=-1)).values()
    assert (features == 0).all()
    assert collection.tier_bytes().total < 1 << 16


@pytest.mark.parametrize("start", ["empty", "dense"])
@pytest.mark.parametrize("ratio", [0.05, 0.3])
def test_bytes_follow_the_budget(start, ratio):
    parts = build(tables(pruned(ratio, start=start, warmup=20, ramp=40, period=10)))
    budget = ratio * sum(SIZES) * 16 * 4
    first = parts[2].tier_bytes().total
    assert (first > 16 * 4 * sum(SIZES)) is (start == "dense")
    train(parts, 120, size=256)
    held = parts[2].tier_bytes().total
    pages = 3 * 4096  # a small store's last pages and slabs
    assert 0.95 * budget - pages < held <= budget


def test_resident_memory_falls():
    """Pages of chunks that left are given back; counted by the system."""
    storage = _storage([EmbeddingBagConfig(100_000, 64, "t", storage=pruned(
        0.05, start="dense"))])
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    before, held = resident(), storage.tier_bytes().total
    assert held > 100_000 * 64 * 4
    storage.decide(0, torch.tensor([2.0 ** -48 * 0.95]), 1 << 30)
    storage.compact(0)
    left = storage.tier_bytes().total
    assert left < held / 12
    assert before - resident() > 0.9 * (held - left)


def _storage(found, optimizer="row_wise_adagrad"):
    shards = [LocalShard(table, Shard(0, 0, table.num_embeddings, 0, table.embedding_dim),
                         table.storage, False) for table in found]
    storage = build_storage(shards, StorageOptions(optimizer, 0, torch.device("cpu")))
    assert isinstance(storage, PrunedStorage)
    return storage


@pytest.mark.parametrize(("pruned_share", "smaller"), [(0.95, 12), (0.99, 50)])
def test_metadata_does_not_cap_the_ratio(pruned_share, smaller):
    """At 64 columns in 4 chunks; chunks leave by chance, so rows seldom keep all of theirs."""
    table = EmbeddingBagConfig(200_000, 64, "t", storage=pruned(
        1 - pruned_share, chunks=4, start="dense"))
    storage = _storage([table])
    storage.decide(0, torch.tensor([2.0 ** -48 * pruned_share]), 1 << 30)
    storage.compact(0)
    present = storage.index.numbers(0).used / (4 * 200_000)
    assert abs(present - (1 - pruned_share)) < 0.1 * (1 - pruned_share)
    assert storage.tier_bytes().total * smaller < 200_000 * 64 * 4


def test_compaction_changes_no_value():
    parts = build(tables(pruned(0.3, start="dense", warmup=5, ramp=0, period=5)))
    train(parts, 12)
    storage = parts[2].storage
    segments = torch.tensor([[2, 0, SIZES[2], 0]])
    before, after = torch.empty(SIZES[2] * 16), torch.empty(SIZES[2] * 16)
    storage.read(segments, torch.arange(SIZES[2]), before)
    storage.decide(0, torch.tensor([0.0, 0.0, 0.0]), 1 << 30)
    storage.compact(0)
    storage.read(segments, torch.arange(SIZES[2]), after)
    assert torch.equal(before, after)
    assert (before != 0).any()


def test_decision_gives_back_what_would_lie_idle():
    storage = _storage([EmbeddingBagConfig(20_000, 16, "t", storage=pruned(0.5, start="dense"))])
    before = storage.held_bytes(0)
    storage.decide(0, torch.tensor([2.0 ** -49]), 1 << 30)  # half of the chunks, by chance
    assert storage.index.numbers(0).free == 0
    assert storage.held_bytes(0) < 0.7 * before


@pytest.mark.parametrize("ratio", [0.02, 0.1])
def test_new_rows_of_few_chunks_find_a_slot_before_the_next_decision(ratio):
    """Rows of four chunks make way for rows of one, until most places would lie idle."""
    rows = 200_000
    storage = _storage([EmbeddingBagConfig(rows, 16, "t", storage=pruned(ratio, start="empty"))])
    budget, missed = storage.stores[0].target, 0
    full = int(1.2 * storage.stores[0].shape.layout.likely_chunks(budget, 2) / 4)
    batch = full // 6
    for step, first in enumerate(range(0, 6 * full, batch), 1):
        grads = torch.full((batch, 4, 4), 1.5 ** step)
        if first > full:
            grads[:, 1:] = 0
        ids = torch.arange(first, first + batch)
        uniques = Uniques(ids, torch.tensor([0, batch]), torch.arange(batch + 1),
                          torch.arange(batch) * 16)
        storage.begin_step(step)
        storage.update(uniques, None, grads.flatten(), StepParameters("row_wise_adagrad", lr=0.1))
        found = storage.index.look_up(0, ids).places
        missed += int((found < 0).all(1).sum()) if first > full else 0
        assert storage.held_bytes(0) <= budget
    assert storage.evicted[0] > 3 * full
    assert missed < batch
    # The budget holds rows of one chunk now, each with a slot of its own.
    assert storage.index.numbers(0).free < storage.index.numbers(0).used / 8


def test_readmitted_chunks_start_with_zeros_and_fresh_state():
    parts = build(tables(pruned(0.5, start="empty", chunks=1)), OPTIMIZERS[1])
    train(parts, 5)
    storage = parts[2].storage
    rows = storage.index.list_rows(1).rows
    payloads = storage.pools.blocks.payloads(storage.pools.arena, 1)
    states = storage.pools.blocks.states(storage.pools.arena, 1)
    places = storage.index.list_rows(1).places[:, 0].long()
    assert payloads[places].any(1).all()
    assert states[places].any(1).all()
    storage.decide(0, torch.full((3,), float("inf")), 1 << 20)
    offers = Offers(torch.tensor([[1, 0, rows.numel()]]), rows, torch.ones(rows.numel(), 1),
                    torch.ones(3), torch.zeros(3), 0, torch.ones(3), storage.evicted)
    again = storage.index.offer(offers)[:, 2]
    assert again.numel() == rows.numel()
    assert not payloads[again].any()
    assert not states[again].any()


def test_tables_together_have_one_unit():
    parts = build(tables(pruned(0.1, period=5, normalize="together")))
    train(parts, 3)
    first = parts[2].storage.scale.clone()
    assert (first > 0).all()
    assert first.unique().numel() == 1
    train(parts, 4)
    assert parts[2].storage.scale.unique().numel() == 1
    assert not torch.equal(parts[2].storage.scale, first)


@pytest.mark.parametrize(("normalize", "streams"), [(True, 8), ("together", 4)])
def test_drift_moves_chunks_to_the_new_ids_within_two_periods(normalize, streams):
    options = {"period": 10, "gamma": 0.95, "start": "empty", "chunks": 1, "normalize": normalize}
    top, held = {9000 + i for i in range(40)}, []
    for stream in range(streams):
        parts = build(tables(pruned(0.1, **options)))
        train(parts, 60, first=1000 * stream, size=128)
        storage = parts[2].storage
        assert len(top & set(storage.index.list_rows(2).rows.tolist())) <= 5
        train(parts, 20, first=1000 * stream + 60, size=128, shift=9000)
        held.append(len(top & set(storage.index.list_rows(2).rows.tolist())))
    assert min(held) >= 24, held
    assert sum(held) / len(held) >= 30, held


@pytest.mark.parametrize(("absent", "admitted"), [("zeros", "zeros"), ("shared", "zeros"),
                                                  ("shared", "initial")])
def test_resumed_run_is_bit_identical(tmp_path, absent, admitted):
    options = {"chunks": 2, "period": 7, "dtype": "fp16", "absent": absent, "admitted": admitted}
    groups = build_groups()
    parts = build(tables([pruned(0.02, **options), "fp32", pruned(0.01, **options)]))
    train(parts, 18, length=-1)
    sl.save(tmp_path / "c", parts[0], parts[1], groups)
    expected = train(parts, 20, first=18, length=-1)
    again = build(tables([pruned(0.02, **options), "fp32", pruned(0.01, **options)]))
    train(again, 3)
    sl.load(tmp_path / "c", again[0], again[1], groups)
    assert all(map(torch.equal, train(again, 20, first=18, length=-1), expected))
    one, two = (_pruned_part(one) for one in (parts, again))
    assert one.tier_bytes() == two.tier_bytes()
    assert torch.equal(one.index.sketch(0), two.index.sketch(0))


def _pruned_part(parts):
    storage = parts[2].storage
    return storage if isinstance(storage, PrunedStorage) else storage.parts[0]


@pytest.mark.parametrize(("source", "target"), [
    (pruned(0.5, start="empty", chunks=2), "fp32"), ("fp32", DENSE), (DENSE, DENSE),
    (pruned(0.5, start="empty", chunks=2), pruned(0.6, start="empty", chunks=4)),
    (pruned(0.1, chunks=2, absent="shared"), "fp32"),
    (pruned(0.1, chunks=2, absent="shared"), pruned(0.5, chunks=4, absent="shared")),
    (pruned(0.1, chunks=4, absent="shared"), DENSE)],
    ids=["pruned-dense", "dense-pruned", "pruned", "other chunks", "shared-dense",
         "shared other chunks", "shared-full"])
def test_checkpoint_loads_into_other_storages(tmp_path, source, target):
    groups = build_groups()
    parts = build(tables(source))
    train(parts, 8)
    sl.save(tmp_path / "c", parts[0], parts[1], groups)
    other = build(tables(target))
    sl.load(tmp_path / "c", other[0], other[1], groups)
    with torch.no_grad():
        assert torch.equal(other[0](batch(99, length=-1)), parts[0](batch(99, length=-1)))


def test_checkpoint_of_another_optimizer_is_refused(tmp_path):
    parts = build(tables(pruned(0.5)))
    train(parts, 2)
    chunk = next(iter(parts[2].chunks()))
    other = build(tables(pruned(0.5)), OPTIMIZERS[1])
    with pytest.raises(CheckpointError, match="table 't0': checkpoint holds optimiser state"):
        other[2].load_chunk(chunk)


@pytest.mark.parametrize(("storage", "options", "text"), [
    (pruned(), {"sharding": "data_parallel"}, "cannot be data_parallel: every rank would need"),
    (pruned(chunks=3), {}, "16 columns cannot be cut into 3 equal chunks; take chunks: one of"),
    (pruned(start="full"), {}, "start: unknown value 'full'"),
    (pruned(absent="ones"), {}, "absent: unknown value 'ones'"),
    (pruned(admitted="inital"), {}, "admitted: unknown value 'inital' \\(did you mean 'initial'"),
    (pruned(normalize="apart"), {}, "normalize: expected true, false or together, found 'apart'"),
    (pruned(gamma=0), {}, "gamma: expected a share above 0"),
    (pruned(period=0), {}, "period: expected a positive integer, found 0"),
    (pruned(headroom=2), {}, "headroom: expected a number from 0 to 0.5, found 2"),
    (pruned(evidence=-1), {}, "evidence: expected a number from 0 to 1e\\+06, found -1"),
    ({"kind": "pruned", "budget": {"bytes": "2 parsecs"}}, {}, "a text such as 2GB; found"),
])
def test_what_cannot_be_is_refused(storage, options, text):
    with pytest.raises(ConfigError, match=text):
        build(tables(storage, **options))


def test_chunks_cut_in_two_are_refused():
    table = EmbeddingBagConfig(10, 16, "t", storage=pruned(chunks=2))
    local = LocalShard(table, Shard(0, 0, 10, 0, 4), table.storage, False)
    with pytest.raises(ConfigError, match=r"columns \[0, 4\) cut a chunk of 8 columns in two"):
        build_storage([local], StorageOptions("sgd", 0, torch.device("cpu")))


def test_chunks_in_host_memory_of_a_cuda_run_are_refused():
    table = EmbeddingBagConfig(10, 16, "t", storage=pruned(tier="ddr"))
    local = LocalShard(table, Shard(0, 0, 10, 0, 16), table.storage, False)
    with pytest.raises(ConfigError, match="table 't': pruned with tier: ddr on cuda:0: its chunks"):
        build_storage([local], StorageOptions("sgd", 0, torch.device("cuda", 0)))


# ---------------------------------------------------------------- ranks
def _rank(groups, storage, kind, exchange, steps):
    found = tables(storage, exchange=exchange)
    ranks = list(range(groups.world_size))
    where = [0] if kind is ShardingType.TABLE_WISE else ranks
    plan = ShardingPlan(groups.world_size, tuple(
        build_table_plan(table, kind, where, exchange=exchange) for table in found))
    parts = build(found, plan=plan, groups=groups)
    outputs = []
    for step in range(steps):
        whole = batch(step, length=-1, size=32)
        part = 32 // groups.world_size
        mine = _part(whole, slice(groups.rank * part, (groups.rank + 1) * part))
        parts[1].zero_grad()
        out = parts[0](mine)
        (out - 1).square().mean().backward()
        parts[1].step()
        outputs.append(out.detach().clone())
    storage = parts[2].storage
    contests = parts[2].council.contests
    admitted = int(storage.admitted.sum()) if isinstance(storage, PrunedStorage) else 0
    return (outputs, storage.tier_bytes().total, admitted,
            [contest.threshold for contest in contests])


def _part(whole, some):
    lengths = whole.lengths().view(3, -1)
    kept = torch.zeros_like(lengths, dtype=torch.bool)
    kept[:, some] = True
    mask = torch.repeat_interleave(kept.view(-1), lengths.view(-1))
    return sl.KeyedJaggedTensor(["t0", "t1", "t2"], whole.values()[mask],
                                lengths=lengths[:, some].reshape(-1))


@pytest.mark.parametrize("world", [1, 2, 4], ids="ranks_{}".format)
@pytest.mark.parametrize("kind", [ShardingType.TABLE_WISE, ShardingType.ROW_WISE,
                                  ShardingType.COLUMN_WISE], ids=lambda kind: kind.value)
def test_nothing_pruned_is_dense_on_ranks(kind, world):
    for exchange in (ExchangeKind.ROWS, ExchangeKind.POOLED):
        plain = run_ranks(world, _rank, "fp32", kind, exchange, 4)
        mine = run_ranks(world, _rank, DENSE, kind, exchange, 4)
        for (a, *_), (b, *_) in zip(plain, mine, strict=True):
            assert all(map(torch.equal, a, b))


@pytest.mark.parametrize("kind", [ShardingType.ROW_WISE, ShardingType.COLUMN_WISE],
                         ids=lambda kind: kind.value)
def test_ranks_share_one_budget(kind):
    storage = pruned(0.2, period=5, start="empty")
    results = run_ranks(2, _rank, storage, kind, ExchangeKind.POOLED, 30)
    budget = 0.2 * sum(SIZES) * 16 * 4
    held = [one[1] for one in results]
    assert sum(held) <= budget * 1.05
    assert max(held) <= budget / 2 * 1.25
    if kind is ShardingType.COLUMN_WISE:  # nobody's limit binds: one threshold
        assert results[0][3] == results[1][3]
    assert all(one[2] > 0 for one in results)


# ---------------------------------------------------------------- ids without a bound
def _several_stores_rank(groups):
    found = [EmbeddingBagConfig(rows, dim, f"t{i}", storage=pruned(0.3, period=5))
             for i, (rows, dim) in enumerate(zip(SIZES, (8, 32, 16), strict=True))]
    ranks = list(range(groups.world_size))
    plan = ShardingPlan(groups.world_size, tuple(
        build_table_plan(table, ShardingType.ROW_WISE, ranks, exchange=ExchangeKind.ROWS)
        for table in found))
    parts = build(found, plan=plan, groups=groups)
    storage, most = parts[2].storage, 0
    for step in range(40):
        parts[1].zero_grad()
        parts[0](batch(step * 4 + groups.rank, size=256)).square().mean().backward()
        parts[1].step()
        if step % 5 == 4:
            most = max(most, sum(map(storage.held_bytes, range(len(storage.stores)))))
    for store in range(len(storage.stores)):
        assert sum(storage.part_bytes(store).values()) == storage.held_bytes(store)
    return len(storage.stores), most, storage.tier_bytes().total


def test_stores_of_a_rank_share_its_budget():
    """Tables of other widths have stores of their own; together they keep within the budget."""
    budget = 0.3 * 4 * sum(rows * dim for rows, dim in zip(SIZES, (8, 32, 16), strict=True))
    results = run_ranks(4, _several_stores_rank)
    assert all(stores == 3 for stores, _, _ in results)
    assert sum(held for _, _, held in results) <= budget * 1.05
    assert sum(most for _, most, _ in results) <= budget * 1.05


def _unbounded_rank(groups, exchange):
    table = EmbeddingBagConfig("unbounded", 8, "t", exchange=exchange, storage={
        "kind": "pruned", "budget": {"bytes": "1MB"}, "chunks": 1})
    ranks = list(range(groups.world_size))
    plan = ShardingPlan(groups.world_size, (build_table_plan(
        table, ShardingType.ROW_WISE, ranks, exchange=exchange),))
    model, optimizer, collection = build([table], OPTIMIZERS[2], plan, groups)
    ids = torch.tensor([-(1 << 63), -1, 0, 5, (1 << 63) - 1, 123_456_789_012, 5, 77])
    part = len(ids) // groups.world_size
    mine = ids[groups.rank * part:(groups.rank + 1) * part]
    features = sl.KeyedJaggedTensor(["t"], mine, fixed_length=1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(features) - 1).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        rows = collection(features).values().clone()
    return rows, collection.storage.index.numbers(0).rows, collection.tier_bytes().total


@pytest.mark.parametrize("exchange", [ExchangeKind.ROWS, ExchangeKind.POOLED],
                         ids=lambda kind: kind.value)
def test_unbounded_tables_take_any_id(exchange):
    alone, = run_ranks(1, _unbounded_rank, exchange)
    assert alone[1] == 7
    assert (alone[0].abs().sum(1) > 0).all()
    assert torch.equal(alone[0][3], alone[0][6])
    two = run_ranks(2, _unbounded_rank, exchange)
    torch.testing.assert_close(torch.cat([one[0] for one in two]), alone[0])
    assert sum(one[1] for one in two) == 7
    assert all(one[1] > 0 and one[2] < 1 << 19 for one in two)


def test_unbounded_tables_need_a_budget_in_bytes():
    with pytest.raises(ConfigError, match="num_embeddings unbounded needs storage"):
        EmbeddingBagConfig("unbounded", 8, "t")
