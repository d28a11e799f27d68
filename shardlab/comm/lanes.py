"""Lanes: ordered all-to-alls. Ranks start the transfers of one lane in the same order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

Finish = Callable[[], None]


class Lane(Protocol):
    """A way for tensors between all ranks; its transfers are independent of other lanes'."""

    def all_to_all(self, out: Tensor, source: Tensor, out_splits: Sequence[int],
                   source_splits: Sequence[int]) -> Finish:
        """Starts a transfer, as `collectives.all_to_all`; the returned call waits for it.

        Raises:
            RuntimeError: (the returned call) a peer ended, or did not answer in time.
        """


class TorchLane:
    """A lane over a process group: gloo between hosts, NCCL between GPUs.

    Args:
        group: of all ranks, used by nobody else.
        timeout_s: seconds after which a transfer has failed.
    """

    def __init__(self, group: dist.ProcessGroup, timeout_s: float) -> None:
        self._group = group
        on_cpu = dist.get_backend(group) == "gloo"
        # NCCL's wait only orders streams; its own watchdog ends a transfer that hangs.
        self._timeout = timedelta(seconds=timeout_s) if on_cpu else None
        self._rank = dist.get_rank(group)

    def all_to_all(self, out: Tensor, source: Tensor, out_splits: Sequence[int],
                   source_splits: Sequence[int]) -> Finish:
        """Starts a transfer."""
        if self._timeout is not None:
            return self._receive_and_send(out, source, (out_splits, source_splits), self._timeout)
        work = dist.all_to_all_single(out, source, list(out_splits), list(source_splits),
                                      group=self._group, async_op=True)
        assert work is not None
        return work.wait

    def _receive_and_send(self, out: Tensor, source: Tensor,
                          splits: tuple[Sequence[int], Sequence[int]],
                          timeout: timedelta) -> Finish:
        """gloo's all-to-all, but every piece is asked for before any is sent.

        gloo sends a piece once its receiver has asked for it, and sends what it has to say to a
        rank in order. Its own all-to-all asks behind what it sends: a rank that is a little late
        then sends nothing until all of its peer's piece is here, and a link carries one direction
        after the other.
        """
        theirs, mine = out.split(list(splits[0])), source.contiguous().split(list(splits[1]))
        theirs[self._rank].copy_(mine[self._rank])
        # The nearest rank behind sends first, as this one sends first to the nearest in front.
        others = [(self._rank + step) % len(mine) for step in range(1, len(mine))]
        works = [dist.irecv(theirs[peer], group=self._group, group_src=peer)
                 for peer in reversed(others) if theirs[peer].numel()]
        works += [dist.isend(mine[peer], group=self._group, group_dst=peer)
                  for peer in others if mine[peer].numel()]

        def finish() -> None:
            for work in works:
                assert work is not None
                work.wait(timeout)

        return finish
