"""The bytes that snapshots keep of what training changes, until a writer has taken them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import perf_counter


def _nothing() -> int:
    return 0


class KeptRoom:
    """How much is kept; whoever needs more waits for the writer.

    Args:
        limit: bytes.

    Attributes:
        limit: bytes.
        waited_s: seconds that training has waited.
        is_over: nothing is kept any more.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.waited_s, self.is_over = limit, 0.0, False
        self._held = 0
        self._moved = threading.Condition()

    def take(self, count: int) -> None:
        """So many bytes more are kept."""
        with self._moved:
            self._held += count

    def give(self, count: int = 0) -> None:
        """So many bytes less are kept, or the writer came further."""
        with self._moved:
            self._held -= count
            self._moved.notify_all()

    def wait(self, more: Callable[[], int] = _nothing) -> None:
        """Waits until what is kept, and ``more``, is no more than the limit; or until the end."""

        def fits() -> bool:
            return self.is_over or self._held + more() <= self.limit

        if fits():
            return
        started = perf_counter()
        with self._moved:
            self._moved.wait_for(fits)
        self.waited_s += perf_counter() - started

    def close(self) -> None:
        """Nothing is kept any more; whoever waits goes on."""
        with self._moved:
            self.is_over, self._held = True, 0
            self._moved.notify_all()
