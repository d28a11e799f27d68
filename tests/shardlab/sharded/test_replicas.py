"""Replica groups of the tables: merged gradients equal one group, averaged rows what is stated."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import shardlab as sl
from shardlab import comm
from shardlab.errors import ConfigError, PlanError
from shardlab.ops.unique import Uniques
from shardlab.plan import ShardingPlan
from shardlab.sharded.gradients import MergedRows
from shardlab.sharded.replicas import RowSums
from shardlab.specs import EmbeddingBagConfig, ShardingType
from tests.harness import run_ranks
from tests.oracle import Oracle, join
from tests.sharded_runs import (
    PLAIN,
    Bare,
    Job,
    assert_equals_oracle,
    build_features,
    loss_of,
    merged,
    mixed_tables,
    random_steps,
    random_weights,
    sharded_model,
    sharding_plan,
    table_plan,
    train,
)
from tests.tolerances import ADAPTIVE, STATE, TRAINED, assert_within

#: Samples per step and rank: unequal ranks, an empty replica group, an empty batch.
SIZES = {2: [[5, 3], [0, 6], [4, 4], [0, 0], [7, 2], [3, 3]],
         4: [[4, 0, 3, 2], [1, 2, 0, 5], [2, 2, 0, 0], [0, 0, 0, 0], [5, 1, 4, 0], [0, 0, 0, 3]]}
#: Job ranks: replicas.
WORLDS = [(2, 2), (4, 2), (4, 4)]
OPTIMIZERS = {**PLAIN, "adagrad": dataclasses.replace(PLAIN["adagrad"], clip_norm=0.5),
              "adam": dataclasses.replace(PLAIN["adam"], clip_value=0.2, clip_norm=0.9)}


def _job(world, replicas, optimizer, *, sync=1, storage="fp32", seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    tables = tuple(mixed_tables(storage=storage))
    plan = sharding_plan(tables, world // replicas).with_replicas(replicas, sync)
    return Job(tables, plan, optimizer, random_weights(tables, generator),
               random_steps(tables, SIZES[world], generator=generator, **options))


def _one_group(job, runs):
    """The runs of the first replica, with all ranks' outputs."""
    size = job.plan.world_size
    return [dataclasses.replace(run, chunks=run.chunks if rank < size else [])
            for rank, run in enumerate(runs)]


def _assert_copies_alike(job, runs):
    size = job.plan.world_size
    for rank, run in enumerate(runs):
        for mine, first in zip(run.chunks, runs[rank % size].chunks, strict=True):
            assert torch.equal(mine.weights, first.weights), (rank, mine.table)
            assert all(torch.equal(mine.state[name], first.state[name]) for name in mine.state)


@pytest.mark.parametrize(("world", "replicas"), WORLDS, ids=["1x2", "2x2", "1x4"])
def test_merged_gradients_equal_the_oracle(world, replicas, seed):
    jobs = [_job(world, replicas, optimizer, seed=seed, weighted=number % 2 == 1)
            for number, optimizer in enumerate(OPTIMIZERS.values())]
    for job, runs in zip(jobs, zip(*run_ranks(world, train, jobs), strict=True), strict=True):
        _assert_copies_alike(job, runs)
        assert_equals_oracle(job, _one_group(job, runs))


def _merge_both_ways(groups, replicas):
    """Three shards' gradients, merged at once and by ranges; and the bytes of each."""
    split = comm.split_replicas(groups, replicas)
    tables = [EmbeddingBagConfig(rows, columns, name) for name, rows, columns in
              (("wide", 300, 24), ("one", 1, 3), ("long", 70_000, 8))]
    rows = [table.num_embeddings for table in tables]
    generator = torch.Generator().manual_seed(groups.rank)
    found = [torch.randint(table.num_embeddings, (40,), generator=generator).pow(2)
             .remainder(table.num_embeddings).unique() for table in tables]
    if groups.rank == 1:
        found[0] = found[0][:0]
    splits = torch.tensor([0, *(ids.numel() for ids in found)]).cumsum(0)
    columns = torch.tensor([table.embedding_dim for table in tables])
    sizes = torch.repeat_interleave(columns, splits.diff())
    grads = torch.randn(int(sizes.sum()), generator=generator)
    uniques = Uniques(torch.cat(found), splits, torch.arange(sizes.numel() + 1),
                      sizes.cumsum(0) - sizes)
    answers = []
    for ranges in (False, True):
        wire = comm.WireBytes()
        merged = RowSums(rows, columns, split.copies, ranges).merge(
            MergedRows(uniques, None, grads), wire)
        answers.append((merged.uniques.ids.clone(), merged.uniques.splits, merged.summed(columns),
                        wire.sync_bytes))
    return answers


@pytest.mark.parametrize("world", [2, 4])
def test_ranges_give_the_same_bits_as_all_rows_to_all(world):
    runs = run_ranks(world, _merge_both_ways, world)
    for at_once, by_ranges in runs:
        for one, other, first in zip(at_once[:3], by_ranges[:3], runs[0][0][:3], strict=True):
            assert torch.equal(one, other)
            assert torch.equal(one, first)
        assert at_once[3] > 0
    if world == 4:  # many rows are touched by several
        assert sum(run[1][3] for run in runs) < sum(run[0][3] for run in runs)


def _average(oracles, dirty):
    """The mean over replicas of the rows that any of them has stepped, and of their state."""
    for table in oracles[0].tables:
        rows = torch.unique(torch.cat(dirty[table.name]))
        held = [{"": oracle.bags[table.name].weight.data, **oracle.state[table.name]}
                for oracle in oracles]
        for name in held[0]:
            mean = torch.stack([part[name][rows] for part in held]).mean(0)
            for part in held:
                part[name][rows] = mean


def _simulate(job):
    """Local steps by each group's mean gradient, averaged every so many steps: plain torch."""
    plan, size = job.plan, job.plan.world_size
    oracles = [Oracle(job.tables, job.weights, job.optimizer) for _ in range(plan.replicas)]
    dirty = {table.name: [] for table in job.tables}
    outputs = []
    for number, step in enumerate(job.steps, 1):
        for group, oracle in enumerate(oracles):
            mine = slice(group * size, (group + 1) * size)
            pooled = oracle.forward(join(step.parts[mine]))
            out = torch.cat([pooled[feature] for feature in job.features], dim=1)
            target = torch.cat(step.targets[mine]).double()
            # Every rank's loss counts W-fold; a group takes the mean over its S ranks.
            (plan.replicas * loss_of(out, target, step.samples, job.linear)).backward()
            for name, rows in oracle.touched.items():
                dirty[name].append(rows)
            oracle.step()
            outputs.append(out.detach())
        if number % plan.sync_every_steps == 0:
            _average(oracles, dirty)
            dirty = {table.name: [] for table in job.tables}
    return outputs, oracles


@pytest.mark.parametrize(("world", "replicas", "sync"), [(2, 2, 2), (4, 2, 3), (4, 4, 6)],
                         ids=["1x2", "2x2", "1x4"])
def test_averaged_rows_are_what_plain_torch_gives(world, replicas, sync, seed):
    jobs = [_job(world, replicas, optimizer, sync=sync, seed=seed)
            for optimizer in map(OPTIMIZERS.get, ("sgd", "row_wise_adagrad", "row_wise_adam"))]
    for job, runs in zip(jobs, zip(*run_ranks(world, train, jobs), strict=True), strict=True):
        expected, oracles = _simulate(job)
        found = [torch.cat([run.outputs[number] for run in runs[first:first + world // replicas]])
                 for number in range(len(job.steps))
                 for first in range(0, world, world // replicas)]
        adaptive = "ada" in job.optimizer.kind
        for number, (out, pooled) in enumerate(zip(found, expected, strict=True)):
            assert_within(out, pooled, ADAPTIVE if adaptive else TRAINED, f"output {number}")
        _assert_copies_alike(job, runs)  # all these end with an average
        rows, state = merged(job, _one_group(job, runs))
        for table in job.tables:
            name = table.name
            assert_within(rows[name], oracles[0].rows(name), ADAPTIVE if adaptive else TRAINED,
                          name)
            for key, value in oracles[0].state[name].items():
                assert_within(state[name][key], value, ADAPTIVE if adaptive else STATE, key)


#: Table storages whose copies must end alike, whatever their groups read.
_STORAGES = {"fp16": 1, "int8": 1, "pruned": 1, "tensor_train": 1, "cached": 1, "disk": 1,
             "int8 averaged": 3, "cached int8 averaged": 3, "disk averaged": 3}
_SPECS = {"pruned": {"kind": "pruned", "budget": {"ratio": 0.5}, "chunks": 2, "period": 2,
                     "start": "empty"},
          "tensor_train": {"kind": "tensor_train", "rank": 3, "cache_fraction": 0.1,
                           "cache_warmup_steps": 2},
          "cached": {"levels": [{"fraction": 0.2}, {"dtype": "fp32"}]},
          "disk": {"levels": [{"tier": "ddr", "fraction": 0.3}, {"tier": "ssd"}]},
          "int8 averaged": "int8",
          "cached int8 averaged": {"levels": [{"fraction": 0.2}, {"dtype": "int8"}]},
          "disk averaged": {"levels": [{"tier": "ddr", "fraction": 0.3}, {"tier": "ssd"}]}}


def _train_storages(groups, folder):
    """Digests of every storage's chunks after six steps."""
    found = {}
    for name, sync in _STORAGES.items():
        torch.manual_seed(0)
        tables = [EmbeddingBagConfig(60, 8, "user", storage=_SPECS.get(name, name))]
        kind = ShardingType.ROW_WISE
        plan = ShardingPlan(2, (table_plan(tables[0], kind, 2),)).with_replicas(2, sync)
        model, optimizer = sl.shard(Bare(tables), plan, groups=groups,
                                    optimizer=sl.optim.RowWiseAdagrad(lr=0.5),
                                    ssd_dir=f"{folder}/{name}")
        generator = torch.Generator().manual_seed(groups.rank)
        for _ in range(6):
            ids = torch.randint(60, (9,), generator=generator)
            features = sl.KeyedJaggedTensor(["user"], ids, lengths=torch.ones(9).long())
            optimizer.zero_grad()
            (model(features).values() - groups.rank).square().sum().backward()
            optimizer.step()
        collection = next(iter(model.collections().values()))
        found[name] = [
            {"weights": chunk.weights.clone(), **{
                key: value.clone() for key, value in (chunk.state | chunk.extra).items()}}
            for chunk in collection.chunks(1 << 20)]
    return found


def test_every_storage_keeps_copies_alike(tmp_path):
    runs = run_ranks(4, _train_storages, str(tmp_path))
    for name in _STORAGES:
        for rank in (0, 1):
            one, other = runs[rank][name], runs[rank + 2][name]
            for mine, theirs in zip(one, other, strict=True):
                assert all(torch.equal(mine[key], theirs[key]) for key in mine), name


@pytest.mark.parametrize(("storage", "sync", "text"), [
    (_SPECS["cached int8 averaged"], 1, "table 'user': .* rounds rows that leave its cache"),
    (_SPECS["pruned"], 4, "table 'user': .* has no rows that could be averaged over replicas; "),
    (_SPECS["tensor_train"], 4, "table 'user': tensor_train.* no rows that could be averaged")])
def test_tables_whose_copies_would_differ_are_refused(storage, sync, text):
    table = EmbeddingBagConfig(60, 8, "user", storage=storage)
    entry = table_plan(table, ShardingType.TABLE_WISE, 1)
    plan = ShardingPlan(1, (entry,)).with_replicas(2, sync)
    groups = sl.comm.Groups(world_size=2)
    with pytest.raises(PlanError, match=text):
        sl.shard(Bare([table]), plan, groups=groups)


def test_ranks_that_do_not_fit_the_plan_are_refused():
    table = EmbeddingBagConfig(60, 8, "user")
    groups = sl.comm.Groups(world_size=6)
    with pytest.raises(ConfigError, match="6 ranks do not divide into 4 groups of equal size; "
                                          "choose one of 1, 2, 3, 6"):
        sl.simple_plan([table], groups, replicas=4)
    plan = sl.simple_plan([table], groups, replicas=3)
    assert (plan.world_size, plan.job_ranks) == (2, 6)
    with pytest.raises(PlanError, match=r"plan is for 6 ranks \(3 groups of 2\), this job"):
        sl.shard(Bare([table]), plan, groups=sl.comm.Groups(world_size=4))


def _ahead(groups, job, depth, staleness):
    """Outputs and rows, with batches announced ``depth`` ahead."""
    model, optimizer = sharded_model(groups, job)
    batches = [(build_features(step.parts[groups.rank], job.features), step.targets[groups.rank],
                step.samples) for step in job.steps]
    outputs = []
    loader = sl.prefetching(iter(batches), model, lambda batch: batch[0], depth=depth,
                            staleness=staleness)
    for features, target, samples in loader:
        pooled = model(features)
        out = torch.cat([pooled[feature] for feature in job.features], dim=1)
        (groups.world_size * loss_of(out, target, samples, job.linear)).backward()
        outputs.append(out.detach().clone())
        optimizer.step()
        optimizer.zero_grad()
    collection = model.collections()["ebc"]
    return outputs, [chunk.weights.clone() for chunk in collection.chunks(1 << 20)], \
        collection.wire.sync_bytes


@pytest.mark.parametrize("sync", [1, 2])
@pytest.mark.parametrize("depth", [1, 2])
def test_looking_ahead_gives_the_same_bits(depth, sync):
    job = _job(4, 2, OPTIMIZERS["row_wise_adagrad"], sync=sync)
    for ahead, plain in zip(run_ranks(4, _ahead, job, depth, 0), run_ranks(4, _ahead, job, 0, 0),
                            strict=True):
        for one, other in zip([*ahead[0], *ahead[1]], [*plain[0], *plain[1]], strict=True):
            assert torch.equal(one, other)
        assert ahead[2] > plain[2] > 0 if sync == 1 else ahead[2] == plain[2]


@pytest.mark.parametrize("sync", [1, 2])
def test_stale_rows_keep_copies_alike_and_repeat(sync):
    job = _job(4, 2, OPTIMIZERS["row_wise_adagrad"], sync=sync)
    first, second = (run_ranks(4, _ahead, job, 1, 1) for _ in range(2))
    for rank, (run, again) in enumerate(zip(first, second, strict=True)):
        assert all(map(torch.equal, run[1], again[1]))
        assert all(map(torch.equal, run[1], first[(rank + 2) % 4][1]))
