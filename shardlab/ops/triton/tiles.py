"""One launch for many jobs: a table of jobs on the device, cut into tiles of R rows x C columns.

A kernel's program number is a tile; `find_last` tells it its job. Nothing here reads the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Most rows of a tile: beyond it, narrow tables would give too few programs to fill a device.
MAX_ROWS = 64
#: fp32 that a thread's widest load takes.
_VECTOR = 4


@dataclass(frozen=True)
class Jobs:
    """Jobs as a kernel reads them.

    Attributes:
        table: int64 [J, 1 + F] on the device: a job's first tile, then its fields.
        tiles: tiles of all jobs.
        R, C: rows and columns of a tile; C is a power of two and no job is wider.
    """

    table: Tensor
    tiles: int
    R: int
    C: int

    @property
    def search(self) -> tuple[int, int]:
        """(jobs, steps of a binary search among them), as kernels take them."""
        return self.table.shape[0], self.table.shape[0].bit_length()


def build_jobs(fields: Tensor, rows: Tensor, columns: Tensor, elements: int,
               device: torch.device) -> Jobs:
    """Cuts jobs into tiles and moves their table to the device without waiting for it.

    Args:
        fields: int64 [J, F] on CPU, J > 0.
        rows: int64 [J] on CPU: rows of every job.
        columns: int64 [J] on CPU: columns of every job.
        elements: about how many elements a tile shall have.
        device: where the kernel runs.
    """
    C = triton.next_power_of_2(max(1, int(columns.max())))
    R = max(1, min(MAX_ROWS, elements // C))
    tiles = (rows + (R - 1)) // R
    ends = tiles.cumsum(0)
    table = torch.cat([(ends - tiles)[:, None], fields], 1)
    return Jobs(to_device(table, device), int(ends[-1]), R, C)


def alignment(numbers: Tensor) -> int:
    """4 where it divides all widths, offsets and steps (in fp32 elements) of a kernel, so that a
    thread may take 16 bytes at once; else 1."""
    return _VECTOR if bool((numbers % _VECTOR == 0).all()) else 1


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """Copies a small CPU tensor through pinned memory, so that the host does not wait."""
    if device.type == "cpu":
        return table
    return table.pin_memory().to(device, non_blocking=True)


@triton.jit
def find_last(sorted_at, stride, count, value, steps):
    """Largest i in [0, count) with sorted[i] <= value, where sorted[0] <= value; int64.

    ``steps`` is at least the bit length of ``count``; ``value`` may be a block, and then pointer
    and count may be, too.
    """
    low = value * 0
    high = low + count
    for _ in range(steps):
        middle = (low + high) // 2
        below = tl.load(sorted_at + middle * stride) <= value
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def find_tile(table, fields: tl.constexpr, num_jobs, job_steps, R: tl.constexpr):
    """(number of this program's job, [R] int64 rows of the job that the tile covers)."""
    tile = tl.program_id(0).to(tl.int64)
    number = find_last(table, fields, num_jobs, tile, job_steps)
    return number, (tile - tl.load(table + number * fields)) * R + tl.arange(0, R)
