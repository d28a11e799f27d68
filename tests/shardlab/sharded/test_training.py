"""The whole step: dense layers, accumulation, schedules, saved state, bytes on the wire."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref

import pytest
import torch
from torch import nn

import shardlab as sl
from shardlab.errors import PlanError, ShardLabError
from shardlab.plan import ShardingPlan
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType
from shardlab.storage import TableChunk
from shardlab.storage_bytes import TierBytes, record_layout
from shardlab.table_plan import build_table_plan
from tests.harness import run_ranks
from tests.oracle import Bags, Oracle, PlainOptimizer, join
from tests.sharded_runs import (
    Bare,
    Job,
    Run,
    assert_equals_oracle,
    build_features,
    merged,
    random_steps,
    random_weights,
    sharded_model,
    sharding_plan,
    train,
)
from tests.tolerances import ADAPTIVE, LOOKUP, TRAINED, assert_within

TABLES = (
    EmbeddingBagConfig(num_embeddings=23, embedding_dim=6, name="t_user", pooling="mean",
                       feature_names=("user", "friend"), exchange="rows"),
    EmbeddingBagConfig(num_embeddings=9, embedding_dim=5, name="t_item", feature_names=("item",),
                       exchange="pooled"))
SIZES = {1: [[8]] * 5, 2: [[5, 3], [0, 6], [4, 4], [8, 0], [1, 2]],
         4: [[4, 0, 3, 2], [1, 2, 0, 5], [2, 2, 2, 2], [0, 0, 0, 3], [3, 3, 1, 1]]}
FEATURES = ["user", "friend", "item"]


class Tower(nn.Module):
    """Pooled vectors and a dense input through two layers."""

    def __init__(self, ebc: nn.Module, width: int = 17) -> None:
        super().__init__()
        self.ebc = ebc
        self.hidden = nn.Linear(width + 2, 4)
        self.over = nn.Linear(4, 1)

    def forward(self, dense, features):
        joined = torch.cat([dense, self.ebc(features).values()], dim=1)
        return self.over(self.hidden(joined).tanh()).squeeze(1)


def _plan(world, kind=ShardingType.ROW_WISE):
    return sharding_plan(TABLES, world, kind)


def _job(world, seed, optimizer=None, **options):
    generator = torch.Generator().manual_seed(seed)
    steps = random_steps(TABLES, SIZES[world], generator=generator, **options)
    return Job(TABLES, _plan(world), optimizer or PlainOptimizer("sgd", lr=0.1),
               random_weights(TABLES, generator), steps)


def _losses(job, logits, dense, step, rank):
    """Squared error of this rank's logits; targets are made from the step's."""
    return (logits - step.targets[rank].sum(dim=1) - dense[:, 0]).square().sum()


def _dense_inputs(step):
    return [target[:, :2] / 4 for target in step.targets]


def _train_tower(groups, job, dense_state):
    torch.manual_seed(groups.rank)  # ranks start apart: all must take rank 0's dense weights
    tower = Tower(sl.EmbeddingBagCollection(TABLES))
    if groups.rank == 0:
        tower.load_state_dict(dense_state)
    model, optimizer = sl.shard(
        tower, job.plan, groups=groups, optimizer=sl.optim.SGD(lr=0.1),
        dense_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01))
    whole = {name: TableChunk(name, 0, 0, rows, {}) for name, rows in
             job.weights.items()}
    for chunk in whole.values():
        model.collections()["ebc"].load_chunk(chunk)
    outputs = []
    for step in job.steps:
        dense = _dense_inputs(step)[groups.rank]
        optimizer.zero_grad()
        logits = model(dense, build_features(step.parts[groups.rank], FEATURES))
        loss = _losses(job, logits, dense, step, groups.rank)
        (loss * groups.world_size / step.samples).backward()
        optimizer.step()
        outputs.append(logits.detach())
    return Run(outputs, list(model.collections()["ebc"].chunks())), model.state_dict()


@pytest.mark.parametrize("world", [1, 2, 4], ids="ranks_{}".format)
def test_whole_model_equals_unsharded_model(world, seed):
    job = _job(world, seed)
    plain = Tower(nn.Identity()).double()
    dense_state = {key: value.float() for key, value in plain.state_dict().items()}
    results = run_ranks(world, _train_tower, job, dense_state)
    oracle = Oracle(TABLES, job.weights, job.optimizer)
    adam = torch.optim.Adam(plain.parameters(), lr=0.01)
    for number, step in enumerate(job.steps):
        pooled = oracle.forward(join(step.parts))
        plain.ebc = _Given(torch.cat([pooled[name] for name in FEATURES], dim=1))
        dense = torch.cat(_dense_inputs(step)).double()
        logits = plain(dense, None)
        target = torch.cat(step.targets).double().sum(dim=1)
        adam.zero_grad()
        ((logits - target - dense[:, 0]).square().sum() / step.samples).backward()
        adam.step()
        oracle.step()
        found = torch.cat([run.outputs[number] for run, _ in results])
        assert_within(found, logits.detach(), ADAPTIVE if number else LOOKUP, f"step {number}")
    rows, _ = merged(job, [run for run, _ in results])
    for table in TABLES:
        assert_within(rows[table.name], oracle.rows(table.name), ADAPTIVE, table.name)
    for _, state in results:
        assert sorted(state) == sorted(dense_state)
        for key, value in plain.state_dict().items():
            assert_within(state[key], value, ADAPTIVE, key)
            assert torch.equal(state[key], results[0][1][key]), f"{key} differs between ranks"


class _Given(nn.Module):
    """Stands in for a collection: gives back what it was made with."""

    def __init__(self, values):
        super().__init__()
        self._values = values

    def forward(self, _):
        return sl.KeyedTensor(["all"], [self._values.shape[1]], self._values)


def _accumulate(groups, job):
    model, optimizer = sharded_model(groups, job)
    for step in job.steps[:2]:
        pooled = model(build_features(step.parts[groups.rank], FEATURES)).values()
        (groups.world_size * (pooled * step.targets[groups.rank]).sum()).backward()
    with torch.no_grad():  # leaves nothing behind for the step
        model(build_features(job.steps[2].parts[groups.rank], FEATURES))
    optimizer.step()
    for again in range(2):  # gradients of the first pass are thrown away
        optimizer.zero_grad()
        step = job.steps[3 + again]
        model(build_features(step.parts[groups.rank], FEATURES)).values().sum().backward()
    optimizer.zero_grad()
    optimizer.step()
    return Run([], list(model.collections()["ebc"].chunks()))


@pytest.mark.parametrize("kind", ["sgd", "adagrad"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("world", [1, 2], ids="ranks_{}".format)
def test_accumulated_gradients_make_one_step(world, weighted, kind, seed):
    job = _job(world, seed, PlainOptimizer(kind, lr=0.1), weighted=weighted)
    oracle = Oracle(TABLES, job.weights, job.optimizer)
    for step in job.steps[:2]:
        pooled = oracle.forward(join(step.parts))
        out = torch.cat([pooled[name] for name in FEATURES], dim=1)
        (out * torch.cat(step.targets)).sum().backward()
    oracle.step()
    rows, _ = merged(job, run_ranks(world, _accumulate, job))
    for table in TABLES:
        assert_within(rows[table.name], oracle.rows(table.name), TRAINED, table.name)


def _bags_of(rows):
    return {name: Bags([[row] for row in rows]) for name in FEATURES}


def test_schedule_moves_tables_and_dense_layers():
    torch.manual_seed(0)
    model, optimizer = sl.shard(
        Tower(sl.EmbeddingBagCollection(TABLES)), _plan(1), optimizer=sl.optim.SGD(lr=1.0),
        dense_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.0)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.5]
    before = _snapshot(model)
    for moved in (True, False):
        optimizer.zero_grad()
        model(torch.ones(2, 2), build_features(_bags_of([1, 2]), FEATURES)).sum().backward()
        optimizer.step()
        after = _snapshot(model)
        assert [not torch.equal(*pair) for pair in zip(before, after, strict=True)] == \
            [moved] * len(before)
        schedule.step()
        before = after
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]


def test_hooks_of_a_step_and_the_profiler_see_it():
    model, optimizer = sl.shard(Bare(TABLES), _plan(1), optimizer=sl.optim.SGD(lr=1.0))
    seen = []
    hooks = [optimizer.register_step_pre_hook(lambda *_: seen.append("before")),
             optimizer.register_step_post_hook(lambda *_: seen.append("after"))]
    before = _snapshot(model)
    model(build_features(_bags_of([1]), FEATURES)).values().sum().backward()
    optimizer.step()
    assert seen == ["before", "after"]
    assert not all(map(torch.equal, before, _snapshot(model)))
    for hook in hooks:
        hook.remove()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert seen == ["before", "after"]
    assert any(event.key == "Optimizer.step#ShardedOptimizer.step"
               for event in profile.key_averages())


def test_rows_and_their_files_go_with_their_last_user():
    """No cycle of references keeps them, so that another model may open the same files at once."""
    gc.disable()
    try:
        model, optimizer = sl.shard(Bare(TABLES), _plan(1), optimizer=sl.optim.SGD(lr=1.0))
        storage = weakref.ref(model.collections()["ebc"].storage)
        model(build_features(_bags_of([1]), FEATURES)).values().sum().backward()
        optimizer.step()
        del model, optimizer
        assert storage() is None
    finally:
        gc.enable()


def _snapshot(model):
    return [chunk.weights for chunk in model.collections()["ebc"].chunks()] + [
        value.clone() for value in model.state_dict().values()]


def _resumed(job, load):
    """Trains 2 + 3 steps on one rank; ``load`` moves everything into a new model in between."""
    groups = sl.comm.build_groups()
    model, optimizer = sharded_model(groups, job)
    for number, step in enumerate(job.steps):
        if number == 2 and load:
            chunks = list(model.collections()["ebc"].chunks(max_bytes=200))
            state = copy.deepcopy(optimizer.state_dict())
            model, optimizer = sharded_model(groups, job)
            model.collections()["ebc"].begin_load()
            for chunk in chunks:
                model.collections()["ebc"].load_chunk(chunk)
            optimizer.load_state_dict(state)
        out = model(build_features(step.parts[0], FEATURES)).values()
        optimizer.zero_grad()
        out.square().sum().backward()
        optimizer.step()
    return [chunk.weights for chunk in model.collections()["ebc"].chunks()]


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "row_wise_adagrad", "adam", "row_wise_adam"])
def test_chunks_and_state_continue_bit_identically(kind, seed):
    job = _job(1, seed, PlainOptimizer(kind, lr=0.1))
    assert all(map(torch.equal, _resumed(job, load=False), _resumed(job, load=True)))


def test_eval_mode_looks_up_and_keeps_no_gradient():
    model, _ = sl.shard(Bare(TABLES), _plan(1))
    features = build_features(_bags_of([1, 3]), FEATURES)
    expected = model(features).values()
    model.eval()
    found = model(features).values()
    assert torch.equal(found, expected)
    assert not found.requires_grad


def test_collection_itself_can_be_the_model():
    model, optimizer = sl.shard(sl.EmbeddingBagCollection(TABLES), _plan(1))
    assert list(model.collections()) == [""]
    model(build_features(_bags_of([1]), FEATURES)).values().sum().backward()
    optimizer.step()
    assert model.state_dict() == {}


class Two(nn.Module):
    """Two collections with tables of the same shapes."""

    def __init__(self, tables):
        super().__init__()
        self.first = sl.EmbeddingBagCollection(tables[:1])
        self.second = sl.EmbeddingBagCollection(tables[1:])

    def forward(self, first, second):
        return torch.cat([self.first(first).values(), self.second(second).values()], dim=1)


def _train_two(groups, job):
    model, optimizer = sl.shard(Two(job.tables), job.plan, groups=groups,
                                optimizer=sl.optim.SGD(lr=0.1, clip_norm=0.5))
    collections = model.collections()
    for collection in collections.values():
        for name, rows in job.weights.items():
            collection.load_chunk(TableChunk(name, 0, 0, rows, {}))
    outputs = []
    for step in job.steps:
        part = step.parts[groups.rank]
        out = model(build_features(part, FEATURES[:2]), build_features(part, FEATURES[2:]))
        optimizer.zero_grad()
        loss = 0.5 * (out - step.targets[groups.rank]).square().sum()
        (loss * groups.world_size / step.samples).backward()
        optimizer.step()
        outputs.append(out.detach())
    return Run(outputs, [chunk for each in collections.values() for chunk in each.chunks()])


@pytest.mark.parametrize("world", [1, 2], ids="ranks_{}".format)
def test_two_collections_share_one_step_and_one_norm(world, seed):
    job = _job(world, seed, PlainOptimizer("sgd", lr=0.1, clip_norm=0.5))
    assert_equals_oracle(job, run_ranks(world, _train_two, job))


def _wire(groups, plan, batch):
    model, optimizer = sl.shard(Bare(TABLES[:1]), plan, groups=groups)
    collection = model.collections()["ebc"]
    model(build_features(batch, FEATURES[:2])).values().sum().backward()
    optimizer.step()
    wire = collection.wire
    return (wire.ids_bytes, wire.rows_bytes, wire.gradients_bytes, wire.total), \
        collection.tier_bytes()


def test_wire_counts_unique_rows_and_nothing_at_home():
    """Rank 1 holds the table; both ranks read the same 3 unique ids, 8 occurrences."""
    plan = ShardingPlan(2, (build_table_plan(TABLES[0], ShardingType.TABLE_WISE, [1],
                                             exchange=ExchangeKind.ROWS),))
    batch = {name: Bags([[4, 7, 4], [22]]) for name in FEATURES[:2]}
    (asker, asker_holds), (owner, owner_holds) = run_ranks(2, _wire, plan, batch)
    ids, rows, gradients, total = asker
    assert 3 * 4 <= ids <= 3 * 4 + 5 * 8  # int32 ids behind a head of a few int64
    assert (rows, gradients) == (0, 3 * 6 * 4)
    assert total == ids + gradients
    assert (owner[1], owner[2]) == (3 * 6 * 4, 0)
    assert owner[0] <= 5 * 8  # a head alone
    record = record_layout(TABLES[0].storage.home, 6, "row_wise_adagrad").record_bytes
    assert (asker_holds, owner_holds) == (TierBytes(), TierBytes(hbm=23 * record))


def test_model_without_tables_is_refused():
    with pytest.raises(ShardLabError, match="the model holds no EmbeddingBagCollection; build"):
        sl.shard(nn.Linear(2, 2))


def test_collection_refuses_to_run_before_it_is_sharded():
    with pytest.raises(ShardLabError, match=r"holds no weights yet; call .*shard\(model\)"):
        sl.EmbeddingBagCollection(TABLES)(build_features(_bags_of([1]), FEATURES))


def test_plan_of_another_world_is_refused():
    with pytest.raises(PlanError, match="plan is for 2 ranks, this job runs 1"):
        sl.shard(Bare(TABLES), _plan(2))


@pytest.mark.parametrize("world", [1, 2], ids="ranks_{}".format)
def test_without_a_plan_tables_are_laid_out_here(world, seed):
    job = _job(world, seed)
    job = dataclasses.replace(job, plan=None)
    assert_equals_oracle(job, [run for run, in run_ranks(world, train, [job])])
