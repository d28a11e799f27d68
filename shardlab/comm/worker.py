"""The thread that talks for batches that come, while the main thread trains."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch


class LaneWorker:
    """Runs jobs one after the other, in the order of `submit`, in a thread of its own.

    Ranks submit the same jobs in the same order, so their transfers meet. The thread starts with
    the first job and ends with this object.
    """

    def __init__(self) -> None:
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
