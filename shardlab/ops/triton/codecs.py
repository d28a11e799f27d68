"""Triton faces of encode and decode, and what kernels on encoded rows share.

Arithmetic: `shardlab.codecs`, whose bits these give. A tile is R rows x C columns, and no
row is wider than a tile, so that a row's scale is known to the program that encodes it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardlab import codecs
from shardlab.codecs import CODECS
from shardlab.ops.rounding import Rounding

FP32, FP16, BF16, FP8, INT8, INT4, E5M2 = (tl.constexpr(number) for number in CODECS.values())
PART_SIZE = tl.constexpr(1 << codecs.PART_BITS)
_SCALE_COUNTER = tl.constexpr(codecs.SCALE_COUNTER)
_SCALE_SHIFT = tl.constexpr(codecs.SCALE_SHIFT)
_SCALE_BIAS = tl.constexpr(codecs.SCALE_BIAS)
_ROUND_SCALE_UP = tl.constexpr((1 << codecs.SCALE_SHIFT) - 1 - 8)
_TOP_SCALE = tl.constexpr(codecs.TOP_SCALE)
_NAN_SCALE = tl.constexpr(codecs.NAN_SCALE)
_INF = tl.constexpr(0x7F800000)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_FP16_MAX = tl.constexpr(codecs.MINI_FLOATS["fp16"][2])
_FP8_MAX = tl.constexpr(codecs.MINI_FLOATS["fp8"][2])
_E5M2_MAX = tl.constexpr(codecs.MINI_FLOATS["fp8_e5m2"][2])
_FP8_NEXT = tl.constexpr(codecs.FLOAT_CODES["fp8"])
_E5M2_NEXT = tl.constexpr(codecs.FLOAT_CODES["fp8_e5m2"])
_BF16_MAX = tl.constexpr(0x7F7F0000)
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it to fp32 leaves integers

#: Rows of a tile: about as many elements as eight warps hold in registers.
_ELEMENTS = 2048


# ---------------------------------------------------------------- random bits
@triton.jit
def row_words(key, rows):
    """(low, high) halves of the rows' random words, uint32; key int64, rows int64 [R]."""
    x = (key + rows * -7046029254386353131).to(tl.uint64, bitcast=True)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return (x & 0xFFFFFFFF).to(tl.uint32), (x >> 32).to(tl.uint32)


@triton.jit
def random_bits(low, high, counter):
    """uint32 random bits of the broadcast of row words and counters, uint32."""
    second = counter & 16
    x = low + (counter - second) * 0x9E3779B9
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = x ^ high
    x = (x ^ (x >> 15)) * 0xD35A2D97
    stirred = x ^ (x >> 16)
    return tl.where(second != 0, (stirred << 16) | (stirred >> 16), x)


# ---------------------------------------------------------------- elements
@triton.jit
def _bits(values):
    return values.to(tl.int32, bitcast=True)


@triton.jit
def _mini_codes(values, random, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr,
                STOCHASTIC: tl.constexpr):
    """Codes of |values| in a float of few bits, int32; see `shardlab.codecs`."""
    SHIFT: tl.constexpr = 23 - MANTISSA
    STEPS: tl.constexpr = BIAS - 1 + MANTISSA
    FRACTION: tl.constexpr = 30 - MANTISSA
    bits = tl.minimum(_bits(values) & _MAGNITUDE, LARGEST)
    subnormal = bits < ((127 - BIAS + 1) << 23)
    small = tl.where(subnormal, bits, 0).to(tl.float32, bitcast=True)
    if STOCHASTIC:
        normal = bits + (random >> (32 - SHIFT)).to(tl.int32)
        fixed = (small * (2.0 ** (STEPS + FRACTION))).to(tl.int32)
        tiny = (fixed + (random >> (32 - FRACTION)).to(tl.int32)) >> FRACTION
    else:
        normal = bits + ((1 << (SHIFT - 1)) - 1) + ((bits >> SHIFT) & 1)
        tiny = _bits(small + 2.0 ** (23 - STEPS)) - ((127 + 23 - STEPS) << 23)
    return tl.where(subnormal, tiny, (normal >> SHIFT) - ((127 - BIAS) << MANTISSA))


@triton.jit
def short_codes(values, random, CODEC: tl.constexpr, STOCHASTIC: tl.constexpr):
    """fp16 or bf16 codes, int32 in [0, 2^16)."""
    bits = _bits(values)
    if CODEC == FP16:
        codes = _mini_codes(values, random, 10, 15, _FP16_MAX, STOCHASTIC)
        codes = tl.where((bits & _MAGNITUDE) > _INF, 0x7E00, codes)
    else:
        magnitude = tl.minimum(bits & _MAGNITUDE, _BF16_MAX)
        if STOCHASTIC:
            codes = (magnitude + (random >> 16).to(tl.int32)) >> 16
        else:
            codes = (magnitude + ((magnitude >> 16) & 1) + 0x7FFF) >> 16
        codes = tl.where((bits & _MAGNITUDE) > _INF, 0x7FC0, codes)
    return codes | ((bits >> 16) & 0x8000)


@triton.jit
def load_plain(record, element, mask, CODEC: tl.constexpr):
    """fp32 of elements of fp32, fp16 or bf16 records at uint8 pointers; 0 where masked."""
    if CODEC == FP32:
        return tl.load(record.to(tl.pointer_type(tl.float32)) + element, mask=mask, other=0.0)
    codes = tl.load(record.to(tl.pointer_type(tl.int16)) + element, mask=mask, other=0)
    if CODEC == FP16:
        return codes.to(tl.float16, bitcast=True).to(tl.float32)
    return (codes.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def store_plain(record, element, values, random, mask, CODEC: tl.constexpr,
                STOCHASTIC: tl.constexpr):
    """Encodes elements into fp32, fp16 or bf16 records."""
    if CODEC == FP32:
        tl.store(record.to(tl.pointer_type(tl.float32)) + element, values, mask=mask)
    else:
        codes = short_codes(values, random, CODEC, STOCHASTIC)
        tl.store(record.to(tl.pointer_type(tl.int16)) + element, codes.to(tl.int16), mask=mask)


# ---------------------------------------------------------------- rows with a scale
@triton.jit
def decode_scale(code):
    """fp32 of scale codes int32; NaN for the mark of a row with one."""
    scale = ((code << _SCALE_SHIFT) + _SCALE_BIAS).to(tl.float32, bitcast=True)
    return tl.where(code == _NAN_SCALE, float("nan"), scale)


@triton.jit
def load_rows(record, columns, c, inside, CODEC: tl.constexpr):
    """Rows fp32 [R, C]; record: uint8 pointers [R], c: int32 [1, C], inside: mask [R, C]."""
    if CODEC <= BF16:
        return load_plain(record[:, None], c, inside, CODEC)
    live = tl.max(inside.to(tl.int32), axis=1) != 0
    last = columns
    at = c
    if CODEC == INT4:
        last = (columns + 1) // 2
        at = c // 2
    scale = decode_scale(tl.load(record + last, mask=live, other=0).to(tl.int32))
    codes = tl.load(record[:, None] + at, mask=inside, other=0).to(tl.int32)
    if CODEC == E5M2:  # the upper half of fp16
        values = (codes << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return values * scale[:, None]
    if CODEC == FP8:
        # As fp16, whose exponent has another bias: 2^8 too small.
        wide = ((codes & 0x7F) << 7) | ((codes & 0x80) << 8)
        values = wide.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return values * (256.0 * scale)[:, None]
    shift = 24 if CODEC == INT8 else 28 - 4 * (c % 2)
    codes = (codes << shift) >> (24 if CODEC == INT8 else 28)
    return codes.to(tl.float32) * scale[:, None]


@triton.jit
def _scale_float(code):
    return ((code << _SCALE_SHIFT) + _SCALE_BIAS).to(tl.float32, bitcast=True)


@triton.jit
def _inverse(scale):
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def _choose_scales(values, amax_bits, low_word, high_word, CODEC: tl.constexpr,
                   STOCHASTIC: tl.constexpr):
    """(scale codes int32 [R], values to encode in them); see `shardlab.codecs._choose_scales`."""
    amax = amax_bits.to(tl.float32, bitcast=True)
    if (CODEC == FP8) | (CODEC == E5M2):
        STEP: tl.constexpr = 8
        LARGEST: tl.constexpr = 448.0 if CODEC == FP8 else 57344.0
        TOP: tl.constexpr = 8 if CODEC == FP8 else 15
        exponent = ((amax_bits.to(tl.int64) + 0x1FFFFF) >> 23).to(tl.int32) - (127 + TOP) + 26
        code = tl.minimum(tl.maximum(exponent, 0), 31) << 3
    else:
        STEP: tl.constexpr = 1
        LARGEST: tl.constexpr = 127.0 if CODEC == INT8 else 7.0
        wanted = _bits(amax * tl.div_rn(tl.full(amax.shape, 1.0, tl.float32), LARGEST))
        code = (wanted + _ROUND_SCALE_UP - _SCALE_BIAS) >> _SCALE_SHIFT
        code = tl.minimum(tl.maximum(code, 0), _TOP_SCALE)
        code += (_scale_float(code) * LARGEST < amax).to(tl.int32)
        code = tl.minimum(code, _TOP_SCALE)
    below = tl.maximum(code - STEP, 0)
    scale = _scale_float(code)
    low = _scale_float(below) * LARGEST
    if CODEC == FP8:
        high = scale * _FP8_NEXT
    elif CODEC == E5M2:
        high = scale * _E5M2_NEXT
    else:
        high = (tl.div_rn(low, scale).to(tl.int32).to(tl.float32) + 1.0) * scale
    between = (code > below) & (amax > low) & (amax < high)
    share = tl.div_rn(amax - low, high - low)
    if STOCHASTIC:
        counter = tl.full(low_word.shape, _SCALE_COUNTER, tl.uint32)
        random = random_bits(low_word, high_word, counter)
        up = (random >> 8).to(tl.float32) * (2.0 ** -24) < share
        factor = tl.div_rn(high - low, amax - low)
        magnitude = tl.abs(values)
        wide = (magnitude - low[:, None]) * factor[:, None] + low[:, None]
        wide = tl.where(magnitude < amax[:, None], wide, high[:, None])
        wide = tl.where(magnitude > low[:, None], wide, magnitude)
        wide = tl.where(_bits(values) < 0, -wide, wide)
        values = tl.where((between & up)[:, None], wide, values)
    else:
        up = share >= 0.5
    return tl.where(between & (up == 0), below, code), values


@triton.jit
def _quantised(values, scale, LARGEST: tl.constexpr, random, STOCHASTIC: tl.constexpr):
    """round(values / scale), int32: the nearest integer, then the exact remainder decides."""
    q = (values * _inverse(scale) + _ROUND) - _ROUND
    if STOCHASTIC:
        rest = values - q * scale
        away = tl.abs(rest) > (random >> 8).to(tl.float32) * (scale * (2.0 ** -24))
        q += tl.where(away, tl.where(rest < 0, -1.0, 1.0), 0.0)
    q = tl.where(q < LARGEST, q, LARGEST)
    return tl.where(q > -LARGEST, q, -LARGEST).to(tl.int32)


@triton.jit
def store_rows(record, values, columns, c, inside, low_word, high_word, first,
               CODEC: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Encodes rows fp32 [R, C] into records; first: random counter of column 0, int64."""
    random = random_bits(low_word[:, None], high_word[:, None], (first + c).to(tl.uint32))
    if CODEC <= BF16:
        store_plain(record[:, None], c, values, random, inside, CODEC, STOCHASTIC)
    else:
        live = tl.max(inside.to(tl.int32), axis=1) != 0
        values = tl.where(inside, values, 0.0)
        amax_bits = tl.max(_bits(values) & _MAGNITUDE, axis=1)
        code, values = _choose_scales(values, amax_bits, low_word, high_word, CODEC, STOCHASTIC)
        scale = _scale_float(code)[:, None]
        has_nan = amax_bits > _INF
        last = columns
        if CODEC == FP8:
            codes = _mini_codes(values * _inverse(scale), random, 3, 7,
                                _FP8_MAX, STOCHASTIC)
            codes |= (_bits(values) >> 24) & 0x80
        elif CODEC == E5M2:
            codes = _mini_codes(values * _inverse(scale), random, 2, 15,
                                _E5M2_MAX, STOCHASTIC)
            codes |= (_bits(values) >> 24) & 0x80
        elif CODEC == INT8:
            codes = _quantised(values, scale, 127.0, random, STOCHASTIC) & 0xFF
        else:
            codes = _quantised(values, scale, 7.0, random, STOCHASTIC) & 15
        codes = tl.where(has_nan[:, None] | (inside == 0), 0, codes)
        if CODEC == INT4:
            last = (columns + 1) // 2
            even, odd = tl.split(codes.reshape(codes.shape[0], codes.shape[1] // 2, 2))
            byte = tl.arange(0, codes.shape[1] // 2)[None, :]
            tl.store(record[:, None] + byte, (even | (odd << 4)).to(tl.uint8),
                     mask=live[:, None] & (byte < last))
        else:
            tl.store(record[:, None] + c, codes.to(tl.uint8), mask=inside)
        tl.store(record + last, tl.where(has_nan, _NAN_SCALE, code).to(tl.uint8), mask=live)


# ---------------------------------------------------------------- whole matrices
def tile_of(columns: int) -> tuple[int, int]:
    """Rows and columns of a tile; int4 packs pairs of columns."""
    C = max(2, triton.next_power_of_2(columns))
    return max(1, min(64, _ELEMENTS // C)), C


def encode_rows(values: Tensor, codec: str, out: Tensor, rounding: Rounding) -> None:
    """Encodes every row of a matrix; contract in `shardlab.ops.codecs`."""
    rows, columns = values.shape
    if values.numel() == 0:
        out.fill_(0)
        return
    R, C = tile_of(columns)
    numbers = torch.tensor([rounding.key, rounding.row_start, rounding.col_start])
    given = rounding.rows is not None
    _encode_kernel[(triton.cdiv(rows, R),)](
        values, out, rounding.rows if given else out, numbers.to(values.device), rows, columns,
        values.stride(0), out.stride(0), CODEC=CODECS[codec], STOCHASTIC=rounding.stochastic,
        GIVEN=given, R=R, C=C, enable_fp_fusion=False)


@triton.jit(do_not_specialize=["rows", "columns"])
def _encode_kernel(values, out, row_ids, numbers, rows, columns, value_step, record_step,
                   CODEC: tl.constexpr, STOCHASTIC: tl.constexpr, GIVEN: tl.constexpr,
                   R: tl.constexpr, C: tl.constexpr):
    """numbers: (key, first row, first column)."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    live = row < rows
    c = tl.arange(0, C)[None, :]
    inside = live[:, None] & (c < columns)
    number = row + tl.load(numbers + 1)
    if GIVEN:
        number = tl.load(row_ids + row, mask=live, other=0)
    low, high = row_words(tl.load(numbers), number)
    tile = tl.load(values + (row * value_step)[:, None] + c, mask=inside, other=0.0)
    store_rows(out + row * record_step, tile, columns, c, inside, low, high, tl.load(numbers + 2),
               CODEC, STOCHASTIC)


def decode_rows(records: Tensor, codec: str, out: Tensor) -> None:
    """Decodes every row of a matrix; contract in `shardlab.ops.codecs`."""
    rows, columns = out.shape
    if out.numel() == 0:
        return
    R, C = tile_of(columns)
    _decode_kernel[(triton.cdiv(rows, R),)](records, out, rows, columns, records.stride(0),
                                            out.stride(0), CODEC=CODECS[codec], R=R, C=C,
                                            enable_fp_fusion=False)


@triton.jit(do_not_specialize=["rows", "columns"])
def _decode_kernel(records, out, rows, columns, record_step, value_step, CODEC: tl.constexpr,
                   R: tl.constexpr, C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    c = tl.arange(0, C)[None, :]
    inside = (row < rows)[:, None] & (c < columns)
    tile = load_rows(records + row * record_step, columns, c, inside, CODEC)
    tl.store(out + (row * value_step)[:, None] + c, tile, mask=inside)
