"""What all ranks of this machine do together: all-to-all by message size, and a step's overhead."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from shardlab.comm import Groups, Work, all_to_all
from shardlab.jagged import KeyedJaggedTensor
from shardlab.launch.probe.timing import median_together
from shardlab.optim import RowWiseAdagrad
from shardlab.sharded import EmbeddingBagCollection, shard
from shardlab.specs import EmbeddingBagConfig

#: Bytes from each rank to each other one; the first gives the latency.
MESSAGE_BYTES = (8, 4 << 10, 32 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20)
#: All-to-alls of a step, as `planner.estimate` counts them.
STEP_COLLECTIVES = 4
#: Tables of the small and the large step of a rank alone whose difference shows what a shard costs.
FEW_TABLES, MANY_TABLES = 1, 33
_FP32_BYTES = 4


def _finish(exchange: Callable[[], Work]) -> None:
    exchange().wait()


def all_to_all_seconds(groups: Groups, largest: int, seconds: float) -> list[tuple[int, float]]:
    """(bytes to each peer, seconds) of all-to-alls of up to ``largest`` bytes to each peer."""
    found = []
    for size in MESSAGE_BYTES:
        if size > largest:
            break
        count = size // _FP32_BYTES
        source = torch.ones(count * groups.world_size, device=groups.device)
        target = torch.empty_like(source)
        splits = [count] * groups.world_size
        exchange = partial(all_to_all, target, source, splits, splits, groups)
        found.append((size, median_together(partial(_finish, exchange), seconds, groups)))
    return found


def step_seconds(groups: Groups, tables: int, seconds: float) -> float:
    """A step that looks up one row of each of ``tables`` tables: nothing but overhead.

    Every rank of ``groups`` must call it, unless they are a world of one.
    """
    names = [f"t{i}" for i in range(tables)]
    collection = EmbeddingBagCollection([
        EmbeddingBagConfig(num_embeddings=64, embedding_dim=16, name=name) for name in names])
    model, optimizer = shard(collection, optimizer=RowWiseAdagrad(lr=0.01), groups=groups)
    features = KeyedJaggedTensor(names, torch.zeros(tables, dtype=torch.int64),
                                 lengths=torch.ones(tables, dtype=torch.int64)).to(groups.device)
    grad = torch.ones(1, tables * 16, device=groups.device)

    def run() -> None:
        optimizer.zero_grad()
        model(features).values().backward(grad)
        optimizer.step()

    return median_together(run, seconds, groups)
