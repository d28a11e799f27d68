"""Pooling of what came back, decoded on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from shardlab.ops.rows import pool_blocks, pool_rows


def pool_coded(source: Tensor, jobs: Tensor, codecs: Tensor, index: Tensor,
               offsets: Tensor | None, weights: Tensor | None, out: Tensor) -> None:
    """Pooling jobs over fp32 elements, or over bytes of these codecs.

    Args:
        source: fp32, or uint8 where rows are encoded.
        jobs: int64 [J, 11], as of `pool_rows`; in bytes where ``source`` is.
        codecs: int64 [J]: number of every job's codec.
        index, offsets, weights, out: as of `pool_rows`.
    """
    if source.dtype == torch.float32:
        pool_rows(source, jobs, index, offsets, weights, out)
    else:
        pool_blocks(source, torch.cat([jobs, codecs[:, None]], 1), index, offsets, weights, out)


def copy_jobs(start: Tensor, step: Tensor, columns: Tensor, size: int) -> Tensor:
    """Pooling jobs that copy [size, columns] matrices: every bag is one row."""
    jobs = torch.zeros(start.numel(), 11, dtype=torch.int64)
    jobs[:, 0], jobs[:, 1], jobs[:, 2], jobs[:, 3], jobs[:, 6] = start, step, columns, size, 1
    return jobs
