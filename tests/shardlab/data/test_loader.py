"""The prefetching thread: same batches, bounded, ends with its consumer, passes errors on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from shardlab.data import Batch, PrefetchLoader, Reader, SyntheticCriteoSource
from shardlab.errors import DataError
from shardlab.jagged import KeyedJaggedTensor


class Counting:
    """Yields ``count`` batches, then maybe an error; knows how far it got and if it was closed."""

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.count, self.error = count, error
        self.made, self.closed = 0, False

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        try:
            for i in range(self.count):
                self.made += 1
                yield Batch(torch.empty(0, 0), KeyedJaggedTensor.empty(), torch.empty(0), i)
            if self.error:
                raise self.error
        finally:
            self.closed = True


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    yield
    assert [t.name for t in threading.enumerate() if t.name == "shardlab-prefetch"] == []


def positions(batches: Iterator[Batch] | PrefetchLoader) -> list[int]:
    return [batch.position for batch in batches]


@pytest.mark.parametrize("depth", [1, 3, 20], ids=lambda d: f"depth={d}")
@pytest.mark.parametrize("count", [0, 1, 10], ids=lambda c: f"batches={c}")
def test_all_batches_in_order_every_time(depth: int, count: int) -> None:
    loader = PrefetchLoader(Counting(count), depth)
    assert len(loader) == count
    for _ in range(2):
        assert positions(loader) == list(range(count))


def test_same_batches_as_the_reader() -> None:
    reader = Reader(SyntheticCriteoSource({"C1": 10, "C2": 20}), 16, stop=100)
    for left, right in zip(PrefetchLoader(reader), reader, strict=True):
        assert torch.equal(left.sparse.values(), right.sparse.values())
        assert torch.equal(left.labels, right.labels)
        assert left.position == right.position


def test_never_more_than_depth_ahead() -> None:
    source = Counting(100)
    batches = iter(PrefetchLoader(source, depth=3))
    next(batches)
    deadline = time.monotonic() + 5
    while source.made < 5 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    # One was taken, three are ready, and one waits for a place.
    assert source.made == 5
    batches.close()
    assert source.closed


def test_error_arrives_in_its_place_with_its_text() -> None:
    error = DataError("a.tsv, line 7: broken")
    batches = iter(PrefetchLoader(Counting(2, error), depth=8))
    assert [next(batches).position, next(batches).position] == [0, 1]
    with pytest.raises(DataError, match=r"^a\.tsv, line 7: broken$") as caught:
        next(batches)
    assert caught.value is error
    assert list(batches) == []


def test_leaving_the_loop_stops_the_thread() -> None:
    source = Counting(100)
    for batch in PrefetchLoader(source, depth=2):
        if batch.position == 3:
            break
    assert source.closed
    assert source.made < 10


def test_close_stops_every_iteration() -> None:
    source = Counting(100)
    with PrefetchLoader(source, depth=2) as loader:
        first, second = iter(loader), iter(loader)
        assert (next(first).position, next(second).position) == (0, 0)
    assert source.closed
    assert positions(first) == positions(second) == []
    loader.close()  # once more does no harm


def test_depth_must_be_positive() -> None:
    with pytest.raises(ValueError, match="depth must be 1 or more, found 0"):
        PrefetchLoader(Counting(1), depth=0)


@pytest.mark.gpu
def test_pinned_batches() -> None:
    reader = Reader(SyntheticCriteoSource({"C1": 10}), 16, stop=32)
    for batch in PrefetchLoader(reader, pin_memory=True):
        assert batch.labels.is_pinned()
        assert batch.sparse.values().is_pinned()
        moved = batch.to("cuda", non_blocking=True)
        moved.record_stream(torch.cuda.current_stream())
        assert torch.equal(moved.labels.cpu(), batch.labels)
