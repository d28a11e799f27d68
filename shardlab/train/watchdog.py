"""A thread that ends a run which makes no progress, and says which rank and phase it waits for."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

import torch.distributed as dist

from shardlab.comm.groups import Groups
from shardlab.errors import StallError

if TYPE_CHECKING:
    from shardlab.sharded.clock import PhaseClock

#: Ranks tell each other where they are this many times within the timeout.
_LOOKS = 8
_STORE_TIMEOUT = timedelta(seconds=5)
_PHASE_TEXT = {"wait": "wait for the next batch"}


@dataclass(frozen=True)
class Where:
    """What one rank does.

    Attributes:
        beats: activities begun.
        activity: the one that runs, in words.
        laps: phases of the step that are done.
        phase: the one that runs.
        table: the table that is worked on, where one alone is.
        line: the innermost line of ShardLab or of what it called.
    """

    beats: int
    activity: str
    laps: int
    phase: str
    table: str | None
    line: str

    @property
    def text(self) -> str:
        """In words."""
        table = "" if self.table is None else f", table {self.table!r}"
        phase = _PHASE_TEXT.get(self.phase, self.phase)
        return f"{self.activity}, phase {phase}{table} ({self.line})"


def print_and_exit(error: StallError) -> None:
    """Ends this process at once: what hangs cannot be unwound."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(error.exit_code)


class Watchdog:
    """While entered, ends the process when `beat` was not called for too long.

    Ranks tell each other where they are through the store that they met at. The rank that is
    furthest behind is the one that the others wait for.

    Args:
        clock: knows the phase of a step.
        groups: the ranks.
        timeout_s: seconds without a beat; None: nobody watches.
        on_stall: is called in the watchdog's thread, and ends the process.
    """

    def __init__(self, clock: PhaseClock, groups: Groups, timeout_s: float | None,
                 on_stall: Callable[[StallError], None] = print_and_exit) -> None:
        self._clock, self._groups, self._timeout = clock, groups, timeout_s
        self._on_stall = on_stall
        self._beats, self._activity, self._at = 0, "start", time.monotonic()
        self._main = threading.get_ident()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self, activity: str) -> None:
        """Something begins; what was before has ended."""
        self._beats += 1
        self._activity, self._at = activity, time.monotonic()

    def __enter__(self) -> Watchdog:
        if self._timeout is not None:
            self._main = threading.get_ident()
            self.beat("start")
            self._thread = threading.Thread(target=self._watch, args=(self._timeout,), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def where(self) -> Where:
        """What this rank does now."""
        laps, phase = self._clock.position()
        frame = sys._current_frames().get(self._main)
        return Where(self._beats, self._activity, laps, phase, *_place(frame))

    def _watch(self, timeout_s: float) -> None:
        store: dist.Store | None = None
        while not self._stop.wait(timeout_s / _LOOKS):
            late = time.monotonic() - self._at
            if late < timeout_s / 4:  # ranks in step have nothing to tell each other
                continue
            here = self.where()
            try:
                store = store or _open_store(self._groups)
                if store is not None:
                    store.set(f"where/{self._groups.rank}", json.dumps(asdict(here)))
            except (RuntimeError, ValueError):  # rank 0 is gone, and with it the store
                store = None
            # Who waits gives the others a moment to say where they are.
            if late >= timeout_s + timeout_s / _LOOKS:
                self._on_stall(StallError(self._message(here, late, store)))
                return

    def _message(self, here: Where, late: float, store: dist.Store | None) -> str:
        rank = self._groups.rank
        begin = f"no progress for {late:.0f} s (train.stall_timeout_s): rank {rank} is at " + \
            here.text
        if self._groups.world_size == 1:
            return begin
        found, silent = self._others(store)
        if silent:
            ranks = ", ".join(map(str, silent))
            return f"{begin}; nothing is heard of rank {ranks}: it has ended, or is stopped"
        found[rank] = here
        last = min(found, key=lambda other: (found[other].beats, found[other].laps, other))
        if (found[last].beats, found[last].laps) == max((w.beats, w.laps) for w in found.values()):
            return f"{begin}; all ranks are there: look at the network between them"
        who = "the others wait for it" if last == rank else \
            f"it waits for rank {last}, which is at {found[last].text}"
        return f"{begin}; {who}"

    def _others(self, store: dist.Store | None) -> tuple[dict[int, Where], list[int]]:
        found: dict[int, Where] = {}
        silent = []
        for rank in set(range(self._groups.world_size)) - {self._groups.rank}:
            try:
                if store is None or not store.check([f"where/{rank}"]):
                    silent.append(rank)
                    continue
                found[rank] = Where(**json.loads(store.get(f"where/{rank}")))
            except RuntimeError:
                silent.append(rank)
        return found, silent


def _open_store(groups: Groups) -> dist.Store | None:
    """A connection of our own to the store at which ranks met; None: they met elsewhere."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if groups.world_size == 1 or host is None or port is None:
        return None
    # torchrun may start the same ranks again beside the same store.
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"shardlab/watchdog/{start}", dist.TCPStore(
        host, int(port), is_master=False, timeout=_STORE_TIMEOUT, wait_for_workers=False))


def _place(frame: FrameType | None) -> tuple[str | None, str]:
    """The table that a stack works on, by its innermost object that has one; and its top line."""
    line = "?" if frame is None else \
        f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
    while frame is not None:
        owner = frame.f_locals.get("self")
        table = getattr(owner, "__dict__", {}).get("table")
        if isinstance(table, str):
            return table, line
        frame = frame.f_back
    return None, line
