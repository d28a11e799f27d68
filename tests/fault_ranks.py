"""Ranks for the fault tests: processes of their own, which a test may kill or stop."""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.harness import rank_context, start_processes

_READY = "ready"


@dataclass(frozen=True)
class Ended:
    """How a rank ended: exit code, what it raised, seconds since the fault."""

    code: int
    error: str
    seconds: float


class FaultyWorld:
    """Starts ``world`` ranks that run ``fn(groups, *args)`` until it raises.

    The process that forks them has imported torch once, so a world starts in tenths of a second.

    Args:
        world: ranks.
        folder: for the ranks' store.
        transport: of `shardlab.comm.joining.TRANSPORTS`.
        timeout_s: of collectives.
        fn: a module-level function.
    """

    def __init__(self, world: int, folder: Path, transport: str, timeout_s: float,
                 fn: Callable[..., Any], *args: Any) -> None:
        context = rank_context()
        self._messages = context.Queue()
        self.ranks = [context.Process(target=_run, daemon=True, args=(
            _Place(rank, world, str(folder / f"store-{transport}"), transport, timeout_s),
            self._messages, fn, args)) for rank in range(world)]
        start_processes(self.ranks)
        for _ in self.ranks:
            _, text = self._messages.get(timeout=120)
            assert text == _READY, text

    def hurt(self, rank: int, signum: int) -> dict[int, Ended]:
        """Sends a signal to one rank and waits until all others have ended."""
        time.sleep(0.2)  # all are in the midst of their collectives
        start = time.monotonic()
        os.kill(self.ranks[rank].pid or 0, signum)
        ended = {}
        for other, process in enumerate(self.ranks):
            if other != rank:
                process.join(60)
                assert process.exitcode is not None, f"rank {other} hangs"
                ended[other] = (process.exitcode, time.monotonic() - start)
        self.ranks[rank].kill()
        self.ranks[rank].join(60)
        errors = self._errors(len(ended))
        return {other: Ended(code, errors.get(other, ""), seconds)
                for other, (code, seconds) in ended.items()}

    def _errors(self, count: int) -> dict[int, str]:
        found: dict[int, str] = {}
        try:
            while len(found) < count:
                rank, text = self._messages.get(timeout=5)
                found[rank] = text
        except queue.Empty:
            pass
        return found


@dataclass(frozen=True)
class _Place:
    """What a rank needs to join."""

    rank: int
    world: int
    store: str
    transport: str
    timeout_s: float


def _run(place: _Place, messages: Any, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from shardlab import comm
    from shardlab.errors import ExchangeError

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(place.store, place.world),
                            rank=place.rank, world_size=place.world,
                            timeout=timedelta(seconds=place.timeout_s))
    groups = comm.build_groups(timeout_s=place.timeout_s, transport=place.transport)
    messages.put((place.rank, _READY))
    try:
        fn(groups, *args)
    except ExchangeError as error:
        messages.put((place.rank, str(error)))
        messages.close()
        messages.join_thread()
        os._exit(3)
