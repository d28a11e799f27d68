"""The steps since the last log line: collected step by step, summed over ranks at a flush."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shardlab.comm.collectives import all_reduce_
from shardlab.comm.groups import Groups
from shardlab.errors import NotFiniteError
from shardlab.phases import WAIT
from shardlab.train.cache_meter import CacheCounts, CacheMeter
from shardlab.train.collected import Collected
from shardlab.train.meters import Pace, SentBytes, StepTimer, WireMeter
from shardlab.train.metrics import BinaryMetrics, WindowMetrics
from shardlab.train.stop_signal import STOP_SIGNALS, StopSignal
from shardlab.train.wire_meter import TableWire, TableWireMeter

if TYPE_CHECKING:
    from shardlab.sharded import ShardedModel


#: Seconds that a stop signal may wait for its step, where log intervals are longer: Slurm gives
#: 30 between SIGTERM and SIGKILL, and a checkpoint has to be written in them.
STOP_WITHIN_S = 5.0


@dataclass(frozen=True)
class Interval:
    """What all ranks did between two log lines.

    Attributes:
        metrics: of the interval's predictions; AUC of the running window.
        pace: this rank's speed, over the rows of all ranks.
        wire: bytes all ranks sent.
        stop: the signal that some rank received; None: none did.
        phase_ms: milliseconds of a step by phase, mean over steps and ranks; empty: not timed.
        caches: counts of all ranks, of every table that has a cache.
        wires: bytes and errors of all ranks, of every table.
    """

    metrics: BinaryMetrics
    pace: Pace
    wire: SentBytes
    stop: int | None
    phase_ms: dict[str, float]
    caches: dict[str, CacheCounts]
    wires: dict[str, TableWire]


class IntervalLog:
    """Collects steps without waiting for the device; `flush` looks at them on every rank alike.

    Args:
        model: the sharded model, for the bytes on the wire.
        groups: the ranks of the job.
        signal: this rank's wish to stop.
    """

    def __init__(self, model: ShardedModel, groups: Groups, signal: StopSignal) -> None:
        self._groups, self._signal = groups, signal
        self._losses = Collected(1, groups.device)
        self._wire = WireMeter(model, groups.world_size)
        self._clock = model.clock
        self._caches = CacheMeter(model)
        self._opened, self._check_every, self._unchecked = time.perf_counter(), 1, 0
        self._tables = TableWireMeter(model)
        self.timer = StepTimer()
        self.window = WindowMetrics(groups.device, lambda tensor: all_reduce_(tensor, groups))

    def restart(self) -> None:
        """Leaves out what was done and sent since the last flush, such as a validation."""
        self.timer.restart()
        self._clock.restart()
        self._caches.restart()
        self._wire.restart()
        self._tables.restart()
        self._opened = time.perf_counter()

    def stop_wanted(self) -> bool:
        """Whether some rank was asked to stop, in an interval that is older than `STOP_WITHIN_S`.

        Every rank must call it after every step. Ranks ask each other every few steps only: as
        many as `STOP_WITHIN_S` takes by the pace of the last interval, and after every step before
        there is one.
        """
        self._unchecked += 1
        if self._unchecked < self._check_every:
            return False
        self._unchecked = 0
        wanted = self._signal.received and time.perf_counter() - self._opened > STOP_WITHIN_S
        wish = torch.tensor([float(bool(wanted))], device=self._groups.device)
        return bool(all_reduce_(wish, self._groups, op="max").item())

    def got_batch(self) -> None:
        """The next step's batch has arrived."""
        self.timer.got_batch()
        self._clock.lap(WAIT)

    def add(self, logits: Tensor, labels: Tensor, loss: Tensor, global_rows: int) -> None:
        """Takes a finished step: this rank's logits [b], labels [b] and part of the loss []."""
        self._losses.add(loss)
        self.window.add(logits, labels)
        self._clock.end_step()
        self.timer.end_step(global_rows)

    def add_skipped(self, global_rows: int) -> None:
        """Takes a step that was left out on all ranks: time passed, nothing was learnt."""
        self._clock.end_step()
        self.timer.end_step(global_rows)

    def flush(self, step: int) -> Interval | None:
        """Sums the interval over all ranks; None when no step was added since the last flush.

        Args:
            step: number of the last step added.

        Raises:
            NotFiniteError: on every rank, when a loss of any rank is not finite.
        """
        if not self._losses.rows:
            return None
        finite = self._losses.all()[0].isfinite().tolist()
        self._losses.clear()
        wire = self._wire.take(len(finite))
        stops = [float(number in self._signal.received) for number in STOP_SIGNALS]
        phases, caches = self._clock.take_interval(), self._caches.take()
        tables = self._tables.take()
        took = time.perf_counter() - self._opened
        sums = torch.tensor([finite.count(False), took, *stops, *astuple(wire), *phases.values(),
                             *tables, *caches], dtype=torch.float64, device=self._groups.device)
        all_reduce_(sums, self._groups)
        worst = torch.tensor(self._tables.errors(), dtype=torch.float64,
                             device=self._groups.device)
        all_reduce_(worst, self._groups, op="max")
        bad, took, *counts = sums.tolist()
        self._check_every = max(1, int(STOP_WITHIN_S * self._groups.world_size * len(finite)
                                       / took))
        if bad:
            self._refuse(step, finite)
        stops, counts = counts[:len(STOP_SIGNALS)], counts[len(STOP_SIGNALS):]
        sent, counts = counts[:len(astuple(wire))], counts[len(astuple(wire)):]
        times, counts = counts[:len(phases)], counts[len(phases):]
        by_table, cached = counts[:len(tables)], counts[len(tables):]
        mean = {phase: ms / self._groups.world_size
                for phase, ms in zip(phases, times, strict=True)}
        stop = next((int(number) for number, count in zip(STOP_SIGNALS, stops, strict=True)
                     if count), None)
        return Interval(self.window.flush(), self.timer.take_interval(), SentBytes(*sent), stop,
                        mean, self._caches.named(cached),
                        self._tables.named(by_table, worst.tolist()))

    def _refuse(self, step: int, finite: Sequence[bool]) -> None:
        """Names the first step of any rank whose loss is not finite."""
        first = step + 1 - len(finite) + (finite.index(False) if False in finite else len(finite))
        earliest = torch.tensor([first], dtype=torch.int64, device=self._groups.device)
        all_reduce_(earliest, self._groups, op="min")
        raise NotFiniteError(f"the loss is not finite at step {int(earliest)}; lower the learning "
                            "rates, clip gradients, or check the data for extreme values, and "
                            "resume from the last checkpoint")
