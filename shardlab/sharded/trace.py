"""A timeline of steps in Chrome's trace format: one row a thread, one box a phase."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

#: Rows of a rank in the timeline.
THREADS = {0: "training", 1: "looking ahead"}
_US = 1e6


class Trace:
    """Records what the threads of this rank do, from now on.

    Args:
        steps: training steps to record.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._done = 0
        self._boxes: list[tuple[int, str, float, float, int]] = []
        # Hosts' monotonic clocks begin anywhere; wall clocks agree well enough to compare ranks.
        self._offset = time.time() - time.perf_counter()

    @property
    def full(self) -> bool:
        """Whether all wanted steps are recorded."""
        return self._done >= self.steps

    def add(self, thread: int, phase: str, start: float, end: float) -> None:
        """A phase of a thread, in seconds of `time.perf_counter`."""
        if not self.full:
            self._boxes.append((thread, phase, start, end, self._done))

    def end_step(self) -> None:
        """The thread that trains has done a step."""
        self._done += 1

    def boxes(self) -> list[list[Any]]:
        """[thread, phase, start in s since 1970, seconds, step] of every phase, as plain data."""
        return [[thread, phase, start + self._offset, end - start, step]
                for thread, phase, start, end, step in list(self._boxes)]


def chrome_trace(ranks: Sequence[Sequence[Sequence[Any]]]) -> dict[str, Any]:
    """What chrome://tracing and Perfetto read.

    Args:
        ranks: `Trace.boxes` of every rank.
    """
    begin = min((box[2] for boxes in ranks for box in boxes), default=0.0)
    events: list[dict[str, Any]] = []
    for rank, boxes in enumerate(ranks):
        events.append({"name": "process_name", "ph": "M", "pid": rank,
                       "args": {"name": f"rank {rank}"}})
        events += [{"name": "thread_name", "ph": "M", "pid": rank, "tid": thread,
                    "args": {"name": name}} for thread, name in THREADS.items()]
        events += [{"name": phase, "ph": "X", "pid": rank, "tid": thread, "args": {"step": step},
                    "ts": (start - begin) * _US, "dur": seconds * _US}
                   for thread, phase, start, seconds, step in boxes]
    return {"traceEvents": events, "displayTimeUnit": "ms"}
