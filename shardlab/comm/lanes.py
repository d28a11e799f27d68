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

    def all_to_all(self, out: Tensor, source: Tensor, out_splits: Sequence[int],
                   source_splits: Sequence[int]) -> Finish:
        """Starts a transfer."""
        work = dist.all_to_all_single(out, source, list(out_splits), list(source_splits),
                                      group=self._group, async_op=True)
        assert work is not None

        def finish() -> None:
            if self._timeout is None:
                work.wait()
            else:
                work.wait(self._timeout)

        return finish
