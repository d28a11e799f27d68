"""Urgent gradients first: the same bits as one message, and the rest travels behind."""

from __future__ import annotations

import dataclasses
import signal
from dataclasses import dataclass

import pytest
import torch

import shardlab as sl
from shardlab.errors import BoundsError
from shardlab.plan import ShardingPlan
from shardlab.sharded.announce import Announcements
from shardlab.sharded.layout import compile_layout
from shardlab.sharded.urgent import PartedSender, can_part
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, PoolingType, ShardingType
from shardlab.storage import TableChunk
from shardlab.table_plan import WireDtypes
from tests.fault_ranks import FaultyWorld
from tests.harness import run_ranks
from tests.oracle import Bags, PlainOptimizer, empty_state
from tests.sharded_runs import (
    Bare,
    Job,
    TwoCollections,
    build_features,
    loss_of,
    make_optimizer,
    random_steps,
    random_weights,
    sharded_model,
    table_plan,
)

#: Table: sharding type, storage.
_TABLES = {
    "row": (ShardingType.ROW_WISE, "fp32"),
    "table": (ShardingType.TABLE_WISE, "int8"),
    "host": (ShardingType.TABLE_ROW_WISE, "bf16"),
    "every": (ShardingType.DATA_PARALLEL, "fp32"),
    "column": (ShardingType.COLUMN_WISE, "fp16"),
    "some": (ShardingType.TABLE_COLUMN_WISE, "int4"),
    "grid": (ShardingType.GRID_SHARD, "fp32"),
}
_WHOLE_ROWS = ("row", "table", "host", "every")
_OPTIMIZERS = {"sgd": tuple(_TABLES), "adagrad": tuple(_TABLES), "adam": tuple(_TABLES),
               "row_wise_adagrad": _WHOLE_ROWS, "row_wise_adam": _WHOLE_ROWS}


@dataclass(frozen=True)
class Story:
    """What a program does beside announcing batches and training them, by number of the batch."""

    depth: int = 1
    every: int = 1  # batches to a step of the optimiser
    extra: tuple[int, ...] = ()  # then trains a batch that nobody announced
    evaluated: tuple[int, ...] = ()  # then looks one up without training
    between: tuple[int, ...] = ()  # the same between backward and step
    saved: tuple[int, ...] = ()  # then streams all rows
    loaded: tuple[int, ...] = ()  # then loads the first rows
    skipped: tuple[int, ...] = ()  # leaves the step out
    late: tuple[int, ...] = ()  # announced by hand after the forward of the batch in front
    stale: tuple[int, ...] = ()  # announced so


def _job(world, names, optimizer="sgd", *, steps=7, rows=40, wire=None, weighted=False):
    generator = torch.Generator().manual_seed(world)
    tables = tuple(EmbeddingBagConfig(
        rows + 10 * i, 4 + 4 * (i % 2), name, feature_names=(f"{name}_a", f"{name}_b"),
        pooling=PoolingType.MEAN if i % 2 else PoolingType.SUM, storage=_TABLES[name][1])
        for i, name in enumerate(names))
    plan = ShardingPlan(world, tuple(table_plan(table, _TABLES[table.name][0], world, first=i)
                                     for i, table in enumerate(tables)))
    plan = plan.with_wire(wire) if wire else plan
    sizes = [[(3 * step + rank) % 5 for rank in range(world)] for step in range(steps)]
    return Job(tables, plan, PlainOptimizer(optimizer, lr=0.1), random_weights(tables, generator),
               random_steps(tables, sizes, generator=generator, weighted=weighted))


class _Program:
    """Trains a job on one rank as a story tells."""

    def __init__(self, groups, job, story, clip_norm=None):
        self.rank, self.world, self.job, self.story = groups.rank, groups.world_size, job, story
        self.model, self.optimizer = sharded_model(groups, job)
        self.optimizer.param_groups[0]["clip_norm"] = clip_norm
        self.collection = self.model.collections()["ebc"]
        self.batches = [build_features(step.parts[groups.rank], job.features)
                        for step in job.steps]
        self.seen = []

    def pooled(self, features):
        found = self.model(features)
        out = torch.cat([found[feature] for feature in self.job.features], dim=1)
        self.seen.append(out.detach().clone())
        return out

    def learn(self, number, features=None, announces=False):
        step = self.job.steps[number]
        out = self.pooled(self.batches[number] if features is None else features)
        if announces and number + 1 in self.story.late:
            self.collection.prefetch(self.batches[number + 1])
        (self.world * loss_of(out, step.targets[self.rank], step.samples, False)).backward()

    def look(self):
        with torch.no_grad():
            self.pooled(build_features(self.job.steps[1].parts[self.rank], self.job.features))

    def load(self):
        self.collection.begin_load()
        for table in self.job.tables:
            whole = self.job.weights[table.name]
            self.collection.load_chunk(TableChunk(table.name, 0, 0, whole, empty_state(
                self.job.optimizer.kind, whole), replicated=False))

    def rows(self):
        return [(chunk.weights.clone(), {name: part.clone() for name, part in chunk.state.items()})
                for chunk in self.collection.chunks(1 << 20)]

    def run(self, depth):
        """Outputs, in order, and rows with their state; 0 announces nothing."""
        story, saved = self.story, []
        for number in range(len(self.batches)):
            if depth:
                self._announce(number, depth)
            self.learn(number, announces=depth > 0)
            if number in story.between:
                self.look()
            if number in story.skipped:
                self.optimizer.skip_step()
            elif (number + 1) % story.every == 0:
                self.optimizer.step()
                self.optimizer.zero_grad()
            if number in story.extra:
                self.learn(0, build_features(self.job.steps[0].parts[self.rank],
                                             self.job.features))
                self.optimizer.step()
            if number in story.evaluated:
                self.look()
            if number in story.loaded:
                self.load()
            if number in story.saved:
                saved.append(self.rows())
        self.optimizer.zero_grad()  # what no step took is received, before others use the lanes
        self.collection.forget_announced()
        return self.seen, [*saved, self.rows()]

    def _announce(self, number, depth):
        new = range(depth + 1) if number == 0 else [number + depth]
        for other in new:
            if other < len(self.batches) and other not in self.story.late:
                self.collection.prefetch(self.batches[other], int(other in self.story.stale))


def _differences(groups, cases):
    """By case: outputs and rows that differ, and how often rows were stepped behind."""
    update, spared = Announcements.update_behind, []

    def counting(self, run, spares=None):
        spared.append(spares is not None)
        update(self, run, spares)

    found = {}
    for name, job, story, clip in cases:
        plain = _Program(groups, job, story, clip).run(0)
        Announcements.update_behind = counting
        spared.clear()
        ahead = _Program(groups, job, story, clip).run(story.depth)
        Announcements.update_behind = update
        wrong = [f"output {i}" for i, (one, other) in
                 enumerate(zip(plain[0], ahead[0], strict=True)) if not torch.equal(one, other)]
        for i, (one, other) in enumerate(zip(plain[1], ahead[1], strict=True)):
            for (weights, state), (weights2, state2) in zip(one, other, strict=True):
                same = torch.equal(weights, weights2) and all(
                    torch.equal(part, state2[key]) for key, part in state.items())
                wrong += [] if same else [f"rows {i}"]
        found[name] = wrong, sum(spared)
    return found


def _assert_same(world, cases, timeout=60.0):
    """Nothing differs; returns how many steps had a part behind, by case."""
    behind = {}
    for rank in run_ranks(world, _differences, cases, timeout=timeout):
        assert {name: wrong for name, (wrong, _) in rank.items() if wrong} == {}
        behind = {name: count for name, (_, count) in rank.items()}
    return behind


@pytest.mark.parametrize("world", [2, 4])
def test_every_sharding_type_and_optimiser_gives_the_same_bits(world):
    cases = [(f"{kind}, depth {depth}", _job(world, names, kind, weighted=depth == 2),
              Story(depth), None)
             for kind, names in _OPTIMIZERS.items() for depth in (1, 2)]
    behind = _assert_same(world, cases)
    # All but the last batch have one behind them.
    assert set(behind.values()) == {6}


@pytest.mark.parametrize("codec", ["fp16", "bf16", "int8", "int4", "fp8_e5m2"])
def test_codecs_of_gradients_round_alike_in_two_messages(codec):
    jobs = {"narrow": _job(2, tuple(_TABLES), wire=WireDtypes("fp16", codec)),
            "weighted": _job(2, _WHOLE_ROWS, "row_wise_adagrad", weighted=True,
                             wire=WireDtypes(codec, codec))}
    behind = _assert_same(2, [(name, job, Story(), None) for name, job in jobs.items()])
    assert set(behind.values()) == {6}


_STORIES = {
    "a batch that was not announced": (Story(extra=(2,)), 6),
    "the same, two ahead": (Story(2, extra=(2, 4)), 6),
    "evaluated after a step": (Story(evaluated=(1, 4)), 6),
    "evaluated before a step": (Story(2, between=(1, 4)), 6),
    "saved": (Story(saved=(1, 3, 6)), 6),
    "saved, two ahead": (Story(2, saved=(1, 3, 6)), 6),
    "loaded": (Story(2, loaded=(2, 4)), 6),
    "accumulated": (Story(every=2), 0),
    "accumulated, two ahead": (Story(2, every=3), 0),
    "left out": (Story(skipped=(0, 3)), 4),
    "announced while the one in front trains": (Story(late=(3,)), 6),
    "announced alone": (Story(late=(1, 2, 3, 4, 5, 6)), 6),
    "all of it": (Story(2, extra=(3,), evaluated=(1,), between=(2,), saved=(4,), skipped=(5,)), 5),
}


def test_what_programs_do_between_gives_the_same_bits():
    job = _job(2, _WHOLE_ROWS, "row_wise_adagrad")
    behind = _assert_same(2, [(name, job, story, None) for name, (story, _) in _STORIES.items()])
    assert behind == {name: count for name, (_, count) in _STORIES.items()}


def test_clipping_by_norm_takes_all_gradients_at_once():
    job = _job(2, _WHOLE_ROWS, "adagrad")
    assert _assert_same(2, [("clipped", job, Story(2), 1e-3)]) == {"clipped": 0}


def _gets_stale(groups, job):
    """A batch with stale rows in the middle: no step is lost, and runs repeat."""
    story = Story(stale=(3, 4))
    one, other = (_Program(groups, job, story).run(1) for _ in range(2))
    return all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True)) and all(
        torch.equal(a[0], b[0]) for a, b in zip(one[1][0], other[1][0], strict=True))


def test_rows_that_turn_stale_repeat_bit_by_bit():
    assert run_ranks(2, _gets_stale, _job(2, ("row", "table"))) == [True, True]


def _parts(groups, job):
    """Rows of both parts, by backward; and whether the rest waited for the next forward."""
    sizes, plan = [], PartedSender.plan

    def noting(self, asked):
        found = plan(self, asked)
        sizes.append(tuple(int(place.slot_vectors.sum()) for place, _, _ in found.parts))
        return found

    PartedSender.plan = noting
    program = _Program(groups, job, Story())
    waited, bytes_behind, late = [], [], []
    collection, announced = program.collection, program.collection.announcements
    for number in range(len(program.batches)):
        program._announce(number, 1)
        update = announced._update
        program.learn(number)
        if update is not None:
            update[1].result(20)  # the forward has let it pass
        before = collection.clock.ahead_s["grads"]
        program.optimizer.step()
        if announced._update is not None:
            with pytest.raises(TimeoutError):
                announced._update[1].result(0.1)
            waited.append(True)
            bytes_behind.append(collection.clock.ahead_s["grads"] == before)
            late.append(announced._coming[0].late is not None)
    PartedSender.plan = plan
    program.collection.forget_announced()
    assert late == [True] * len(waited)  # what the update changed is on its way
    return sizes, waited, bytes_behind, collection.wire.gradients_bytes


def _fixed(job, batch_of):
    """The job with other batches: ``batch_of(step, rank)`` ids of both features, one a bag."""
    steps = []
    for number, step in enumerate(job.steps):
        parts = [{feature: Bags([[row] for row in batch_of(number, rank)])
                  for feature in job.features} for rank in range(len(step.parts))]
        counts = [len(next(iter(part.values()))) for part in parts]
        width = step.targets[0].shape[1]
        steps.append(dataclasses.replace(step, parts=parts, targets=[
            torch.ones(count, width) for count in counts]))
    return dataclasses.replace(job, steps=steps)


_NEW, _SAME, _HALF = (lambda step, rank: range(6 * step, 6 * step + 6),
                      lambda step, rank: [1, 3, 39],
                      lambda step, rank: [4 * step, 4 * step + 1, 4 * step + 4 + rank])


@pytest.mark.parametrize(("batch_of", "parts"), [
    (_NEW, (0, 6)), (_SAME, (3, 0)), (_HALF, (1, 2))], ids=["none", "all", "some"])
def test_only_rows_of_the_next_batch_are_urgent(batch_of, parts):
    job = _fixed(_job(2, ("row",), steps=6), batch_of)
    ranks = run_ranks(2, _parts, job)
    for sizes, waited, nothing_sent, _ in ranks:
        assert sizes == [parts] * 5
        assert waited == nothing_sent == [True] * 5
    plain = run_ranks(2, _bytes_without, job)
    assert [one for *_, one in ranks] == plain


def _bytes_without(groups, job):
    program = _Program(groups, job, Story())
    program.run(0)
    return program.collection.wire.gradients_bytes


class _Product(TwoCollections):
    def forward(self, batch):
        return self.one(batch["a"]).values() * self.other(batch["b"]).values()


def _two_collections(groups, depth):
    model, optimizer = sl.shard(_Product(), groups=groups, optimizer=sl.optim.Adam(lr=0.1))
    generator = torch.Generator().manual_seed(groups.rank)
    batches = [{name: sl.KeyedJaggedTensor([name], torch.randint(0, 20, (5,), generator=generator),
                                           fixed_length=1) for name in "ab"} for _ in range(6)]
    collections = dict(zip("ab", model.collections().values(), strict=True))
    for number, batch in enumerate(batches):
        for other in range(number + (depth if number else 0), number + depth + 1):
            for name, collection in collections.items():
                if depth and other < len(batches):
                    collection.prefetch(batches[other][name])
        model(batch).sum().backward()
        optimizer.step()
    return [chunk.weights.clone() for collection in collections.values()
            for chunk in collection.chunks()]


@pytest.mark.parametrize("depth", [1, 2])
def test_two_collections_share_the_thread(depth):
    plain, ahead = run_ranks(2, _two_collections, 0), run_ranks(2, _two_collections, depth)
    for one, other in zip(plain, ahead, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _left(groups, job):
    """Leaves the loop after a step, with a part behind."""
    program = _Program(groups, job, Story())
    for number, _ in enumerate(sl.prefetching(iter(program.batches), program.model, depth=1)):
        program.learn(number)
        program.optimizer.step()
        if number == 2:
            break
    return [weights for weights, _ in program.rows()]


def _three_plain(groups, job):
    program = _Program(groups, dataclasses.replace(job, steps=job.steps[:3]), Story())
    return [weights for weights, _ in program.run(0)[1][-1]]


def test_a_loop_that_is_left_finishes_its_last_step():
    job = _job(2, ("row",))
    for found, expected in zip(run_ranks(2, _left, job), run_ranks(2, _three_plain, job),
                               strict=True):
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def _bad_next(groups, job):
    program = _Program(groups, job, Story())
    program.batches[2].values()[0] = 10_000
    try:
        program.run(1)
    except BoundsError as error:
        return len(program.seen), str(error)
    except sl.errors.ShardLabError:
        return len(program.seen), ""
    return -1, ""


def test_bad_id_of_the_next_batch_is_named_before_its_turn():
    """Its owners cannot tell what is urgent: nobody can go on."""
    for rank, (seen, message) in enumerate(run_ranks(2, _bad_next, _job(2, ("row",), steps=4))):
        assert seen == 2
        assert f"rank {rank}" in message
        assert "10000" in message


@pytest.mark.parametrize(("change", "optimizer"), [
    ({"storage": {"levels": [{"fraction": 0.2}, {"dtype": "int8"}]}}, "sgd"),
    ({"storage": {"kind": "tensor_train", "rank": 2}}, "sgd"),
    ({"exchange": ExchangeKind.POOLED}, "sgd"), ({"columns": True}, "row_wise_adam"),
    ({"feedback": True}, "sgd"), ({}, None)], ids=lambda value: str(value)[:30])
def test_tables_whose_gradients_stay_together(change, optimizer):
    """Decided from the plan alone, for all tables of a collection."""
    tables = tuple(EmbeddingBagConfig(40, 8, name, (name,), storage=storage) for name, storage in
                   (("plain", "fp32"), ("other", change.get("storage", "fp32"))))
    kind = ShardingType.COLUMN_WISE if "columns" in change else ShardingType.ROW_WISE
    plan = ShardingPlan(2, (table_plan(tables[0], ShardingType.ROW_WISE, 2), table_plan(
        tables[1], kind, 2, exchange=change.get("exchange", ExchangeKind.ROWS))))
    if "feedback" in change:
        plan = plan.with_wire(WireDtypes("fp32", "int4", rounding="nearest", error_feedback=True))
    for rank in range(2):
        assert can_part(compile_layout(tables, plan, rank), optimizer or "row_wise_adam") == (
            optimizer is None)


def _train_forever(groups, job):
    model, optimizer = sl.shard(Bare(job.tables), job.plan, groups=groups,
                                optimizer=make_optimizer(job.optimizer))

    def batches():
        while True:
            for step in job.steps:
                yield build_features(step.parts[groups.rank], job.features)

    for batch in sl.prefetching(batches(), model, depth=1):
        model(batch).values().sum().backward()
        optimizer.step()


def test_a_killed_rank_ends_the_others(tmp_path):
    world = FaultyWorld(3, tmp_path, "gloo", 60.0, _train_forever, _job(3, ("row",)))
    for end in world.hurt(1, signal.SIGKILL).values():
        assert end.code == 3
        assert "rank 1 has ended" in end.error
        assert end.seconds < 10
