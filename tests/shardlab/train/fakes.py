"""Small stand-ins for a sharded model and a reader, for tests of what is built around them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from shardlab.comm import Groups
from shardlab.comm.collectives import WireBytes
from shardlab.data.batch import Batch
from shardlab.jagged import KeyedJaggedTensor
from shardlab.plan import ShardingPlan
from shardlab.sharded.clock import PhaseClock
from shardlab.sharded.row_watch import ChangedRows, Snapshot
from shardlab.specs import EmbeddingBagConfig, ShardingType
from shardlab.storage import KeptRoom, TableChunk
from shardlab.storage_bytes import TierBytes
from shardlab.table_plan import Shard, build_table_plan


def table(name: str, rows: int, columns: int) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=columns)


def plan_of(tables: Sequence[EmbeddingBagConfig], kinds: Sequence[ShardingType],
            world_size: int) -> ShardingPlan:
    """Each table over all ranks by its kind; table_wise on the last rank."""
    everyone = list(range(world_size))
    return ShardingPlan(world_size, tuple(
        build_table_plan(entry, kind, everyone[-1:] if kind is ShardingType.TABLE_WISE
                         else everyone) for entry, kind in zip(tables, kinds, strict=True)))


@dataclass
class Held:
    """A shard's weights [n, d] and row-wise state [n]."""

    shard: Shard
    replicated: bool
    weights: Tensor
    state: Tensor


@dataclass
class FakeCollection:
    """Holds one rank's shards as plain tensors; cell (r, c) of table t starts as a known number."""

    tables: list[EmbeddingBagConfig]
    plan: ShardingPlan
    rank: int
    zero: bool = False
    wire: WireBytes = field(default_factory=WireBytes)
    clock: PhaseClock = field(default_factory=PhaseClock)
    council: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(contests=[]))

    def __post_init__(self) -> None:
        self.held: dict[str, list[Held]] = {}
        for number, entry in enumerate(self.plan.tables):
            size = self.tables[number]
            whole = torch.arange(size.num_embeddings * size.embedding_dim).float() + 1000 * number
            whole = whole.view(size.num_embeddings, size.embedding_dim) * (not self.zero)
            self.held[entry.table] = [
                Held(shard, entry.replicated,
                     whole[shard.row_start:shard.row_end, shard.col_start:shard.col_end].clone(),
                     whole[shard.row_start:shard.row_end, 0].clone())
                for shard in entry.shards if shard.rank == self.rank]

    def cache_counts(self) -> dict[str, list[int]]:
        """No table has a cache."""
        return {}

    on_disk = False

    def prefetch(self, features: object, staleness: int = 0) -> None:
        """Nothing lies on a disk."""

    def forget_announced(self) -> None:
        """Nothing was announced."""

    def chunks(self, max_bytes: int = 64 << 20) -> Iterator[TableChunk]:
        for name, shards in self.held.items():
            for held in shards:
                step = max(1, max_bytes // (4 * held.shard.columns))
                for top in range(0, held.shard.rows, step):
                    yield TableChunk(name, held.shard.row_start + top, held.shard.col_start,
                                     held.weights[top:top + step],
                                     {"sum": held.state[top:top + step]}, held.replicated)

    @property
    def snapshots(self) -> FakeCollection:
        """Takes them itself."""
        return self

    def take(self, changed: object, buffer_bytes: int) -> Snapshot:
        """Holds nothing: `others` are all."""
        return Snapshot({}, None, KeptRoom(buffer_bytes))

    def others(self, max_bytes: int) -> Iterator[TableChunk]:
        return self.chunks(max_bytes)

    def drop(self, snapshot: Snapshot) -> None:
        snapshot.close()

    def watch_changes(self) -> ChangedRows:
        """Steps change nothing."""
        return ChangedRows({})

    def begin_load(self) -> None:
        for held in (held for shards in self.held.values() for held in shards):
            held.state.zero_()

    def load_chunk(self, chunk: TableChunk) -> None:
        for held in self.held[chunk.table]:
            shard, (rows, columns) = held.shard, chunk.weights.shape
            for row in range(rows):
                here = chunk.row_start + row - shard.row_start
                if not 0 <= here < shard.rows:
                    continue
                held.state[here] = chunk.state["sum"][row]
                for column in range(columns):
                    there = chunk.col_start + column - shard.col_start
                    if 0 <= there < shard.columns:
                        held.weights[here, there] = chunk.weights[row, column]

    def tier_bytes(self) -> TierBytes:
        return TierBytes(hbm=sum(held.weights.nbytes for shards in self.held.values()
                                 for held in shards))


class FakeModel(nn.Module):
    """A linear model of the dense features beside a collection that it does not read."""

    def __init__(self, collection: FakeCollection, num_dense: int = 3) -> None:
        super().__init__()
        self.groups = Groups()
        self.table_groups = Groups(rank=collection.rank)
        self.replica = 0, 1
        self.reducer = None
        self.linear = nn.Linear(num_dense, 1)
        self.dropout = nn.Dropout(0.2)
        self._collection = collection

    @property
    def clock(self) -> PhaseClock:
        return self._collection.clock

    def sync_replicas(self) -> None:
        """There are none."""

    def collections(self) -> dict[str, FakeCollection]:
        return {"ebc": self._collection}

    def forward(self, dense: Tensor, features: KeyedJaggedTensor) -> Tensor:
        if self.training:
            self._collection.wire.ids_bytes += 8 * len(features.values())
        return self.linear(self.dropout(dense)).squeeze(1)


class FakeReader:
    """Rows of given dense features and labels; global batches cut evenly over ranks."""

    def __init__(self, dense: Tensor, labels: Tensor, batch_size: int, rank: int = 0,
                 world_size: int = 1) -> None:
        self.dense, self.labels = dense, labels
        self.size, self.rank, self.world_size = batch_size * world_size, rank, world_size
        self.start = 0

    def __len__(self) -> int:
        return -(-(len(self.labels) - self.start) // self.size)

    def __iter__(self) -> Iterator[Batch]:
        for first in range(self.start, len(self.labels), self.size):
            last = min(first + self.size, len(self.labels))
            begin, end = (first + (last - first) * rank // self.world_size
                          for rank in (self.rank, self.rank + 1))
            ids = torch.zeros(end - begin, 1, dtype=torch.int64)
            yield Batch(self.dense[begin:end], KeyedJaggedTensor.from_dense(["f"], ids),
                        self.labels[begin:end], last)


def fake_clicks(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Dense features [rows, 3] and labels [rows] that follow them."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, 3, generator=generator)
    chance = torch.sigmoid(dense @ torch.tensor([1.0, -1.0, 0.5]) - 1.0)
    return dense, (torch.rand(rows, generator=generator) < chance).float()
