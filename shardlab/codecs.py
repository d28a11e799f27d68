"""What a row's dtype is: its codes, its scale, how it is rounded, and where random bits come from.

Codecs: fp32, fp16, bf16, fp8 (e4m3), int8, int4, fp8_e5m2. The last four keep one scale a row: a
byte with 5 bits of exponent and 3 of mantissa, behind the codes. A row's value is code * scale;
int4 packs two columns in a byte, the first in the low half. Formats and proofs: docs/precision.md.

This is the plain-torch arithmetic that judges the native and Triton faces of `shardlab.ops.codecs`;
they give the same bits. Sources: stochastic rounding as in "Training with Low-Precision Embedding
Tables" (2018), mixed precision as in arXiv 2010.11305; generator: finaliser of splitmix64 (Steele
et al. 2014) a row, lowbias32 (hash-prospector) a lane; the choice of scales is own.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from shardlab.storage_bytes import payload_bytes

#: Codec -> its number in the kernels.
CODECS = {"fp32": 0, "fp16": 1, "bf16": 2, "fp8": 3, "int8": 4, "int4": 5, "fp8_e5m2": 6}

#: 2^64 over the golden ratio: consecutive numbers times it lie far apart.
GOLDEN = 0x9E3779B97F4A7C15
_WORD, _HALF = 1 << 64, 1 << 32
_LOW_HALF = _HALF - 1
#: Counters with this bit take the second half of a mix.
_SECOND = 16
_INF = 0x7F800000
_MAGNITUDE = 0x7FFFFFFF

#: A scale's byte s is the float whose bits are (s << 20) + (101 << 23): 2^-26 ... 56. 255 is no
#: scale: it marks a row that holds a NaN, has codes of zero, and decodes to a row of NaN.
SCALE_SHIFT, SCALE_BIAS, TOP_SCALE, NAN_SCALE = 20, 101 << 23, 254, 255
#: Largest code of the scaled codecs.
LARGEST = {"fp8": 448.0, "int8": 127.0, "int4": 7.0, "fp8_e5m2": 57344.0}
#: Codec -> (mantissa bits, exponent bias, fp32 bits of the largest finite value).
MINI_FLOATS = {"fp16": (10, 15, 0x477FE000), "fp8": (3, 7, 0x43E00000),
               "fp8_e5m2": (2, 15, 0x47600000)}
#: Codecs whose codes are floats -> what follows, in their scale, upon half of their largest value.
FLOAT_CODES = {"fp8": 240.0, "fp8_e5m2": 32768.0}

#: Random counters of a row: its columns, then part p of its state from (p + 1) << 28 on, and its
#: scale's.
PART_BITS = 28
SCALE_COUNTER = _LOW_HALF ^ _SECOND


# ---------------------------------------------------------------- keys
def mix32(x: int) -> int:
    """A mixer of 32 bits, a bijection. Source: C. Wellons, "Hash function prospector", 2018."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def mix64(x: int) -> int:
    """The finaliser of splitmix64 on 64 bits."""
    x %= _WORD
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % _WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % _WORD
    return x ^ (x >> 31)


def rounding_key(seed: int, step: int, stream: int = 0) -> int:
    """Key of the random bits of a step, a signed 64-bit integer.

    Args:
        seed: of the run.
        step: optimiser step.
        stream: tells uses within a step apart that may round the same row, such as an update and a
            write-back.
    """
    return signed(mix64(mix64(mix64(seed) + step) + stream + 1))


def table_key(name: str) -> int:
    """Key of a table's random bits, a signed 64-bit integer."""
    return signed(mix64((len(name) << 32) + zlib.crc32(name.encode())))


def signed(x: int) -> int:
    """The 64 bits of x as int64."""
    x %= _WORD
    return x - _WORD if x >= _WORD // 2 else x


# ---------------------------------------------------------------- random bits
def row_words(key: int, rows: Tensor) -> Tensor:
    """A 64-bit word per row: mix64(key + row * GOLDEN); int64 of any shape."""
    return mixed(rows * signed(GOLDEN) + signed(key))


def mixed(x: Tensor) -> Tensor:
    """`mix64` of int64, a bijection."""
    x = (x ^ shift_right(x, 30)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ shift_right(x, 27)) * signed(0x94D049BB133111EB)
    return x ^ shift_right(x, 31)


def random_bits(words: Tensor, counters: Tensor) -> Tensor:
    """32 random bits, their high ones best, for every row word [n] and counter [c]: int64 [n, c].

    Counters are int64 in [0, 2^32). The same bits on every device, in any order of asking. Counters
    n and n + 16 share one mix, whose low half is the second's high one.
    """
    low, high = words[:, None] & _LOW_HALF, shift_right(words, 32)[:, None]
    second = counters & _SECOND
    x = (low + (counters - second) * 0x9E3779B9) & _LOW_HALF
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _LOW_HALF
    x = x ^ high
    x = ((x ^ (x >> 15)) * 0xD35A2D97) & _LOW_HALF
    stirred = x ^ (x >> 16)
    turned = ((stirred << 16) & _LOW_HALF) | (stirred >> 16)
    return torch.where(second != 0, turned, x)


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Shifts int64 right as unsigned numbers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


# ---------------------------------------------------------------- encode
def encode(values: Tensor, codec: str, words: Tensor | None = None, first: int = 0) -> Tensor:
    """Records of rows.

    Values beyond the codec's largest become its largest, infinities too; a NaN stays one: in fp16
    and bf16 where it is, in scaled codecs it takes its whole row along.

    Args:
        values: fp32 [n, c].
        codec: a key of `CODECS`.
        words: int64 [n], `row_words`, for stochastic rounding; None rounds to nearest, ties to
            even.
        first: random counter of the first column.

    Returns:
        uint8 [n, payload_bytes(codec, c)].
    """
    columns = torch.arange(first, first + values.shape[1], device=values.device)
    random = None if words is None else random_bits(words, columns)
    if codec == "fp32":
        return values.contiguous().view(torch.uint8).view(values.shape[0], -1)
    if codec == "fp16":
        return _two_bytes(_fp16_codes(values, random))
    if codec == "bf16":
        return _two_bytes(_bf16_codes(values, random))
    odds = None
    if words is not None:
        scale_counter = torch.tensor([SCALE_COUNTER], device=values.device)
        odds = (random_bits(words, scale_counter)[:, 0] >> 8).float() * 2.0**-24
    return _scaled_records(values, codec, random, odds)


def _two_bytes(codes: Tensor) -> Tensor:
    short = torch.where(codes >= 1 << 15, codes - (1 << 16), codes).to(torch.int16)
    return short.view(torch.uint8).view(codes.shape[0], -1)


def _bits(values: Tensor) -> Tensor:
    """The 32 bits of fp32 as int64."""
    return values.contiguous().view(torch.int32).long() & _LOW_HALF


def _float(bits: Tensor) -> Tensor:
    """fp32 of 31 bits."""
    return bits.to(torch.int32).view(torch.float32)


def _fp16_codes(values: Tensor, random: Tensor | None) -> Tensor:
    bits = _bits(values)
    codes = _mini_codes(values, "fp16", random)
    codes = torch.where(bits & _MAGNITUDE > _INF, 0x7E00, codes)
    return codes | (bits >> 16) & 0x8000


def _bf16_codes(values: Tensor, random: Tensor | None) -> Tensor:
    bits = _bits(values)
    magnitude = (bits & _MAGNITUDE).clamp(max=0x7F7F0000)
    noise = ((magnitude >> 16) & 1) + 0x7FFF if random is None else random >> 16
    codes = (magnitude + noise) >> 16
    codes = torch.where(bits & _MAGNITUDE > _INF, 0x7FC0, codes)
    return codes | (bits >> 16) & 0x8000


def _mini_codes(values: Tensor, codec: str, random: Tensor | None) -> Tensor:
    """Codes of |values| in a float of few bits; subnormals are rounded at their own step."""
    mantissa, bias, largest = MINI_FLOATS[codec]
    shift, smallest_normal = 23 - mantissa, (127 - bias + 1) << 23
    steps, fraction = bias - 1 + mantissa, 30 - mantissa  # a subnormal step is 2^-steps
    bits = (_bits(values) & _MAGNITUDE).clamp(max=largest)
    subnormal = bits < smallest_normal
    small = _float(torch.where(subnormal, bits, 0))
    if random is None:
        normal = bits + (1 << (shift - 1)) - 1 + ((bits >> shift) & 1)
        magic = 2.0 ** (23 - steps)  # its fp32 step is 2^-steps
        tiny = _bits(small + magic) - ((127 + 23 - steps) << 23)
    else:
        normal = bits + (random >> (32 - shift))
        fixed = (small * 2.0 ** (steps + fraction)).long()
        tiny = (fixed + (random >> (32 - fraction))) >> fraction
    return torch.where(subnormal, tiny, (normal >> shift) - ((127 - bias) << mantissa))


def _scaled_records(values: Tensor, codec: str, random: Tensor | None,
                    odds: Tensor | None) -> Tensor:
    rows, columns = values.shape
    amax = (_bits(values) & _MAGNITUDE).amax(1) if columns else values.new_zeros(rows).long()
    code, values = _choose_scales(values, amax, codec, odds)
    scale = decode_scales(code)[:, None]
    has_nan = amax > _INF
    inverse = 1.0 / scale
    if codec in FLOAT_CODES:
        codes = _mini_codes(values * inverse, codec, random) | (_bits(values) >> 24) & 0x80
    else:
        codes = _quantised(values, scale, inverse, LARGEST[codec], random)
    codes = torch.where(has_nan[:, None], 0, codes & 0xFF)
    if codec == "int4":
        codes = torch.nn.functional.pad(codes & 15, (0, columns % 2))
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    marked = torch.where(has_nan, NAN_SCALE, code)
    return torch.cat([codes, marked[:, None]], 1).to(torch.uint8)


def _quantised(values: Tensor, scale: Tensor, inverse: Tensor, largest: float,
               random: Tensor | None) -> Tensor:
    """round(values / scale): the nearest integer, then the exact remainder decides."""
    rounder = 12582912.0  # 1.5 * 2^23: adding it leaves integers
    q = values * inverse + rounder - rounder
    if random is not None:
        rest = values - q * scale
        away = rest.abs() > (random >> 8).float() * (scale * 2.0**-24)
        q = q + torch.where(away, torch.where(rest < 0, -1.0, 1.0), 0.0)
    q = torch.where(q < largest, q, largest)
    return torch.where(q > -largest, q, -largest).long()


# ---------------------------------------------------------------- scales
def decode_scales(code: Tensor) -> Tensor:
    """fp32 of scale bytes int64 [n]; the mark of a NaN reads as the float above the largest."""
    return _float((code << SCALE_SHIFT) + SCALE_BIAS)


def _choose_scales(values: Tensor, amax_bits: Tensor, codec: str,
                   odds: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale codes [n], and the values to encode in them.

    The least scale s whose largest value Q s reaches amax would drift: a row could round to a
    largest value that fits the next lower scale r, and be encoded anew in it. So, where amax lies
    between Q r and the next step of s above that, either r is taken and all beyond Q r becomes Q r,
    or s, and those values are stretched up to that step: with such odds that the mean stays. A row
    then encodes to itself ever after.
    """
    largest, step = LARGEST[codec], 8 if codec in FLOAT_CODES else 1
    amax = _float(amax_bits)
    code = _least_scales(amax, amax_bits, codec)
    below = (code - step).clamp(min=0)
    scale = decode_scales(code)
    low = decode_scales(below) * largest
    high = scale * FLOAT_CODES[codec] if codec in FLOAT_CODES else \
        ((low / scale).long().float() + 1.0) * scale
    between = (code > below) & (amax > low) & (amax < high)
    share = (amax - low) / (high - low)
    up = share >= 0.5 if odds is None else odds < share
    chosen = torch.where(between & ~up, below, code)
    if odds is None:
        return chosen, values
    factor = (high - low) / (amax - low)
    magnitude = values.abs()
    wide = (magnitude - low[:, None]) * factor[:, None] + low[:, None]
    wide = torch.where(magnitude < amax[:, None], wide, high[:, None])
    wide = torch.where(magnitude > low[:, None], wide, magnitude)
    wide = torch.where(values.signbit(), -wide, wide)
    return chosen, torch.where((between & up)[:, None], wide, values)


def _least_scales(amax: Tensor, amax_bits: Tensor, codec: str) -> Tensor:
    """The least scale whose largest value reaches amax, or the largest scale."""
    if codec in FLOAT_CODES:  # powers of two; up where the fraction exceeds the largest's, 1.75
        top = 8 if codec == "fp8" else 15
        exponent = ((amax_bits + 0x1FFFFF) >> 23) - (127 + top) + 26
        return exponent.clamp(0, 31) << 3
    largest = LARGEST[codec]
    wanted = _bits(amax * (torch.ones_like(amax) / largest))
    # Some units too low, so that a product that rounded up does not count; one step up if so.
    code = (wanted + ((1 << SCALE_SHIFT) - 1 - 8) - SCALE_BIAS) >> SCALE_SHIFT
    code = code.clamp(0, TOP_SCALE)
    code = code + (decode_scales(code) * largest < amax).long()
    return code.clamp(max=TOP_SCALE)


# ---------------------------------------------------------------- decode
def decode(records: Tensor, codec: str, columns: int) -> Tensor:
    """fp32 [n, columns] of records uint8 [n, payload_bytes(codec, columns)]."""
    rows, width = records.shape
    assert width == payload_bytes(codec, columns), "records of another width"
    records = records.contiguous()
    if codec == "fp32":
        return records.view(-1).view(torch.float32).view(rows, columns)
    if codec in ("fp16", "bf16"):
        dtype = torch.float16 if codec == "fp16" else torch.bfloat16
        return records.view(-1).view(dtype).view(rows, columns).float()
    code = records[:, -1].long()
    scale = torch.where(code == NAN_SCALE, float("nan"), decode_scales(code))[:, None]
    codes = records[:, :-1]
    if codec == "int8":
        return codes.view(torch.int8).float() * scale
    if codec == "fp8_e5m2":  # the upper half of fp16
        return _two_bytes(codes.long() << 8).view(-1).view(torch.float16).view(rows, -1) \
            .float() * scale
    if codec == "fp8":
        codes = codes.long()
        wide = (codes & 0x7F) << 7 | (codes & 0x80) << 8  # fp16 with another bias: 2^8 too small
        values = _two_bytes(wide).view(-1).view(torch.float16).view(rows, -1).float()
        return values * (256.0 * scale)
    nibbles = torch.stack([codes & 15, codes >> 4], 2).view(rows, -1)[:, :columns].long()
    return torch.where(nibbles > 7, nibbles - 16, nibbles).float() * scale
