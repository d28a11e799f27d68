"""Announces every batch's features one batch early, so that rows come up from the disk in time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from shardlab.sharded.shard import ShardedModel

T = TypeVar("T")


def prefetching(loader: Iterable[T], model: ShardedModel,
                features: Callable[[T], Any] | None = None) -> Iterator[T]:
    """Yields the batches of a loader; while one trains, the next one's rows are read.

    Needs no tracing of the model: only the features are looked at. Ranks must have the same number
    of batches.

    Args:
        loader: batches.
        model: of `shardlab.shard`.
        features: the features of a batch, the very object that the model will pass to its
            collections; None: the batch itself.
    """
    present: T | None = None
    for batch in loader:
        for collection in model.collections().values():
            collection.prefetch(batch if features is None else features(batch))
        if present is not None:
            yield present
        present = batch
    if present is not None:
        yield present
