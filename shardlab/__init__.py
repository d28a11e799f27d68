"""ShardLab trains recommendation models whose embedding tables outgrow a device.

    import shardlab as sl
    ebc = sl.EmbeddingBagCollection([sl.EmbeddingBagConfig(...), ...])
    model, optimizer = sl.shard(MyModel(ebc))

Names are loaded on first use: `import shardlab` alone, and the planner, import no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "EmbeddingBagConfig": "shardlab.specs",
    "PoolingType": "shardlab.specs",
    "ShardingType": "shardlab.specs",
    "ShardingPlan": "shardlab.plan",
    "KeyedJaggedTensor": "shardlab.jagged",
    "KeyedTensor": "shardlab.jagged",
    "JaggedTensor": "shardlab.jagged",
    "EmbeddingBagCollection": "shardlab.sharded",
    "shard": "shardlab.sharded",
    "simple_plan": "shardlab.sharded",
    "prefetching": "shardlab.sharded",
    "save": "shardlab.train",
    "load": "shardlab.train",
}
_MODULES = ("comm", "data", "inference", "interop", "models", "optim", "train")

__all__ = [*_HOMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _MODULES:
        return import_module(f"shardlab.{name}")
    raise AttributeError(f"module 'shardlab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
