"""Encodes a flat vector in spans of 256 elements, each with a power of two of its own.

Row codecs hold a part of fp32's exponents, and the gradients of one layer lie far below those of
another. So every span is multiplied by the power of two that puts its largest magnitude just below
what its codec holds, then encoded as a row (`shardlab.codecs`); a byte behind the row's bytes tells
the power. Scaling is exact. A span that holds an infinity or a NaN has the power's byte
`NOT_FINITE` and decodes to NaN as a whole: a codec never turns it into something finite. Source:
own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shardlab.codecs import CODECS
from shardlab.ops.codecs import decode_rows, encode_rows
from shardlab.ops.registry import address, check_tensor, face_of, native
from shardlab.ops.rounding import Rounding
from shardlab.storage_bytes import payload_bytes
from shardlab.wire_bytes import SPAN_ELEMENTS, SPAN_LIMITS, span_bytes

#: Powers are exponents of fp32 whose inverse is one, too; their byte is power + `POWER_BIAS`.
LARGEST_POWER, POWER_BIAS, NOT_FINITE = 126, 127, 255

_SIGN_AND_INF = 0x7F800000
_FRACTION_BITS = 23


def encode_spans(values: Tensor, codec: str, out: Tensor, rounding: Rounding) -> None:
    """Encodes every span.

    Args:
        values: fp32 [n, 256], contiguous.
        codec: a key of `shardlab.wire_bytes.SPAN_LIMITS`.
        out: uint8 [n, span_bytes(codec)], contiguous; written in place.
        rounding: how; random bits follow from its key, ``row_start`` + the span's number, and the
            column.

    Raises:
        TypeError: a tensor of another dtype, shape or layout.
    """
    _check(values, codec, out)
    if face_of("encode_spans", values.device.type) == "native":
        native().encode_spans(  # type: ignore[union-attr]
            [CODECS[codec], values.shape[0], SPAN_LIMITS[codec]], address(values), address(out),
            rounding.stochastic, rounding.key, rounding.row_start, torch.get_num_threads())
    else:
        encode_spans_reference(values, codec, out, rounding)


def encode_spans_reference(values: Tensor, codec: str, out: Tensor, rounding: Rounding) -> None:
    """Plain-torch face of `encode_spans`; on CUDA `encode_rows` takes its Triton face."""
    bits = (values.view(torch.int32) & 0x7FFFFFFF).amax(1) if len(values) else \
        values.new_zeros(0, dtype=torch.int32)
    finite = bits < _SIGN_AND_INF
    exponent = (bits >> _FRACTION_BITS) - 126  # of a fraction in [0.5, 1), as frexp has it
    power = (SPAN_LIMITS[codec] - exponent).clamp(max=LARGEST_POWER)
    power = torch.where(bits == 0, 0, power)
    scaled = torch.where(finite[:, None], values, 0.0) * _power_of_two(power)[:, None]
    records = torch.empty(len(values), payload_bytes(codec, SPAN_ELEMENTS), dtype=torch.uint8,
                          device=values.device)
    encode_rows(scaled, codec, records, rounding)
    out[:, :-1] = records
    out[:, -1] = torch.where(finite, power + POWER_BIAS, NOT_FINITE).to(torch.uint8)


def decode_spans(records: Tensor, codec: str, out: Tensor, *, factor: float = 1.0,
                 add: bool = False) -> None:
    """Decodes every span.

    Args:
        records: uint8 [n, span_bytes(codec)], contiguous.
        codec: a key of `shardlab.wire_bytes.SPAN_LIMITS`.
        out: fp32 [n, 256], contiguous; written in place.
        factor: multiplies what was decoded.
        add: whether that is added to what is in ``out``.

    Raises:
        TypeError: a tensor of another dtype, shape or layout.
    """
    _check(out, codec, records)
    if face_of("decode_spans", out.device.type) == "native":
        native().decode_spans([CODECS[codec], out.shape[0]],  # type: ignore[union-attr]
                              address(records), address(out), factor, add, torch.get_num_threads())
    else:
        decode_spans_reference(records, codec, out, factor=factor, add=add)


def decode_spans_reference(records: Tensor, codec: str, out: Tensor, *, factor: float = 1.0,
                           add: bool = False) -> None:
    """Plain-torch face of `decode_spans`."""
    values = torch.empty_like(out)
    decode_rows(records[:, :-1].contiguous(), codec, values)
    code = records[:, -1].int()
    back = torch.where(code == NOT_FINITE, float("nan"), _power_of_two(POWER_BIAS - code))
    values = values * back[:, None] * factor
    out.copy_(out + values if add else values)


def _power_of_two(power: Tensor) -> Tensor:
    """fp32 2^power of int32 in [-126, 127]."""
    return ((power + 127) << _FRACTION_BITS).view(torch.float32)


def _check(values: Tensor, codec: str, records: Tensor) -> None:
    check_tensor(f"{codec} spans", values, torch.float32)
    check_tensor(f"records of {codec} spans", records, torch.uint8)
    wanted = (values.shape[0], SPAN_ELEMENTS), (values.shape[0], span_bytes(codec))
    if (tuple(values.shape), tuple(records.shape)) != wanted:
        raise TypeError(f"{codec} spans: expected values {wanted[0]} and records {wanted[1]}, "
                        f"found {tuple(values.shape)} and {tuple(records.shape)}")
