"""Ids in as few bytes as their shard needs, little-endian. Source: own."""

from __future__ import annotations

import torch
from torch import Tensor

from shardlab.ops.registry import address, check_tensor, face_of, native

_BYTE_BITS, _LOW_BYTE = 8, 255


def pack_bytes(ids: Tensor, pieces: Tensor, total: int) -> Tensor:
    """Copies pieces of ids as rows of their shards, each in so many bytes.

    Args:
        ids: int64 [m].
        pieces: int64 [K, 5] on CPU: (start, count, subtract, first byte, bytes of an id); id -
            subtract is not negative and fits.
        total: bytes of all pieces, which tile the output.

    Returns:
        uint8 [total].
    """
    check_tensor("ids", ids, torch.int64)
    out = torch.empty(total, dtype=torch.uint8, device=ids.device)
    if face_of("pack_bytes", ids.device.type) == "native":
        native().pack_bytes(address(ids), address(pieces),  # type: ignore[union-attr]
                            pieces.shape[0], address(out))
        return out
    for start, count, subtract, first, width in pieces.tolist():
        shifts = _BYTE_BITS * torch.arange(width, device=ids.device)
        rows = ids[start:start + count, None] - subtract
        out[first:first + count * width] = ((rows >> shifts) & _LOW_BYTE).view(-1).to(torch.uint8)
    return out


def unpack_bytes(source: Tensor, pieces: Tensor, total: int) -> Tensor:
    """Reads ids that `pack_bytes` wrote.

    Args:
        source: uint8.
        pieces: int64 [K, 4] on CPU: (first byte, count, bytes of an id, out start).
        total: ids of all pieces, which tile the output.

    Returns:
        int64 [total].
    """
    check_tensor("source", source, torch.uint8)
    out = torch.empty(total, dtype=torch.int64, device=source.device)
    if face_of("unpack_bytes", source.device.type) == "native":
        native().unpack_bytes(address(source), address(pieces),  # type: ignore[union-attr]
                              pieces.shape[0], address(out))
        return out
    for first, count, width, start in pieces.tolist():
        shifts = _BYTE_BITS * torch.arange(width, device=source.device)
        digits = source[first:first + count * width].view(count, width).long()
        out[start:start + count] = (digits << shifts).sum(1)
    return out
