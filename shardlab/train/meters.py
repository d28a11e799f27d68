"""What a training costs: time per step, bytes on the wire, memory."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections import deque
from dataclasses import astuple, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shardlab.storage_bytes import TierBytes

if TYPE_CHECKING:
    from shardlab.sharded import ShardedModel

_KEPT_STEPS = 100_000  # steps whose times are kept for medians; older ones fade out
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # getrusage: bytes there, KiB elsewhere
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Pace:
    """How fast steps were; rows are those of all ranks.

    ``wait_share`` is the share of the time that a step waited for its batch.
    """

    steps: int
    rows: int
    seconds: float
    samples_per_s_mean: float
    samples_per_s_median: float
    step_ms_p50: float
    step_ms_p90: float
    wait_share: float


class StepTimer:
    """Times training steps by the wall clock, from the end of one to the end of the next.

    Whatever lies between two steps and is no training (logging, validation, checkpoints) is left
    out by calling `restart` after it. On CUDA a step's time is that of its launch; the exchange of
    counts makes every step wait for the device, so a launch is never far ahead.
    """

    def __init__(self) -> None:
        self._steps: deque[tuple[float, int]] = deque(maxlen=_KEPT_STEPS)
        self._total = _Totals()
        self._interval = _Totals()
        self.restart()

    def restart(self) -> None:
        """The next step starts now."""
        self._mark = self._batch_mark = time.perf_counter()

    def got_batch(self) -> None:
        """The step's batch has arrived."""
        self._batch_mark = time.perf_counter()

    def end_step(self, rows: int) -> None:
        """The step is done; the next one starts now. ``rows``: the global batch."""
        now = time.perf_counter()
        self._steps.append((now - self._mark, rows))
        for totals in (self._total, self._interval):
            totals.add(now - self._mark, self._batch_mark - self._mark, rows)
        self._mark = self._batch_mark = now

    def take_interval(self) -> Pace:
        """The pace since the last call."""
        pace = self._interval.pace([*islice(reversed(self._steps), self._interval.steps)])
        self._interval = _Totals()
        return pace

    def total(self) -> Pace:
        """The pace since the start; medians over the last 100,000 steps."""
        return self._total.pace([*self._steps])


@dataclass
class _Totals:
    steps: int = 0
    rows: int = 0
    seconds: float = 0.0
    waiting: float = 0.0

    def add(self, seconds: float, waiting: float, rows: int) -> None:
        self.steps += 1
        self.rows += rows
        self.seconds += seconds
        self.waiting += waiting

    def pace(self, steps: list[tuple[float, int]]) -> Pace:
        if not self.steps:
            return Pace(0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        seconds, rows = np.array(steps).T
        p50, p90 = np.percentile(seconds, (50, 90)) * 1e3
        return Pace(self.steps, self.rows, self.seconds, self.rows / self.seconds,
                    float(np.median(rows / seconds)), float(p50), float(p90),
                    self.waiting / self.seconds)


@dataclass(frozen=True)
class SentBytes:
    """Bytes sent to other ranks, by kind.

    Attributes:
        inside: of ids, rows and gradients together, what went to ranks of the same host.
        sync: between replicas of the tables.
    """

    ids: float = 0
    rows: float = 0
    gradients: float = 0
    dense_all_reduce: float = 0
    inside: float = 0
    sync: float = 0

    def __add__(self, other: SentBytes) -> SentBytes:
        return SentBytes(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __truediv__(self, parts: float) -> SentBytes:
        return SentBytes(*(value / parts for value in astuple(self)))

    @property
    def total(self) -> float:
        return self.ids + self.rows + self.gradients + self.dense_all_reduce \
            + self.sync


class WireMeter:
    """Counts the bytes this rank sent in training steps.

    Args:
        model: the sharded model, whose collections count ids, rows and gradients, and whose
            reducer counts dense gradients that travel in a codec.
        world_size: ranks; a dense all-reduce in fp32 is counted by the ring's volume, in which a
            rank sends 2 (W - 1) / W of the gradients' bytes (gloo and NCCL send no less).
    """

    def __init__(self, model: ShardedModel, world_size: int) -> None:
        self._model, reducer = model, model.reducer
        self._reducer = None if reducer is None or reducer.codec == "fp32" else reducer
        dense = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
        self._dense_bytes = dense * 2 * (world_size - 1) / world_size
        self.restart()

    def restart(self) -> None:
        """Leaves out what was sent since the last `take`, such as a validation's rows."""
        self._mark = self._sent()

    def _sent(self) -> tuple[int, ...]:
        wires = [collection.wire for collection in self._model.collections().values()]
        return (sum(wire.ids_bytes for wire in wires), sum(wire.rows_bytes for wire in wires),
                sum(wire.gradients_bytes for wire in wires),
                sum(wire.inside_bytes for wire in wires), sum(wire.sync_bytes for wire in wires),
                0 if self._reducer is None else self._reducer.coded_bytes)

    def take(self, steps: int) -> SentBytes:
        """Bytes sent by this rank since the last call, over that many steps."""
        before, self._mark = self._mark, self._sent()
        ids, rows, gradients, inside, sync, coded = (
            new - old for new, old in zip(self._mark, before, strict=True))
        dense = self._dense_bytes * steps if self._reducer is None else coded
        return SentBytes(ids, rows, gradients, dense, inside, sync)


def peak_rss_bytes() -> int:
    """Most resident memory this process ever had.

    Linux's own count is preferred: getrusage's includes the process that started this one.
    """
    if _STATUS.exists():
        peak = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
        if peak:
            return int(peak[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT


def model_tier_bytes(model: ShardedModel) -> TierBytes:
    """Bytes this rank's tables hold on each tier."""
    return sum((collection.tier_bytes() for collection in model.collections().values()),
               TierBytes())
