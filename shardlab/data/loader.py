"""Reads batches ahead in a background thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from types import TracebackType

from shardlab.data.batch import Batch


class PrefetchLoader:
    """Yields the batches of a reader while a thread prepares the next ones.

    What the reader raises is raised to the consumer, in its place in the stream. Leaving the
    loop early, `close`, or the end of a ``with`` block stops the thread and waits for it.

    Args:
        batches: a reader; each iteration iterates over it anew.
        depth: batches held ready at most.
        pin_memory: copy batches to page-locked memory, for transfers to a GPU.
    """

    def __init__(self, batches: Iterable[Batch], depth: int = 4, pin_memory: bool = False) -> None:
        if depth < 1:
            raise ValueError(f"PrefetchLoader: depth must be 1 or more, found {depth}")
        self.batches, self.depth, self.pin_memory = batches, depth, pin_memory
        self._feeds: list[_Feed] = []

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]  # as sized as its reader is

    def __iter__(self) -> Iterator[Batch]:
        feed = _Feed(self.batches, self.depth, self.pin_memory)
        self._feeds.append(feed)
        try:
            while (batch := feed.take()) is not None:
                yield batch
        finally:
            feed.close()
            self._feeds.remove(feed)

    def close(self) -> None:
        """Stops every running iteration; waits for their threads."""
        for feed in list(self._feeds):
            feed.close()

    def __enter__(self) -> PrefetchLoader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


class _Feed:
    """One iteration: a thread that fills a bounded queue."""

    def __init__(self, batches: Iterable[Batch], depth: int, pin_memory: bool) -> None:
        self._ready: deque[Batch] = deque()
        self._changed = threading.Condition()
        self._finished = self._closed = False
        self._error: BaseException | None = None
        self._depth, self._pin_memory = depth, pin_memory
        # A daemon: a loop that nobody finishes must not keep the process alive.
        self._thread = threading.Thread(target=self._run, args=(batches,), daemon=True,
                                        name="shardlab-prefetch")
        self._thread.start()

    def take(self) -> Batch | None:
        """The next batch; None at the end; raises what the reader raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._finished or self._closed)
            if self._ready and not self._closed:
                batch = self._ready.popleft()
                self._changed.notify_all()
                return batch
            error, self._error = self._error, None
        if error is not None:
            raise error
        return None

    def close(self) -> None:
        """Stops the thread and drops what it has prepared."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def _run(self, batches: Iterable[Batch]) -> None:
        iterator = None
        try:
            iterator = iter(batches)
            for batch in iterator:
                if not self._put(batch.pin_memory() if self._pin_memory else batch):
                    break
        except BaseException as error:  # raised again in the consumer's thread
            self._error = error
        finally:
            if hasattr(iterator, "close"):
                iterator.close()  # the reader's files
            with self._changed:
                self._finished = True
                self._changed.notify_all()

    def _put(self, batch: Batch) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: len(self._ready) < self._depth or self._closed)
            if self._closed:
                return False
            self._ready.append(batch)
            self._changed.notify_all()
            return True
