"""Jobs for the equality tests: tables, plans, batches; trained sharded and by the oracle.

A `Job` is plain data. `train` runs jobs on the ranks of one `run_ranks` call; `train_oracle` runs
the same job unsharded; `merged` puts the ranks' chunks together into whole tables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import shardlab as sl
from shardlab.plan import ShardingPlan
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, PoolingType, ShardingType
from shardlab.storage import TableChunk
from shardlab.table_plan import TablePlan, build_table_plan
from tests.oracle import Bags, Batch, Oracle, PlainOptimizer, empty_state, flat, join, split
from tests.tolerances import ADAPTIVE, LOOKUP, STATE, TRAINED, assert_within

#: Optimisers by kind.
OPTIMIZERS = {"sgd": sl.optim.SGD, "adagrad": sl.optim.Adagrad,
              "row_wise_adagrad": sl.optim.RowWiseAdagrad, "adam": sl.optim.Adam,
              "row_wise_adam": sl.optim.RowWiseAdam}
#: One of each kind, by kind, as the oracle takes them.
PLAIN = {one.kind: one for one in (
    PlainOptimizer("sgd", lr=0.05, weight_decay=0.1),
    PlainOptimizer("adagrad", lr=0.05, eps=1e-10),
    PlainOptimizer("row_wise_adagrad", lr=0.05, eps=1e-10),
    PlainOptimizer("adam", lr=0.05, eps=1e-8),
    PlainOptimizer("row_wise_adam", lr=0.05, betas=(0.8, 0.99), eps=1e-3))}
EXCHANGES = (ExchangeKind.ROWS, ExchangeKind.POOLED)
#: Samples per step and rank, by ranks: unequal ranks, an empty rank, an empty batch.
SIZES = {
    1: [[7], [4], [0], [9], [1], [6]],
    2: [[5, 3], [0, 6], [4, 4], [0, 0], [7, 2], [3, 3]],
    4: [[4, 0, 3, 2], [1, 2, 0, 5], [2, 2, 2, 2], [0, 0, 0, 0], [5, 1, 4, 0], [0, 0, 0, 3]],
}


@dataclass(frozen=True)
class Step:
    """One training step: the ranks' batches, and a target [B, columns] for each rank."""

    parts: list[Batch]
    targets: list[Tensor]

    @property
    def samples(self) -> int:
        return sum(len(target) for target in self.targets)


@dataclass(frozen=True)
class Job:
    """Everything that decides a training run; picklable."""

    tables: tuple[EmbeddingBagConfig, ...]
    plan: ShardingPlan
    optimizer: PlainOptimizer
    weights: dict[str, Tensor]
    steps: list[Step]
    linear: bool = False  # a linear loss: gradients are the targets, whatever the rows
    threads: int = 1

    @property
    def features(self) -> list[str]:
        return [feature for table in self.tables for feature in table.feature_names]


@dataclass
class Run:
    """What one rank saw: outputs of every step, and its chunks at the end."""

    outputs: list[Tensor]
    chunks: list[TableChunk]


class Bare(nn.Module):
    """A model that is nothing but its tables."""

    def __init__(self, tables: Sequence[EmbeddingBagConfig]) -> None:
        super().__init__()
        self.ebc = sl.EmbeddingBagCollection(list(tables))

    def forward(self, features: object) -> sl.KeyedTensor:
        return self.ebc(features)


class TwoCollections(nn.Module):
    """Tables a and b in collections of their own; what is looked up is up to the test."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = (sl.EmbeddingBagCollection(
            [EmbeddingBagConfig(20, 4, name, (name,), sharding=(ShardingType.ROW_WISE,))])
            for name in "ab")


def make_optimizer(plain: PlainOptimizer) -> object:
    """The sharded optimiser of the same kind and hyper-parameters."""
    kind = OPTIMIZERS[plain.kind]
    accepted = {field.name for field in dataclasses.fields(kind)}
    return kind(**{key: value for key, value in dataclasses.asdict(plain).items()
                   if key in accepted})


def build_features(batch: Batch, order: Sequence[str]) -> sl.KeyedJaggedTensor:
    """The batch as a KJT whose keys come in this order."""
    values, lengths, weights = flat(batch, order)
    samples = len(next(iter(batch.values())))
    return sl.KeyedJaggedTensor(list(order), values, weights, lengths=lengths, stride=samples)


def shuffled(names: Sequence[str], seed: int) -> list[str]:
    """Another order of the names for every seed."""
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    return [names[i] for i in order.tolist()]


def loss_of(out: Tensor, target: Tensor, samples: int, linear: bool) -> Tensor:
    """This rank's part of a mean over the global batch of ``samples``."""
    each = out * target if linear else 0.5 * (out - target).square()
    return each.sum() / max(samples, 1)


def sharded_model(groups: sl.comm.Groups,
                  job: Job) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The job's bare model on this rank, holding the job's initial rows."""
    model, optimizer = sl.shard(Bare(job.tables), job.plan, groups=groups,
                                optimizer=make_optimizer(job.optimizer))
    collection = model.collections()["ebc"]
    for table in job.tables:
        whole = job.weights[table.name]
        collection.load_chunk(TableChunk(
            table.name, 0, 0, whole, empty_state(job.optimizer.kind, whole), replicated=False))
    return model, optimizer


def train(groups: sl.comm.Groups, jobs: Sequence[Job]) -> list[Run]:
    """Runs the jobs one after the other on this rank."""
    return [_train_one(groups, job) for job in jobs]


def _train_one(groups: sl.comm.Groups, job: Job) -> Run:
    torch.set_num_threads(job.threads)
    model, optimizer = sharded_model(groups, job)
    outputs = []
    for number, step in enumerate(job.steps):
        batch, target = step.parts[groups.rank], step.targets[groups.rank]
        order = shuffled(job.features, number * groups.world_size + groups.rank)
        optimizer.zero_grad()
        pooled = model(build_features(batch, order))
        out = torch.cat([pooled[feature] for feature in job.features], dim=1)
        # Ranks' losses are averaged, as DDP does: the mean over the global batch needs this.
        loss = groups.world_size * loss_of(out, target, step.samples, job.linear)
        loss.backward()
        optimizer.step()
        outputs.append(out.detach().clone())
    chunks = [dataclasses.replace(chunk, weights=chunk.weights.clone(), state={
        name: state.clone() for name, state in chunk.state.items()})
        for chunk in model.collections()["ebc"].chunks(max_bytes=100)]
    return Run(outputs, chunks)


def in_stages(groups: sl.comm.Groups) -> sl.comm.Groups:
    """The same ranks as two hosts that exchange in two stages."""
    return sl.comm.with_stages(sl.comm.build_groups(groups.process_group, groups.world_size // 2))


def train_in_stages(groups: sl.comm.Groups, jobs: Sequence[Job]) -> list[Run]:
    """As `train`, on two hosts that exchange in two stages."""
    return train(in_stages(groups), jobs)


def train_oracle(job: Job, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Oracle]:
    """Outputs of every step for the global batch, and the oracle after the last one."""
    oracle = Oracle(job.tables, job.weights, job.optimizer, dtype)
    outputs = []
    for step in job.steps:
        pooled = oracle.forward(join(step.parts))
        out = torch.cat([pooled[feature] for feature in job.features], dim=1)
        loss_of(out, torch.cat(step.targets).to(dtype), step.samples, job.linear).backward()
        oracle.step()
        outputs.append(out.detach())
    return outputs, oracle


def merged(job: Job, runs: Sequence[Run]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Whole rows and state by table from all ranks' chunks; copies must be bit-identical."""
    rows: dict[str, Tensor] = {}
    state: dict[str, dict[str, Tensor]] = {}
    for table in job.tables:
        size = (table.num_embeddings, table.embedding_dim)
        rows[table.name], state[table.name] = torch.full(size, torch.nan), {}
        for chunk in (c for run in runs for c in run.chunks if c.table == table.name):
            count, columns = chunk.weights.shape
            area = (slice(chunk.row_start, chunk.row_start + count),
                    slice(chunk.col_start, chunk.col_start + columns))
            _place(rows[table.name], area, chunk.weights, table.name)
            for name, part in chunk.state.items():
                whole = state[table.name].setdefault(
                    name, torch.full(size[:part.dim()], torch.nan))
                _place(whole, area[:part.dim()], part, f"{table.name}.{name}")
        for name, whole in [("rows", rows[table.name]), *state[table.name].items()]:
            assert not whole.isnan().any(), f"{table.name}: chunks do not cover the {name}"
    return rows, state


def _place(whole: Tensor, area: tuple[slice, ...], part: Tensor, name: str) -> None:
    before = whole[area]
    twice = ~before.isnan()
    assert torch.equal(before[twice], part[twice]), f"{name}: copies on two ranks differ"
    whole[area] = part


def assert_equals_oracle(job: Job, runs: Sequence[Run]) -> None:
    """Outputs of every step, final rows and final state against the fp64 oracle."""
    expected, oracle = train_oracle(job)
    adaptive = "ada" in job.optimizer.kind and not job.linear
    trained, kept = (ADAPTIVE, ADAPTIVE) if adaptive else (TRAINED, STATE)
    for number, pooled in enumerate(expected):
        out = torch.cat([run.outputs[number] for run in runs])
        assert_within(out, pooled, trained if number else LOOKUP, f"output of step {number}")
    rows, state = merged(job, runs)
    for table in job.tables:
        name = table.name
        assert_within(rows[name], oracle.rows(name), trained, f"rows of {name}")
        assert sorted(state[name]) == sorted(oracle.state[name]), name
        for key, value in oracle.state[name].items():
            assert_within(state[name][key], value, kept, f"{key} of {name}")


def table_plan(table: EmbeddingBagConfig, kind: ShardingType, world: int, *,
               exchange: ExchangeKind = ExchangeKind.ROWS, first: int = 0) -> TablePlan:
    """Lays a table over as many ranks as the kind can use, starting at rank ``first``."""
    ranks = [(first + i) % world for i in range(world)]
    host = ranks[:max(1, world // 2)]
    columns = 2 if world % 2 == 0 and table.embedding_dim > 1 else 1
    chosen = {
        ShardingType.TABLE_WISE: ranks[:1],
        ShardingType.COLUMN_WISE: ranks[:table.embedding_dim],
        ShardingType.TABLE_ROW_WISE: host,
        ShardingType.TABLE_COLUMN_WISE: host[:table.embedding_dim],
    }.get(kind, ranks)
    return build_table_plan(table, kind, chosen, columns=columns, exchange=exchange)


def sharding_plan(tables: Sequence[EmbeddingBagConfig], world: int,
                  kind: ShardingType | None = None,
                  exchange: ExchangeKind | None = None) -> ShardingPlan:
    """Lays tables as they ask, or all in one way, each from another rank on."""
    return ShardingPlan(world, tuple(
        table_plan(table, kind or table.sharding, world, exchange=exchange or table.exchange,
                   first=i) for i, table in enumerate(tables)))


def mixed_tables(**changes: object) -> list[EmbeddingBagConfig]:
    """One table for every sharding type and exchange, of odd sizes."""
    widths = [6, 5, 16, 2, 24, 9, 8]
    return [EmbeddingBagConfig(3 + 5 * i, widths[i], f"{kind.value}_{exchange.value}",
                               exchange=exchange, sharding=kind,
                               pooling=["sum", "mean"][(i + j) % 2], **changes)
            for j, exchange in enumerate(EXCHANGES) for i, kind in enumerate(ShardingType)]


def random_steps(tables: Sequence[EmbeddingBagConfig], sizes: Sequence[Sequence[int]], *,
                 generator: torch.Generator, weighted: bool = False, longest: int = 5,
                 dyadic: bool = False) -> list[Step]:
    """Steps with ranks' batches of ``sizes[step][rank]`` samples.

    Bags hold 0 to ``longest`` ids with repetitions; the last row and row 0 always occur.
    ``dyadic`` draws bag lengths, weights and targets so that every sum of gradients is exact in
    fp32 (powers of two, a few bits), whatever the order of summation.
    """
    width = sum(table.embedding_dim * len(table.feature_names) for table in tables)
    steps = []
    for parts in sizes:
        batch = {feature: _random_bags(table, sum(parts), generator, weighted, longest, dyadic)
                 for table in tables for feature in table.feature_names}
        target = torch.randn(sum(parts), width, generator=generator)
        if dyadic:
            target = (target * 4).round().clamp(-8, 8) / 4
        steps.append(Step(split(batch, parts), list(target.split(list(parts)))))
    return steps


def _random_bags(table: EmbeddingBagConfig, samples: int, generator: torch.Generator,
                 weighted: bool, longest: int, dyadic: bool) -> Bags:
    def draw(high: int, count: int) -> list[int]:
        return torch.randint(high, (count,), generator=generator).tolist()

    lengths = draw(longest + 1, samples)
    if dyadic and table.pooling is PoolingType.MEAN:
        lengths = [[0, 1, 2, 4][length % 4] for length in lengths]
    # Squaring skews: low rows repeat inside bags and over ranks.
    ids = [[row * row // table.num_embeddings for row in draw(table.num_embeddings, length)]
           for length in lengths]
    filled = [bag for bag in ids if bag]
    if filled:
        filled[0][0], filled[-1][-1] = 0, table.num_embeddings - 1
    if not weighted:
        return Bags(ids)
    if dyadic:
        return Bags(ids, [[0.5 * value for value in draw(4, len(bag))] for bag in ids])
    return Bags(ids, [torch.rand(len(bag), generator=generator).tolist() for bag in ids])


def random_weights(tables: Sequence[EmbeddingBagConfig],
                   generator: torch.Generator) -> dict[str, Tensor]:
    """Initial fp32 rows of every table."""
    return {table.name: torch.randn(table.num_embeddings, table.embedding_dim,
                                    generator=generator) for table in tables}
