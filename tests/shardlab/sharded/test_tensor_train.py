"""Tensor-train tables over ranks: equal to whole cores in fp64, and to one rank."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import shardlab as sl
from shardlab.errors import PlanError
from shardlab.plan import ShardingPlan
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType
from shardlab.table_plan import Shard, TablePlan, build_table_plan
from tests.harness import run_ranks
from tests.oracle import PlainOptimizer
from tests.sharded_runs import Bare, build_features, loss_of, make_optimizer, random_steps, shuffled
from tests.tensor_train_oracle import TrainOracle, logical_cores, whole_table

SHAPE = {"kind": "tensor_train", "rank": [5, 7], "row_factors": [6, 5, 4],
         "column_factors": [2, 3, 2]}
KINDS = [ShardingType.TABLE_WISE, ShardingType.ROW_WISE, ShardingType.COLUMN_WISE,
         ShardingType.DATA_PARALLEL, ShardingType.GRID_SHARD]


def _tables(**changes):
    """A tensor train for every sharding type and a plain table beside them."""
    trains = [EmbeddingBagConfig(
        num_embeddings=111, embedding_dim=12, name=f"t{i}",
        feature_names=[f"t{i}_a", f"t{i}_b"] if i == 1 else [f"t{i}"],
        pooling="mean" if i == 2 else "sum", weight_init_min=-1, weight_init_max=1,
        storage={**SHAPE, **changes}) for i in range(len(KINDS))]
    return (*trains, EmbeddingBagConfig(num_embeddings=30, embedding_dim=4, name="plain"))


def _plan(tables, world, exchange):
    plans = []
    for kind, table in zip(KINDS, tables, strict=False):
        ranks = list(range(world))
        if kind is ShardingType.TABLE_WISE:
            ranks = ranks[-1:]
        if kind is ShardingType.COLUMN_WISE:
            ranks = ranks[:2]
        columns = 2 if world > 1 else 1
        plans.append(build_table_plan(table, kind, ranks, columns=columns, exchange=exchange))
    plans.append(build_table_plan(tables[-1], ShardingType.TABLE_WISE, [0], exchange=exchange))
    return ShardingPlan(world, tuple(plans))


@dataclasses.dataclass(frozen=True)
class Case:
    tables: tuple
    plan: ShardingPlan
    optimizer: PlainOptimizer
    steps: list
    clip: bool = False


def train(groups, case):
    """(outputs of every step, chunks before, chunks after) of this rank."""
    model, optimizer = _sharded(groups, case, seed=3)
    before = _cores(model)
    outputs = _continue(groups, case, model, optimizer)
    return outputs, before, _cores(model)


def _sharded(groups, case, seed):
    return sl.shard(Bare(case.tables), case.plan, groups=groups, seed=seed,
                    optimizer=make_optimizer(case.optimizer))


def _continue(groups, case, model, optimizer, first=0):
    """Outputs of the steps from ``first`` on."""
    outputs = []
    features = [feature for table in case.tables for feature in table.feature_names]
    for number, step in enumerate(case.steps[first:], first):
        optimizer.zero_grad()
        order = shuffled(features, number * groups.world_size + groups.rank)
        pooled = model(build_features(step.parts[groups.rank], order))
        out = torch.cat([pooled[feature] for feature in features], dim=1)
        loss = groups.world_size * loss_of(out, step.targets[groups.rank], step.samples, False)
        loss.backward()
        optimizer.step()
        outputs.append(out.detach().clone())
    return outputs


def _cores(model):
    found = []
    for chunk in model.collections()["ebc"].chunks():
        if "tensor_train" in chunk.extra:
            found.append(chunk)
    return found


def _whole(chunks, table):
    """Logical cores of a table from its shards; copies of shared cores must be equal."""
    mine = [chunk for chunk in chunks if chunk.table == table.name]
    spec = table.storage.resolve(table.num_embeddings, table.embedding_dim)
    shape = spec.piece_shape(table.num_embeddings, table.embedding_dim)
    first = torch.full((shape.row_factors[0], shape.column_factors[0], shape.ranks[1]), torch.nan)
    for chunk in mine:
        numbers = chunk.extra["tensor_train"].tolist()
        slices, columns = numbers[1], numbers[4]
        i, j = chunk.row_start // shape.row_unit, chunk.col_start // shape.column_unit
        first[i:i + slices, j:j + columns] = chunk.extra["core0"].view(slices, columns, -1)
        for core in ("core1", "core2"):
            assert torch.equal(chunk.extra[core], mine[0].extra[core]), (table.name, core)
    assert not first.isnan().any()
    numbers = [3, *shape.row_factors, *shape.column_factors, *shape.ranks]
    return logical_cores(numbers, [first.flatten(1), mine[0].extra["core1"],
                                   mine[0].extra["core2"]])


def _merged(results):
    outputs = [torch.cat(parts) for parts in zip(*(outputs for outputs, _, _ in results),
                                                 strict=True)]
    return outputs, [c for _, b, _ in results for c in b], [c for _, _, a in results for c in a]


OPTIMIZERS = {one.kind: one for one in (
    PlainOptimizer("sgd", lr=0.1, weight_decay=0.01), PlainOptimizer("adagrad", lr=0.05),
    PlainOptimizer("row_wise_adagrad", lr=0.05), PlainOptimizer("adam", lr=0.01),
    PlainOptimizer("row_wise_adam", lr=0.01))}


@pytest.mark.parametrize(("optimizer", "exchange"), [
    *((optimizer, ExchangeKind.ROWS) for optimizer in OPTIMIZERS.values()),
    (OPTIMIZERS["row_wise_adagrad"], ExchangeKind.POOLED)],
    ids=lambda value: getattr(value, "kind", value))
def test_every_sharding_equals_whole_cores_in_fp64(optimizer, exchange):
    tables = _tables()
    generator = torch.Generator().manual_seed(5)
    steps = random_steps(tables, [[4, 3, 0, 2]] * 4, generator=generator)
    oracle = None
    for world in (1, 2, 4):
        parts = [dataclasses.replace(step, parts=_regroup(step.parts, world),
                                     targets=_regroup_targets(step.targets, world))
                 for step in steps]
        case = Case(tables, _plan(tables, world, exchange), optimizer, parts)
        outputs, before, after = _merged(run_ranks(world, train, case))
        trains = {table.name: table for table in tables[:-1]}
        if oracle is None:
            start = {name: _whole(before, table) for name, table in trains.items()}
            oracle = TrainOracle(trains, start, optimizer)
            expected = _train_oracle(oracle, steps)
        for name, table in trains.items():
            assert torch.equal(whole_table(_whole(before, table)), whole_table(start[name]))
        width = sum(t.embedding_dim * len(t.feature_names) for t in tables[:-1])
        for found, wanted in zip(outputs, expected, strict=True):
            torch.testing.assert_close(found[:, :width].double(), wanted, rtol=2e-4, atol=2e-4)
        for name, table in trains.items():
            for core, wanted in zip(_whole(after, table), oracle.cores[name], strict=True):
                torch.testing.assert_close(core.double(), wanted.data, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("optimizer", [OPTIMIZERS["row_wise_adagrad"],
                                       OPTIMIZERS["row_wise_adam"]], ids=lambda opt: opt.kind)
def test_cached_rows_train_alike_however_the_table_is_cut(optimizer):
    """Room for all rows: whatever is used in the warm-up is cached, on every cut."""
    tables = _tables(cache_fraction=1.0, cache_warmup_steps=2)
    generator = torch.Generator().manual_seed(6)
    steps = random_steps(tables, [[4, 3, 0, 2]] * 5, generator=generator)
    first = None
    for world in (1, 2, 4):
        parts = [dataclasses.replace(step, parts=_regroup(step.parts, world),
                                     targets=_regroup_targets(step.targets, world))
                 for step in steps]
        case = Case(tables, _plan(tables, world, ExchangeKind.ROWS), optimizer, parts)
        outputs, _, after = _merged(run_ranks(world, train, case))
        cached = {(c.table, row) for c in after for row in c.extra["hot/ids"].tolist()}
        first = first or (outputs, cached)
        assert cached == first[1]
        assert cached
        for found, wanted in zip(outputs, first[0], strict=True):
            torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-4)


SAVED_AFTER = 3


def save_and_resume(groups, case, other, path):
    """Outputs from the checkpoint on: uninterrupted, resumed, and resumed on another plan."""
    start = dataclasses.replace(case, steps=case.steps[:SAVED_AFTER])
    model, optimizer = _sharded(groups, start, seed=3)
    _continue(groups, start, model, optimizer)
    sl.save(path, model, optimizer, groups)
    return [_continue(groups, case, model, optimizer, SAVED_AFTER),
            resume(groups, case, path), resume(groups, dataclasses.replace(case, plan=other), path)]


def resume(groups, case, path):
    """Outputs of a job that starts from a checkpoint."""
    model, optimizer = _sharded(groups, case, seed=4)
    sl.load(path, model, optimizer, groups)
    return _continue(groups, case, model, optimizer, SAVED_AFTER)


def test_checkpoints_resume_on_any_plan_and_world(tmp_path):
    """With cached rows: bit for bit on the same plan, within rounding on others and on one rank."""
    tables = _tables(cache_fraction=1.0, cache_warmup_steps=2)
    generator = torch.Generator().manual_seed(7)
    steps = random_steps(tables, [[4, 3]] * 6, generator=generator)
    # Its state has a part per column and one per row.
    case = Case(tables, _plan(tables, 2, ExchangeKind.ROWS), OPTIMIZERS["row_wise_adam"], steps)
    turned = ShardingPlan(2, tuple(
        dataclasses.replace(plan, table=table.name) for plan, table in zip(
            (*case.plan.tables[1:-1], case.plan.tables[0], case.plan.tables[-1]), tables,
            strict=True)))
    path = tmp_path / "saved"
    results = run_ranks(2, save_and_resume, case, turned, path)
    for whole, resumed, cut_anew in results:
        for found, other, wanted in zip(resumed, cut_anew, whole, strict=True):
            assert torch.equal(found, wanted)
            torch.testing.assert_close(other, wanted, rtol=2e-4, atol=2e-4)
    one = dataclasses.replace(
        case, plan=_plan(tables, 1, ExchangeKind.ROWS),
        steps=[dataclasses.replace(step, parts=_regroup_all(step.parts),
                                   targets=[torch.cat(step.targets)]) for step in steps])
    for found, *wanted in zip(resume(sl.comm.Groups(), one, path),
                              *(whole for whole, _, _ in results), strict=True):
        torch.testing.assert_close(found, torch.cat(wanted), rtol=2e-4, atol=2e-4)


def _regroup_all(parts):
    return [_join(parts)]


def _regroup(parts, world):
    """The same global batch over so many ranks."""
    if world == 4:
        return parts
    half = len(parts) // world
    return [_join(parts[half * rank:half * (rank + 1)]) for rank in range(world)]


def _join(parts):
    from tests.oracle import join

    return join(parts)


def _regroup_targets(targets, world):
    size = len(targets) // world
    return [torch.cat(targets[size * rank:size * (rank + 1)]) for rank in range(world)]


def _train_oracle(oracle, steps):
    outputs = []
    for step in steps:
        pooled = oracle.forward(_join(step.parts))
        out = torch.cat([pooled[f] for table in oracle.tables.values()
                         for f in table.feature_names], dim=1)
        target = torch.cat(step.targets)[:, :out.shape[1]].double()
        loss_of(out, target, step.samples, False).backward()
        oracle.step()
        outputs.append(out.detach())
    return outputs


def test_cuts_through_slices_are_refused():
    table = _tables()[0]
    shards = (Shard(0, 0, 50, 0, 12), Shard(1, 50, 111, 0, 12))
    plan = ShardingPlan(2, (TablePlan("t0", ShardingType.ROW_WISE, ExchangeKind.ROWS, shards,
                                      table.storage),))
    with pytest.raises(PlanError, match=r"cut at multiples of 20 rows and 6 columns, found a shard "
                                        "from row 50"):
        plan.check([table], 2)
