"""Encodes and decodes matrices of rows; formats and plain-torch arithmetic: `shardlab.codecs`."""

from __future__ import annotations

import torch
from torch import Tensor

from shardlab.codecs import CODECS, decode, encode, row_words
from shardlab.ops.registry import address, check_tensor, face_of, native
from shardlab.ops.rounding import Rounding
from shardlab.storage_bytes import payload_bytes

#: Rows that the reference works on at a time: its int64 arithmetic takes 30 times an fp32 row.
_REFERENCE_ELEMENTS = 1 << 20


def encode_rows(values: Tensor, codec: str, out: Tensor, rounding: Rounding) -> None:
    """Encodes every row of a matrix.

    Args:
        values: fp32 [n, c], rows contiguous in themselves.
        codec: a key of `shardlab.codecs.CODECS`.
        out: uint8 [n, payload_bytes(codec, c)], rows contiguous in themselves; written in place.
        rounding: how, with which random bits.

    Raises:
        TypeError: a tensor of another dtype, shape or layout.
    """
    _check(values, codec, out)
    if rounding.rows is not None:
        check_tensor("rounding.rows", rounding.rows, torch.int64)
    face = face_of("encode_rows", values.device.type)
    if face == "native":
        native().encode_rows(  # type: ignore[union-attr]
            _shape(values, codec, out), address(values), address(out), rounding.stochastic,
            rounding.key, rounding.row_start, rounding.col_start, address(rounding.rows),
            torch.get_num_threads())
    elif face == "triton":
        from shardlab.ops.triton import codecs as kernels

        kernels.encode_rows(values, codec, out, rounding)
    else:
        encode_rows_reference(values, codec, out, rounding)


def encode_rows_reference(values: Tensor, codec: str, out: Tensor, rounding: Rounding) -> None:
    """Plain-torch face of `encode_rows`."""
    step = max(1, _REFERENCE_ELEMENTS // max(1, values.shape[1]))
    for first in range(0, values.shape[0], step):
        part = slice(first, first + step)
        words = None
        if rounding.stochastic:
            rows = (torch.arange(first, first + values[part].shape[0], device=values.device)
                    + rounding.row_start) if rounding.rows is None else rounding.rows[part]
            words = row_words(rounding.key, rows)
        out[part] = encode(values[part], codec, words, rounding.col_start)


def decode_rows(records: Tensor, codec: str, out: Tensor) -> None:
    """Decodes every row of a matrix.

    Args:
        records: uint8 [n, payload_bytes(codec, c)], rows contiguous in themselves.
        codec: a key of `shardlab.codecs.CODECS`.
        out: fp32 [n, c], rows contiguous in themselves; written in place.

    Raises:
        TypeError: a tensor of another dtype, shape or layout.
    """
    _check(out, codec, records)
    face = face_of("decode_rows", records.device.type)
    if face == "native":
        native().decode_rows(_shape(out, codec, records),  # type: ignore[union-attr]
                             address(records), address(out), torch.get_num_threads())
    elif face == "triton":
        from shardlab.ops.triton import codecs as kernels

        kernels.decode_rows(records, codec, out)
    else:
        decode_rows_reference(records, codec, out)


def decode_rows_reference(records: Tensor, codec: str, out: Tensor) -> None:
    """Plain-torch face of `decode_rows`."""
    out.copy_(decode(records, codec, out.shape[1]))


def _shape(values: Tensor, codec: str, records: Tensor) -> list[int]:
    """(codec, rows, columns, elements between rows, bytes between records)."""
    return [CODECS[codec], *values.shape, values.stride(0), records.stride(0)]


def _check(values: Tensor, codec: str, records: Tensor) -> None:
    wanted = (values.shape[0], payload_bytes(codec, values.shape[1]))
    if values.dtype != torch.float32 or (values.shape[1] > 1 and values.stride(1) != 1):
        raise TypeError(f"{codec} rows: expected fp32 values whose rows are contiguous, found "
                        f"{values.dtype}, strides {values.stride()}")
    if records.dtype != torch.uint8 or tuple(records.shape) != wanted \
            or (wanted[1] > 1 and records.stride(1) != 1):
        raise TypeError(f"{codec} rows: expected uint8 records of shape {wanted} whose rows are "
                        f"contiguous, found {records.dtype}, shape {tuple(records.shape)}, strides "
                        f"{records.stride()}")
