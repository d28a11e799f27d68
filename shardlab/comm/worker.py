"""The thread that talks for batches that come, while the main thread trains."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch


class RightOfWay:
    """Lets what a step waits for pass before what a job sends ahead of its turn.

    Jobs get ascending numbers, and run in this order. A job waits until its number may pass; who
    waits for a job, or has what the step needed, lets it pass. It changes when things are sent and
    nothing else.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._last = self._may_pass = 0

    def number(self) -> int:
        """The next job's."""
        with self._changed:
            self._last += 1
            return self._last

    def give(self, number: int | None = None) -> None:
        """Lets jobs up to this number pass; None: all that have one."""
        with self._changed:
            self._may_pass = max(self._may_pass, self._last if number is None else number)
            self._changed.notify_all()

    def wait(self, number: int) -> None:
        """Waits until this job may pass."""
        with self._changed:
            self._changed.wait_for(lambda: self._may_pass >= number)


class LaneWorker:
    """Runs jobs one after the other, in the order of `submit`, in a thread of its own.

    Ranks submit the same jobs in the same order, so their transfers meet. The thread starts with
    the first job and ends with this object.

    Attributes:
        right_of_way: of its jobs.
    """

    def __init__(self) -> None:
        self.right_of_way = RightOfWay()
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], Any]) -> Future[Any]:
        """Runs ``job`` after all earlier ones; the future carries its value or its exception."""
        if self._thread is None:
            self._thread = threading.Thread(target=_serve, args=(self._jobs,
                                            torch.get_num_threads()), daemon=True,
                                            name="shardlab-look-ahead")
            self._thread.start()
            weakref.finalize(self, self._jobs.put, None)
        future: Future[Any] = Future()
        self._jobs.put((job, future))
        return future


def _serve(jobs: queue.SimpleQueue[Any], threads: int) -> None:
    torch.set_num_threads(threads)  # OpenMP counts threads per calling thread
    while (item := jobs.get()) is not None:
        job, future = item
        try:
            future.set_result(job())
        except BaseException as error:  # carried to whoever waits for the future
            future.set_exception(error)
        del item, job, future  # what the job holds must not live until the next one
