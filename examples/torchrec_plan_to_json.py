"""Writes a TorchRec sharding plan as JSON that `shardlab plan JOB.yaml --import-torchrec` reads.

In a program that plans with TorchRec:

    plan = EmbeddingShardingPlanner(...).plan(model, sharders)     # or collective_plan
    Path("torchrec.json").write_text(plan_to_json(plan))

Run alone, it shows what is written, for a plan by hand that looks like TorchRec's. It needs neither
TorchRec nor torch:

    python examples/torchrec_plan_to_json.py
"""

from __future__ import annotations

import json
from enum import Enum
from types import SimpleNamespace
from typing import Any

#: Fields of a ParameterSharding that decide where rows lie.
FIELDS = ("sharding_type", "compute_kernel", "ranks", "sharding_spec", "cache_params")


def plan_to_json(plan: Any) -> str:
    """A ShardingPlan, an EmbeddingModuleShardingPlan or a dict of either, as JSON.

    Args:
        plan: TorchRec's plan.
    """
    return json.dumps(_module(getattr(plan, "plan", plan)), indent=1)


def _module(value: Any) -> dict[str, Any]:
    """Tables of a module, or modules of a model."""
    return {str(name): _parameter(entry) if hasattr(entry, "sharding_type") else _module(entry)
            for name, entry in value.items()}


def _parameter(entry: Any) -> dict[str, Any]:
    return {name: _plain(name, getattr(entry, name, None)) for name in FIELDS
            if getattr(entry, name, None) is not None}


def _plain(name: str, value: Any) -> Any:
    if name == "sharding_spec":
        return {"shards": [{"shard_offsets": list(shard.shard_offsets),
                            "shard_sizes": list(shard.shard_sizes),
                            "placement": str(shard.placement)} for shard in value.shards]}
    if name == "cache_params":
        algorithm = getattr(value, "algorithm", None)
        return {"load_factor": getattr(value, "load_factor", None),
                "algorithm": algorithm.name.lower() if algorithm is not None else None}
    return value.value if isinstance(value, Enum) else value


def example_plan() -> dict[str, Any]:
    """Two tables as a TorchRec plan holds them: one by rows over two ranks, one behind a cache."""
    def shard(rank: int, row: int, rows: int) -> SimpleNamespace:
        return SimpleNamespace(shard_offsets=[row, 0], shard_sizes=[rows, 16],
                               placement=f"rank:{rank}/cuda:{rank}")

    user = SimpleNamespace(sharding_type="row_wise", compute_kernel="fused", ranks=[0, 1],
                           sharding_spec=SimpleNamespace(shards=[shard(0, 0, 500),
                                                                 shard(1, 500, 500)]))
    item = SimpleNamespace(sharding_type="table_wise", compute_kernel="fused_uvm_caching",
                           ranks=[1], sharding_spec=SimpleNamespace(shards=[shard(1, 0, 4000)]),
                           cache_params=SimpleNamespace(load_factor=0.1, algorithm=None))
    return {"sparse.ebc": {"t_user": user, "t_item": item}}


def main() -> None:
    """Shows what is written."""
    print(plan_to_json(example_plan()))


if __name__ == "__main__":
    main()
