"""Medians of repeated runs, on one rank alone or on all ranks alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from shardlab.comm import barrier, gather_objects_json

if TYPE_CHECKING:
    from shardlab.comm import Groups

_LEAST_RUNS = 5
_MOST_RUNS = 5000


class CoreTime:
    """How much of a core this thread got while it computed without a pause.

    Attributes:
        share: 1 on a quiet machine, less where other processes want the same cores.
    """

    def __init__(self) -> None:
        self._computed = self._passed = 0.0

    @contextmanager
    def watching(self, computes: bool) -> Iterator[None]:
        """Counts what is done inside, if it is nothing but computing."""
        thread, wall = time.thread_time(), time.perf_counter()
        yield
        if computes:
            self._computed += time.thread_time() - thread
            self._passed += time.perf_counter() - wall

    @property
    def share(self) -> float:
        return self._computed / self._passed if self._passed else 1.0


def finish(device: torch.device) -> None:
    """Waits for what was queued on a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run, with what it queued on the device."""
    start = time.perf_counter()
    run()
    finish(device)
    return time.perf_counter() - start


def median_seconds(run: Callable[[], object], seconds: float, device: torch.device) -> float:
    """Median of runs that repeat for ``seconds``, five at least, after one to warm up."""
    timed(run, device)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < _LEAST_RUNS or (time.perf_counter() < end and len(times) < _MOST_RUNS):
        times.append(timed(run, device))
    return sorted(times)[len(times) // 2]


def median_together(run: Callable[[], object], seconds: float, groups: Groups) -> float:
    """The same for a run that is a collective: every rank repeats it equally often."""
    barrier(groups)
    warm = max(timed(run, groups.device) for _ in range(_LEAST_RUNS))
    slowest = max(gather_objects_json(warm, groups))
    runs = int(min(max(seconds / max(slowest, 1e-7), _LEAST_RUNS), _MOST_RUNS))
    times = sorted(timed(run, groups.device) for _ in range(runs))
    return float(max(gather_objects_json(times[runs // 2], groups)))
