"""Signals as a wish to stop: the step in progress ends, a checkpoint follows."""

from __future__ import annotations

import signal
import threading
from types import FrameType

#: Signals that ask a run to stop, the more urgent first.
#: SIGUSR1 is what Slurm is asked to send before the time limit: stop, and start again.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignal:
    """While entered, notes stop signals instead of dying from them.

    Repeated signals change nothing: on Ctrl-C the terminal and torchrun's agent each send one.
    Handlers belong to the main thread; entered in another one, this notes nothing.
    """

    def __init__(self) -> None:
        self.received: set[int] = set()
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received.add(number)
