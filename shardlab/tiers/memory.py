"""Arenas in device or host memory."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20


def allocate(num_bytes: int, device: torch.device,
             used: Sequence[tuple[int, int]] | None = None) -> Tensor:
    """An arena of zero bytes.

    On the CPU its pages are the system's zero pages until they are written, and huge where the
    system gives huge pages on request: random rows then miss the TLB less (up to 20 % of a step).

    Args:
        num_bytes: size; zero is fine.
        device: where the arena lies.
        used: byte ranges [start, end) that will be written throughout; the rest stays in small
            pages, so that touching a row of it does not take 2 MiB. None: everything.

    Returns:
        uint8 [num_bytes].
    """
    if device.type != "cpu" or num_bytes == 0:
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    # Private: Python's default is shared memory, which seldom gets huge pages. Without reserve:
    # room that a cache may need for staging rows costs nothing until it does.
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
                      | getattr(mmap, "MAP_NORESERVE", 0))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        for start, end in [(0, num_bytes)] if used is None else used:
            first = -(-start // _HUGE_PAGE) * _HUGE_PAGE if start else 0
            last = end if end == num_bytes else end // _HUGE_PAGE * _HUGE_PAGE
            if last > first:
                pages.madvise(mmap.MADV_HUGEPAGE, first, last - first)
    return torch.frombuffer(pages, dtype=torch.uint8)
