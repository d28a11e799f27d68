"""Adds up a piece of a vector over all ranks, in the order of ranks. Source: own."""

from __future__ import annotations

import torch
from torch import Tensor

from shardlab.ops.registry import address, face_of, native


def sum_pieces_(own: Tensor, parts: Tensor, rank: int, scale: float = 1.0) -> Tensor:
    """own = ((rank 0 + rank 1) + rank 2 + ...) * scale, in place; sums are fp32 or wider.

    Args:
        own: floating point [n], contiguous: this rank's.
        parts: [ranks - 1, n], the other ranks' in their order, contiguous and of the same dtype.
        rank: this rank.
        scale: multiplies the sums.

    Returns:
        ``own``.
    """
    assert own.is_contiguous(), "sum_pieces_: own must be contiguous"
    assert parts.is_contiguous(), "sum_pieces_: parts must be contiguous"
    if own.dtype == torch.float32 and face_of("sum_pieces", own.device.type) == "native":
        native().sum_pieces(address(parts), len(parts) + 1, rank,  # type: ignore[union-attr]
                            own.numel(), scale, address(own))
        return own
    return sum_pieces_reference_(own, parts, rank, scale)


def sum_pieces_reference_(own: Tensor, parts: Tensor, rank: int, scale: float = 1.0) -> Tensor:
    """Plain-torch face of `sum_pieces_`."""
    total = torch.zeros_like(own, dtype=torch.promote_types(own.dtype, torch.float32))
    for part in (*parts[:rank], own, *parts[rank:]):
        total += part
    return own.copy_(total.mul_(scale))
