"""`EmbeddingBagCollection` as the user writes it, and sharded as it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shardlab.comm import Groups, WireBytes
from shardlab.errors import ShardLabError
from shardlab.jagged import KeyedTensor
from shardlab.plan import ShardingPlan
from shardlab.sharded.exchange import Exchange
from shardlab.sharded.gradients import PendingGradients, RowUpdater
from shardlab.sharded.inputs import InputReader
from shardlab.sharded.layout import compile_layout
from shardlab.specs import EmbeddingBagConfig, TierBytes, check_tables
from shardlab.storage import TableChunk, build_storage

_CHUNK_BYTES = 64 << 20


class EmbeddingBagCollection(nn.Module):
    """Several tables and the features that read them; holds no weights until it is sharded.

    Args:
        tables: unique names; every feature belongs to one table.

    Raises:
        ConfigError: duplicate tables or features.
    """

    def __init__(self, tables: Sequence[EmbeddingBagConfig]) -> None:
        super().__init__()
        check_tables(tables)
        self.tables = tuple(tables)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The tables, under TorchRec's name."""
        return list(self.tables)

    @property
    def feature_names(self) -> list[str]:
        """All features, in the order of the output's columns."""
        return [name for table in self.tables for name in table.feature_names]

    def forward(self, features: Any) -> KeyedTensor:
        """Refuses to run: tables are only ever built in shards.

        Raises:
            ShardLabError: always.
        """
        raise ShardLabError(
            "this EmbeddingBagCollection holds no weights yet; call `model, optimizer = "
            "shardlab.shard(model)` first (it works on one process, too)")


class ShardedEmbeddingBagCollection(nn.Module):
    """The tables of a collection, in shards over all ranks.

    Args:
        tables: the tables.
        plan: where they go.
        groups: the ranks.
        optimizer: kind of row optimiser, which decides the state's bytes.
        seed: of the initial weights; the same on all ranks.

    Raises:
        PlanError: the plan does not fit the tables or the world size.
    """

    def __init__(self, tables: Sequence[EmbeddingBagConfig], plan: ShardingPlan, groups: Groups,
                 optimizer: str, seed: int = 0) -> None:
        super().__init__()
        plan.check(tables, groups.world_size)
        self.tables, self.plan, self.groups = tuple(tables), plan, groups
        layout = compile_layout(self.tables, plan, groups.rank)
        self.storage = build_storage(list(layout.local_shards), optimizer, seed, groups.device)
        self._reader = InputReader(layout, groups.device)
        self._exchange = Exchange(layout, self.storage, groups, self._reader)
        self.updater = RowUpdater(layout, self.storage, groups, self._exchange.wire)
        self.pending: list[PendingGradients] = []
        self._keys = list(layout.features)
        self._dims = [tables[t].embedding_dim for t in layout.feature_table]
        # Autograd calls a backward only if some input wants a gradient; no table is a tensor here.
        self._anchor = torch.zeros((), device=groups.device, requires_grad=True)

    def forward(self, features: Any) -> KeyedTensor:
        """Looks features up by name and pools them.

        Args:
            features: a KeyedJaggedTensor or anything `as_kjt` takes.

        Returns:
            values fp32 [B, sum of dims], columns by feature in the tables' order.

        Raises:
            InputError: a feature is missing, unknown or malformed.
            BoundsError: an id outside its table.
        """
        batch = self._reader.read(features)
        if torch.is_grad_enabled() and self.training:
            values = _Lookup.apply(self._anchor, self, batch)
        else:
            values, _ = self._exchange.forward(batch)
        return KeyedTensor(self._keys, self._dims, values)

    @property
    def wire(self) -> WireBytes:
        """Bytes that this rank has sent to others."""
        return self._exchange.wire

    def tier_bytes(self) -> TierBytes:
        """Bytes of this rank's shards, by tier."""
        return self.storage.tier_bytes()

    def chunks(self, max_bytes: int = _CHUNK_BYTES) -> Iterator[TableChunk]:
        """Streams this rank's rows and their optimiser state."""
        return self.storage.chunks(max_bytes)

    def begin_load(self) -> None:
        """Call once before the first `load_chunk` of a checkpoint."""
        self.storage.begin_load()

    def load_chunk(self, chunk: TableChunk) -> None:
        """Writes the cells of the chunk that this rank holds."""
        self.storage.load_chunk(chunk)


class _Lookup(torch.autograd.Function):
    """Forward: the exchange's lookup. Backward: sums and sends gradients, which wait for step()."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, collection: ShardedEmbeddingBagCollection,
                batch: Any) -> Tensor:
        values, lookup = collection._exchange.forward(batch)
        ctx.collection, ctx.lookup = collection, lookup
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        collection: ShardedEmbeddingBagCollection = ctx.collection
        collection.pending.append(collection._exchange.backward(ctx.lookup, grad))
        return None, None, None
