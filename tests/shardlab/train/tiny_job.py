"""A real but tiny training job: three sharded tables, batch norm, dropout, in-memory rows."""

from __future__ import annotations

import io
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

import shardlab as sl
from shardlab.comm import Groups
from shardlab.data.batch import Batch
from shardlab.data.reader import Reader
from shardlab.data.rows import Bags, RowBlock
from shardlab.launch.eager import eager
from shardlab.plan import ShardingPlan
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType
from shardlab.table_plan import build_table_plan
from shardlab.train import Trainer, TrainOptions, build_schedule, open_run_folder

TABLES = (EmbeddingBagConfig(name="user", num_embeddings=200, embedding_dim=8),
          EmbeddingBagConfig(name="item", num_embeddings=90, embedding_dim=6),
          EmbeddingBagConfig(name="hour", num_embeddings=24, embedding_dim=4))
#: The same tables, each in another kind of storage.
MIXED = tuple(replace(table, storage=storage) for table, storage in zip(TABLES, (
    {"levels": [{"fraction": 0.2}, {"dtype": "fp16"}]},
    # Whole pages make up most of so small a table: all rows fit, and decisions decay them.
    {"kind": "pruned", "budget": {"bytes": 100_000}, "chunks": 2, "period": 3, "warmup": 0},
    {"kind": "tensor_train", "rank": 3, "row_factors": [2, 3, 4], "column_factors": [2, 2, 1],
     "cache_fraction": 0.2}), strict=True))
KINDS = (ShardingType.ROW_WISE, ShardingType.COLUMN_WISE, ShardingType.DATA_PARALLEL)
OPTIMIZERS = {"row_wise_adagrad": sl.optim.RowWiseAdagrad(lr=0.1), "adam": sl.optim.Adam(lr=0.02),
              "sgd": sl.optim.SGD(lr=0.5)}
OPTIONS = TrainOptions(epochs=2, log_every=4, checkpoint_every=5, validate_every=8)
#: Written while training goes on, every second one incremental.
BEHIND = replace(OPTIONS, checkpoint_background=True, checkpoint_incremental=True,
                 checkpoint_full_every=2)
GLOBAL_BATCH = 32
ROWS = 32 * 9 + 9  # 10 steps an epoch, the last one uneven; batch norm wants 2 rows a rank


@dataclass(frozen=True)
class MemoryRows:
    """Clicks that follow from ids and dense values, the same for the same seed."""

    rows: int
    seed: int
    features: tuple[str, ...] = tuple(table.name for table in TABLES)
    num_dense: int = 3

    def num_rows(self) -> int:
        return self.rows

    def open(self) -> MemoryRows:
        return self

    def close(self) -> None:
        """Nothing is open."""

    def read(self, first: int, last: int) -> RowBlock:
        generator = np.random.default_rng(self.seed)
        ids = [generator.integers(0, table.num_embeddings, self.rows) for table in TABLES]
        dense = generator.standard_normal((self.rows, 3)).astype(np.float32)
        score = dense[:, 0] + (ids[0] % 3) - 1.5 * (ids[1] % 2) - 1.0
        labels = (generator.random(self.rows) < 1 / (1 + np.exp(-score))).astype(np.float32)
        part = slice(first, last)
        return RowBlock(labels[part], dense[part], [Bags(column[part]) for column in ids])


class TinyModel(nn.Module):
    """A linear layer over dense values and pooled rows, after batch norm and dropout."""

    def __init__(self, plain: bool, tables: Sequence[EmbeddingBagConfig]) -> None:
        super().__init__()
        self.ebc = sl.EmbeddingBagCollection(tables)
        width = 3 + sum(table.embedding_dim for table in TABLES)
        self.norm = nn.Identity() if plain else nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(0.0 if plain else 0.1)
        self.top = nn.Linear(width, 1)

    def forward(self, dense: Tensor, features: sl.KeyedJaggedTensor) -> Tensor:
        inputs = torch.cat([dense, self.ebc(features).values()], dim=1)
        return self.top(self.dropout(self.norm(inputs))).squeeze(1)


def build_plan(world_size: int, tables: Sequence[EmbeddingBagConfig] = TABLES) -> ShardingPlan:
    return ShardingPlan(world_size, tuple(
        build_table_plan(table, kind, range(world_size), exchange=ExchangeKind.ROWS)
        for table, kind in zip(tables, KINDS, strict=True)))


def build_trainer(groups: Groups, folder: str, *, optimizer: str = "row_wise_adagrad",
                  plain: bool = False, rows: int = ROWS,
                  options: TrainOptions = OPTIONS,
                  tables: Sequence[EmbeddingBagConfig] = TABLES) -> Trainer:
    """The job's trainer.

    ``plain`` has no dropout and no batch norm, which see one rank only, and plain SGD, which does
    not enlarge rounding: it ends alike on any number of ranks.
    """
    torch.manual_seed(5)
    dense = partial(eager(torch.optim.SGD if plain else torch.optim.Adam), lr=0.05)
    model, both = sl.shard(TinyModel(plain, tables), build_plan(groups.world_size, tables),
                           groups=groups, seed=3,
                           optimizer=OPTIMIZERS["sgd" if plain else optimizer],
                           dense_optimizer=dense)
    readers = [Reader(MemoryRows(count, seed), GLOBAL_BATCH // groups.world_size,
                      rank=groups.rank, world_size=groups.world_size)
               for count, seed in ((rows, 1), (150, 2))]
    return Trainer(model, both, groups, *readers, open_run_folder(folder, "auto", groups), options,
                   build_schedule(both, "linear_decay", 2, 25, 0.1), Console(file=io.StringIO()))


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Everything that this rank trains: rows and their state, dense weights and their state."""
    state = dict(trainer.model.state_dict())
    for number, chunk in enumerate(trainer.model.collections()["ebc"].chunks()):
        state |= {f"{chunk.table}.{number}.{name}": tensor.clone() for name, tensor in
                  {"weights": chunk.weights, **chunk.state, **chunk.extra}.items()}
    for key, entry in trainer.optimizer.dense.state.items():
        state |= {f"dense.{tuple(key.shape)}.{name}": value for name, value in entry.items()}
    return {name: tensor.detach().clone() for name, tensor in state.items()}


class SlowReader(Reader):
    """Waits before every batch, so that a kill can hit the middle of a run."""

    seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            time.sleep(self.seconds)
            yield batch


def train_tiny_job(folder: str, step_seconds: float, kind: str) -> None:
    """Trains in a folder, as a process of its own, and leaves a digest of the weights there.

    ``kind``: "rows", or "mixed" for tables of all kinds of storage.
    """
    torch.set_num_threads(1)
    trainer = build_trainer(Groups(), folder, options=BEHIND,
                            tables=MIXED if kind == "mixed" else TABLES)
    trainer.train_reader = SlowReader(MemoryRows(ROWS, 1), GLOBAL_BATCH)
    trainer.train_reader.seconds = step_seconds
    trainer.run()
    digest = 0
    for name, tensor in sorted(state_of(trainer).items()):
        digest = zlib.crc32(name.encode() + tensor.contiguous().numpy().tobytes(), digest)
    Path(folder, "digest").write_text(f"{digest:08x}")
