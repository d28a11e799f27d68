"""What pruned shards hold: chunks, their index, and what decisions left behind.

`PrunedStorage` reads, trains and decides on it; checkpoints (`chunk_files`, `chunk_snapshot`,
`chunk_changes`, `chunk_watch`) know this much of it, and not the storage.
"""

from __future__ import annotations

import threading

import torch

from shardlab.ops.chunk_rows import move_places
from shardlab.storage.base import LocalShard, StorageOptions
from shardlab.storage.chunk_absent import SharedChunks
from shardlab.storage.chunk_stores import build_pools, plan_stores, pruned_spec
from shardlab.storage.levels import Clock


class PrunedState:
    """The chunks of all shards of a rank that are pruned.

    Args:
        shards: what to hold.
        options: optimiser, seed, device.

    Attributes:
        stores: plans of the stores, each of one or more shards.
        pools: chunks of all stores, in one arena.
        index: which row's chunks lie where, and their utilities.
        reached: whether the index moves chunks of the pools itself.
        thresholds: fp32 [shards]: of admission, as of the last decision.
        scale: fp32 [shards]: unit of gradient norms; 0 before it is known.
        measured: fp32 [shards]: what was measured for the next unit.
        since: step as of which utilities are, by store: of the last decision, or a later one.
        admitted: int64 [shards]: chunks since the start.
        evicted: int64 [shards]: chunks since the start.
        absent: what absent chunks read as.
        lock: held while index and pools change.
        generation: grows when the marks of changed rows begin anew.

    Raises:
        ConfigError: shards that cannot be pruned here.
    """

    def __init__(self, shards: list[LocalShard], options: StorageOptions) -> None:
        self.shards, self.optimizer = shards, options.optimizer
        self.clock = Clock(options.seed)
        self.stores = plan_stores(shards, options.optimizer)
        self.pools = build_pools(shards, self.stores, options)
        self.index = self.pools.index
        self.reached = self.pools.arena.device.type == "cpu" \
            and self.pools.is_native("update_chunks")
        count = len(shards)
        self.thresholds = torch.zeros(count, dtype=torch.float32)
        self.scale = torch.tensor([0.0 if pruned_spec(local).normalize else 1.0
                                   for local in shards])
        self.measured = torch.zeros(count)
        self.since = [0] * len(self.stores)
        self.admitted = torch.zeros(count, dtype=torch.int64)
        self.evicted = torch.zeros(count, dtype=torch.int64)
        self.absent = SharedChunks(self.pools, shards)
        self.lock = threading.RLock()
        self.generation = 0

    def compact(self, store: int, *, tight: bool = True) -> None:
        """Moves chunks together and gives slabs behind them back to the system.

        Args:
            store: number of the store.
            tight: all of them; else those that the budget has no room for.
        """
        with self.lock:
            moves = self.index.compact(store, tight=tight)
            if not self.reached and moves.shape[0]:
                move_places(self.pools, self.stores[store].blocks[0], moves)

    def forget_changes(self) -> None:
        """Clears the marks of changed rows: a checkpoint of all rows is taken, or loaded, now."""
        self.generation += 1
        for store in range(len(self.stores)):
            self.index.clear_marks(store)
