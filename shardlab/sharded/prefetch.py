"""Announces batches before they train, so that their exchange is done when they do."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from shardlab.errors import ConfigError
from shardlab.sharded.depth_trial import DepthChoice, DepthTrial
from shardlab.sharded.shard import ShardedModel

T = TypeVar("T")


def prefetching(loader: Iterable[T], model: ShardedModel,
                features: Callable[[T], Any] | None = None, *, depth: int | None = None,
                staleness: int = 0,
                chosen: Callable[[DepthChoice], None] | None = None) -> Iterator[T]:
    """Yields the batches of a loader; while one trains, the next ones are exchanged.

    Another thread sends their ids, brings up the rows that lie on disk, and sends their rows.
    Training gives the same bits as without it: rows that a batch in front changes travel after
    that batch's update. With ``staleness=1`` they do not wait, and may lack the last update.

    Needs no tracing of the model: only the features are looked at. Ranks must have the same number
    of batches.

    Args:
        loader: batches.
        model: of `shardlab.shard`.
        features: the features of a batch, the very object that the model will pass to its
            collections; None: the batch itself.
        depth: batches that are announced while one trains; 0: none. None: 1; but 0 for ranks that
            share memory and keep no table on disk, since exchange there is copying, which costs
            the cores that train; and between CPUs of several hosts whichever of 0 and 1 is faster
            on the first 50 batches.
        staleness: 0, or 1 with a depth of 1.
        chosen: is told what was found on these batches.

    Raises:
        ConfigError: such a depth and staleness do not go together.
    """
    check_depth(depth, staleness)
    collections = list(model.collections().values())
    trial = DepthTrial(model.table_groups, _depth_of(model, depth, staleness), chosen)
    coming: deque[T] = deque()
    try:
        for batch in loader:
            if trial.depth:
                for collection in collections:
                    collection.prefetch(batch if features is None else features(batch), staleness)
            coming.append(batch)
            while len(coming) > trial.depth:
                yield coming.popleft()
                trial.trained()
        while coming:
            yield coming.popleft()
    finally:
        for collection in collections:
            collection.forget_announced()


def _depth_of(model: ShardedModel, depth: int | None, staleness: int) -> int | None:
    """The depth to take; None: whichever is faster."""
    groups = model.table_groups
    if groups.world_size == 1:  # a disk needs no more, and nothing else is done ahead
        return 1 if depth is None else min(depth, 1)
    on_disk = any(collection.on_disk for collection in model.collections().values())
    if depth is not None or staleness or on_disk:
        return 1 if depth is None else depth
    if groups.shares_memory:
        return 0
    return None if groups.device.type == "cpu" else 1


def check_depth(depth: int | None, staleness: int) -> None:
    """Refuses what cannot run.

    Raises:
        ConfigError: names the values.
    """
    if depth is None:
        depth = 1
    if depth < 0 or staleness not in (0, 1):
        raise ConfigError(f"exchange: depth must be at least 0 and staleness 0 or 1, found depth "
                          f"{depth} and staleness {staleness}")
    if staleness and depth != 1:
        raise ConfigError(f"exchange: staleness 1 means rows lack at most one update, which takes "
                          f"a depth of 1, found {depth}; set depth 1 or staleness 0")
