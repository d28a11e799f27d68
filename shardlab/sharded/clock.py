"""Where the time of a step goes, by the phases that the planner predicts."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice, pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from shardlab.phases import EXCHANGE_PHASES, MEASURED_PHASES
from shardlab.sharded.trace import Trace

Floats = NDArray[np.float64]

_INDEX = {phase: index for index, phase in enumerate(MEASURED_PHASES)}
_KEPT_STEPS = 1024  # for medians: enough to leave out warm-up and neighbours, 400 kB
_MS = 1e3


class PhaseClock:
    """Books all time of this rank on phases: `lap` gives what passed since the last call to one.

    On the CPU laps are read from the wall clock, 0.1 us each, always. A GPU works behind its
    launches, so the wall clock tells nothing of it: there laps are counted only after
    `time_device`, by events on the stream.

    Waiting for other ranks counts as the phase that waits, so that of a phase that exchanges, the
    rank that waits least shows what the exchange itself takes.

    Args:
        device: where the step runs.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._on_host = device is None or device.type == "cpu"
        self._events: list[tuple[int, torch.cuda.Event]] | None = None
        self._open = [0.0] * len(MEASURED_PHASES)
        self._steps: deque[tuple[float, ...]] = deque(maxlen=_KEPT_STEPS)
        self._pending: list[list[tuple[int, torch.cuda.Event]]] = []
        self._interval = 0
        self._trail: list[str] = []
        self._last_trail: list[str] = []
        self._mark = time.perf_counter()
        #: Seconds since the start: of the thread that looks ahead by phase, and waiting for it.
        self.ahead_s = dict.fromkeys(MEASURED_PHASES, 0.0)
        self.waited_s = 0.0
        #: Seconds that the thread that trains spent on exchange, without that waiting.
        self.exposed_s = 0.0
        #: Records phases, until it is full; None: nobody asked.
        self.trace: Trace | None = None

    def other_thread(self) -> AheadClock:
        """Books what the thread that looks ahead does from now on."""
        return AheadClock(self.ahead_s, self.trace)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What is done inside is waiting for the thread that looks ahead."""
        self.lap("overhead")
        start = time.perf_counter()
        yield
        waited = time.perf_counter() - start
        self.waited_s += waited
        self.exposed_s -= waited  # the lap books it there, too
        self.lap("rows")

    def hidden_share(self) -> float | None:
        """Share of the time that ranks exchanged in which this rank's training went on.

        Exchange is what the thread that looks ahead spends on it, and what the thread
        that trains waits for others; None: nothing was exchanged ahead.
        """
        ahead = sum(self.ahead_s[phase] for phase in EXCHANGE_PHASES)
        if not ahead:
            return None
        exposed = self.exposed_s
        return max(0.0, ahead - self.waited_s) / (max(ahead, self.waited_s) + exposed)

    @property
    def running(self) -> bool:
        """Whether laps are counted."""
        return self._on_host or self._events is not None

    def time_device(self) -> None:
        """Also counts laps on a GPU; costs two microseconds a lap."""
        if not self._on_host:
            self._events = []
            self.restart()

    def lap(self, phase: str) -> None:
        """What passed since the last call was this phase, a name of `MEASURED_PHASES`."""
        self._trail.append(phase)
        now = time.perf_counter()
        if self.trace is not None:
            self.trace.add(0, phase, self._mark, now)
        if phase in EXCHANGE_PHASES:
            self.exposed_s += now - self._mark
        if self._on_host:
            self._open[_INDEX[phase]] += now - self._mark
        elif self._events is not None:
            self._events.append((_INDEX[phase], _recorded()))
        self._mark = now

    def restart(self) -> None:
        """The next step starts now; what was booked since the last step's end is forgotten."""
        self._open, self._trail = [0.0] * len(MEASURED_PHASES), []
        self._mark = time.perf_counter()
        if self._events is not None:
            self._events = [(-1, _recorded())]

    def end_step(self) -> None:
        """The step is done; the next one starts now."""
        self.lap("overhead")
        self._last_trail, self._trail = self._trail, []
        if self.trace is not None:
            self.trace.end_step()
        if self._on_host:
            self._steps.append(tuple(self._open))
            self._open = [0.0] * len(MEASURED_PHASES)
            self._interval += 1
        elif self._events is not None:
            self._pending.append(self._events)
            self._events = self._events[-1:]
            self._interval += 1

    def position(self) -> tuple[int, str]:
        """Laps of the step so far, and the phase that runs now, as the last step's laps tell.

        Another thread may ask; the first step's phases are not known, and are "?" then.
        """
        done, before = len(self._trail), self._last_trail
        return done, before[done] if done < len(before) else "?"

    def take_interval(self) -> dict[str, float]:
        """Mean milliseconds of a step by phase since the last call; empty: nothing was counted."""
        self._read_events()
        steps = [*islice(reversed(self._steps), min(self._interval, len(self._steps)))]
        self._interval = 0
        return _by_phase(np.array(steps).mean(axis=0)) if steps else {}

    def median_ms(self) -> dict[str, float]:
        """Median milliseconds of a step by phase, of the last 1024 steps; empty: none counted."""
        self._read_events()
        return _by_phase(np.median(np.array(self._steps), axis=0)) if self._steps else {}

    def _read_events(self) -> None:
        """Turns the events of finished steps into seconds; waits for the device."""
        if self._pending:
            torch.cuda.synchronize()
        for events in self._pending:
            seconds = [0.0] * len(MEASURED_PHASES)
            for (_, before), (phase, after) in pairwise(events):
                seconds[phase] += before.elapsed_time(after) / _MS
            self._steps.append(tuple(seconds))
        self._pending.clear()


class AheadClock:
    """Books what a thread that looks ahead does; it waits for no device.

    Args:
        seconds: by phase, added to.
        trace: records the phases; None: nobody asked.
    """

    def __init__(self, seconds: dict[str, float], trace: Trace | None) -> None:
        self._seconds, self._trace = seconds, trace
        self._mark = time.perf_counter()

    def lap(self, phase: str) -> None:
        """What passed since the last call was this phase."""
        now = time.perf_counter()
        self._seconds[phase] += now - self._mark
        if self._trace is not None:
            self._trace.add(1, phase, self._mark, now)
        self._mark = now


def _recorded() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _by_phase(seconds: Floats) -> dict[str, float]:
    return dict(zip(MEASURED_PHASES, (_MS * seconds).tolist(), strict=True))
