"""How far to look ahead where nobody said: tried on the first batches, alike on every rank.

Looking ahead hides waiting, and costs the thread that does it. Where links are slow it wins; where
they are fast and every core trains, it loses. Both ways give the same bits, so trying changes no
result.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from shardlab.comm import Groups, all_reduce_

#: First batches: memory is taken from the system, links come up.
_WARM = 10
#: Batches of a turn, and how many of them are not counted: they wait for the turn before.
_TURN, _LEFT_OUT = 10, 3
#: Depths by turn.
_TURNS = (1, 0, 1, 0)
#: Looking ahead is given up for more than noise alone: a link that is busy later is slower.
_WORTH = 0.98


@dataclass(frozen=True)
class DepthChoice:
    """What was found.

    Attributes:
        depth: 0 or 1.
        step_ms: milliseconds of a step with depth 0 and with depth 1: mean over ranks of medians.
    """

    depth: int
    step_ms: tuple[float, float]

    @property
    def text(self) -> str:
        """One line for people."""
        plain, ahead = self.step_ms
        return (f"exchange.depth {self.depth}: a step took {ahead:.1f} ms with the next batch "
                f"exchanged meanwhile, {plain:.1f} ms without")


class DepthTrial:
    """Trains some batches with depth 1 and some without, in turns, and keeps what was faster.

    Every rank calls `trained` after each of the same batches.

    Args:
        groups: the ranks.
        depth: is kept; None: is tried.
        chosen: is told what was found.
        clock: seconds.

    Attributes:
        depth: to take for the batches that come.

    Source: own.
    """

    def __init__(self, groups: Groups, depth: int | None = None,
                 chosen: Callable[[DepthChoice], None] | None = None,
                 clock: Callable[[], float] = time.perf_counter) -> None:
        self._groups, self._chosen, self._clock = groups, chosen, clock
        self._over = depth is not None
        self._count = 0
        self._last = 0.0
        self._seconds: tuple[list[float], list[float]] = ([], [])
        self.depth = 1 if depth is None else depth

    def trained(self) -> None:
        """A batch has been trained.

        Raises:
            ExchangeError: after the last batch of the trial: a rank ended, stalled or cannot be
                reached.
        """
        if self._over:
            return
        now = self._clock()
        turn, place = divmod(self._count - _WARM, _TURN)
        if turn >= 0 and place >= _LEFT_OUT:
            self._seconds[self.depth].append(now - self._last)
        self._last = now
        self._count += 1
        turn = (self._count - _WARM) // _TURN
        if turn < len(_TURNS):
            self.depth = _TURNS[max(turn, 0)]
        else:
            self._choose()

    def _choose(self) -> None:
        medians = torch.tensor([statistics.median(taken) for taken in self._seconds],
                               dtype=torch.float64, device=self._groups.device)
        plain, ahead = (1000 * all_reduce_(medians, self._groups)
                        / self._groups.world_size).tolist()
        self._over, self.depth = True, int(plain >= _WORTH * ahead)
        if self._chosen is not None:
            self._chosen(DepthChoice(self.depth, (plain, ahead)))
