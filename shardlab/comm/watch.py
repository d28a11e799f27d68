"""Who is to blame when a collective fails: every rank tells what it is doing, to whoever asks.

A small TCP server per rank answers with the phase that the rank is in. A rank whose collective
failed asks all others: one that refuses has ended, one whose kernel takes the call but that does
not answer is stopped, one that cannot be called is behind a cut link.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_PROBE_S = 2.0
_MAX_ANSWER = 4096
_MAX_CALLS = 64  # asked at the same time


class Watch:
    """Answers what this rank is doing, and asks others.

    Args:
        address: of this host, as peers reach it.
    """

    def __init__(self, address: str) -> None:
        self._listener = socket.create_server((address, 0))
        self.address = (address, self._listener.getsockname()[1])
        self._state: dict[str, str] = {"doing": "computes"}
        self._peers: Sequence[tuple[str, int]] = ()
        threading.Thread(target=_answer, args=(self._listener, self._state), daemon=True,
                         name="shardlab-watch").start()
        self._finalizer = weakref.finalize(self, _close, self._listener)

    def meet(self, addresses: Sequence[Sequence[Any]]) -> None:
        """Takes all ranks' addresses, by rank."""
        self._peers = [(host, port) for host, port in addresses]

    def doing(self, what: str) -> None:
        """Says what this rank is doing from now on."""
        self._state["doing"] = what

    def ask(self, ranks: Iterable[int]) -> dict[int, str]:
        """What every one of these ranks is doing, or why it does not say."""
        ranks = list(ranks)
        with ThreadPoolExecutor(max(1, min(_MAX_CALLS, len(ranks)))) as pool:
            return dict(zip(ranks, pool.map(lambda rank: _ask(self._peers[rank]), ranks),
                            strict=True))

    def close(self) -> None:
        """Stops answering."""
        self._finalizer()


#: Answers of `Watch.ask` that mean a culprit.
ENDED, SILENT, UNREACHABLE = ("has ended", "does not answer (stopped, or its host hangs)",
                              "cannot be reached (link or host down)")


def _ask(address: tuple[str, int]) -> str:
    try:
        with socket.create_connection(address, timeout=_PROBE_S) as call:
            answer = call.recv(_MAX_ANSWER)
    except ConnectionError:
        return ENDED
    except TimeoutError:
        # The kernel of a stopped process completes the call; only an answer is missing then.
        return SILENT if _kernel_answers(address) else UNREACHABLE
    except OSError:
        return UNREACHABLE
    return str(json.loads(answer)["doing"]) if answer else ENDED


def _kernel_answers(address: tuple[str, int]) -> bool:
    try:
        with socket.create_connection(address, timeout=_PROBE_S):
            return True
    except OSError:
        return False


def _answer(listener: socket.socket, state: dict[str, str]) -> None:
    while True:
        try:
            call, _ = listener.accept()
        except OSError:  # closed
            return
        with call:
            try:
                call.settimeout(_PROBE_S)
                call.sendall(json.dumps(state).encode())
            except OSError:
                continue


def _close(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)  # wakes the thread; closing alone would not
    listener.close()


def own_address(same_host: bool) -> str:
    """Address under which peers reach this host: that of the route to rank 0's host."""
    if same_host:
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ.get("MASTER_ADDR", socket.gethostname()), 9))
        address: str = probe.getsockname()[0]
    return address
