"""Announces batches before they train, so that their exchange is done when they do."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from shardlab.errors import ConfigError
from shardlab.sharded.shard import ShardedModel

T = TypeVar("T")


def prefetching(loader: Iterable[T], model: ShardedModel,
                features: Callable[[T], Any] | None = None, *, depth: int | None = None,
                staleness: int = 0) -> Iterator[T]:
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
        depth: batches that are announced while one trains; 0: none. None: 1, but 0 for ranks that
            share memory and keep no table on disk: there, exchange is copying, which costs the
            cores that train.
        staleness: 0, or 1 with a depth of 1.

    Raises:
        ConfigError: such a depth and staleness do not go together.
    """
    check_depth(depth, staleness)
    collections = list(model.collections().values())
    if depth is None:
        depth = int(staleness > 0 or not model.table_groups.shares_memory or
                    any(collection.on_disk for collection in collections))
    if model.table_groups.world_size == 1:
        depth = min(depth, 1)  # a disk needs no more, and nothing else is done ahead
    coming: deque[T] = deque()
    try:
        for batch in loader:
            if depth:
                for collection in collections:
                    collection.prefetch(batch if features is None else features(batch), staleness)
            coming.append(batch)
            if len(coming) > depth:
                yield coming.popleft()
        while coming:
            yield coming.popleft()
    finally:
        for collection in collections:
            collection.forget_announced()


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
