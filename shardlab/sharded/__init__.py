"""The sharded lookup: ids out, rows back."""

from shardlab.sharded.collection import ShardedEmbeddingBagCollection
from shardlab.sharded.embedding_bags import EmbeddingBagCollection
from shardlab.sharded.optimizer import ShardedOptimizer
from shardlab.sharded.prefetch import prefetching
from shardlab.sharded.shard import ShardedModel, shard, simple_plan

__all__ = ["EmbeddingBagCollection", "ShardedEmbeddingBagCollection", "ShardedModel",
           "ShardedOptimizer", "prefetching", "shard", "simple_plan"]
