"""The arithmetic of the codecs: formats, errors, saturation, unbiased rounding, random bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from shardlab import codecs
from shardlab.codecs import (
    CODECS,
    LARGEST,
    SCALE_COUNTER,
    decode,
    encode,
    random_bits,
    rounding_key,
    row_words,
    table_key,
)
from shardlab.storage_bytes import payload_bytes

SCALED = tuple(LARGEST)
#: Codec -> torch dtype of the same format.
SAME = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
#: Draws of a statistical test, and how many standard deviations it may be off: one in 500,000.
DRAWS, SIGMAS = 1 << 18, 5.0


def words_of(rows: int, step: int = 0) -> Tensor:
    return row_words(rounding_key(7, step), torch.arange(rows))


def codes_of(codec: str) -> Tensor:
    """Every finite value of a codec of elements, in ascending order, as fp32."""
    bits = 8 if codec == "fp8" else 16
    codes = torch.arange(1 << bits, dtype=torch.int32)
    if bits == 8:
        values = codes.to(torch.uint8).view(SAME[codec]).float()
    else:
        values = torch.where(codes < 1 << 15, codes, codes - (1 << 16)).to(torch.int16).view(
            SAME[codec]).float()
    return values[values.isfinite()].sort().values


# ---------------------------------------------------------------- formats
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("columns", [1, 2, 7, 16, 65])
def test_record_has_the_bytes_that_the_planner_counts(codec, columns):
    expected = {"fp32": 4 * columns, "fp16": 2 * columns, "bf16": 2 * columns, "fp8": columns + 1,
                "int8": columns + 1, "int4": (columns + 1) // 2 + 1,
                "fp8_e5m2": columns + 1}[codec]
    assert payload_bytes(codec, columns) == expected
    assert encode(torch.ones(3, columns), codec).shape == (3, expected)


@pytest.mark.parametrize("codec", ["fp16", "bf16"])
def test_nearest_is_torch_conversion_below_the_largest(codec):
    values = torch.randn(4000, 8) * torch.exp2(torch.randint(-30, 15, (4000, 1)).float())
    grid = codes_of(codec)
    ties = (grid[1:].double() + grid[:-1].double()) / 2  # of subnormals and normals alike
    values = torch.cat([values.view(-1), ties.float()[ties.abs() < 65504]])[:, None]
    assert torch.equal(decode(encode(values, codec), codec, 1), values.to(SAME[codec]).float())


def test_nearest_fp8_is_torch_conversion_of_scaled_rows():
    values = torch.randn(300, 40)
    records = encode(values, "fp8")
    scale = codecs.decode_scales(records[:, -1].long())[:, None]
    expected = (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    inside = records[:, -1] > 0
    assert torch.equal(decode(records, "fp8", 40)[inside], expected[inside])


@pytest.mark.parametrize("codec", SCALED)
def test_scale_is_the_least_that_fits_or_one_below(codec):
    """One below where amax is nearer to it: all beyond its largest value becomes that value."""
    values = torch.randn(3000, 16) * torch.exp2(torch.rand(3000, 1) * 18 - 14)
    for words in (None, words_of(3000)):
        records = encode(values, codec, words)
        scale = codecs.decode_scales(records[:, -1].long())
        amax = values.abs().amax(1)
        ratio = amax / (scale * LARGEST[codec])
        most = {"fp8": 240 / 224, "fp8_e5m2": 32768 / 28672}.get(codec, 9 / 8)
        assert bool((ratio <= most).all())
        fits = records[:, -1] > 0  # e5m2 reaches below its least scale
        assert bool((ratio[fits] > (0.49 if codec.startswith("fp8") else 7 / 8)).all())


def test_int4_packs_the_first_column_low():
    records = encode(torch.tensor([[7.0, -7.0, 3.0]]), "int4")
    assert records[0, :2].tolist() == [0x97, 0x03]
    assert decode(records, "int4", 3).tolist() == [[7.0, -7.0, 3.0]]


@pytest.mark.parametrize(("codec", "step"), [("int8", 1 / 127), ("int4", 1 / 7)])
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_error_stays_within_a_step(codec, step, stochastic):
    """A step of the scale is at most 9/8 of amax / largest; rounding moves by one or by half."""
    values = torch.randn(2000, 24)
    words = words_of(2000) if stochastic else None
    error = (decode(encode(values, codec, words), codec, 24) - values).abs()
    bound = values.abs().amax(1, keepdim=True) * step * 9 / 8
    assert bool((error <= bound * (1.001 if stochastic else 0.51)).all())


# ---------------------------------------------------------------- extremes
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize(("codec", "largest"), [
    ("fp16", 65504.0), ("bf16", 3.3895313892515355e38), ("fp8", 448 * 32.0), ("int8", 127 * 56.0),
    ("int4", 7 * 56.0)])
def test_saturates_at_the_largest_value(codec, largest, stochastic):
    values = torch.tensor([[3.4028235e38], [-3.4028235e38], [float("inf")], [-float("inf")]])
    words = words_of(4) if stochastic else None
    found = decode(encode(values, codec, words), codec, 1)[:, 0]
    assert found.tolist() == [largest, -largest, largest, -largest]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_nan_is_never_silent(codec, stochastic):
    values = torch.ones(3, 5)
    values[1, 2] = float("nan")
    found = decode(encode(values, codec, words_of(3) if stochastic else None), codec, 5)
    assert bool(found[1, 2].isnan())
    assert found[1].isnan().all() if codec in SCALED else int(found.isnan().sum()) == 1
    assert torch.equal(found[[0, 2]], torch.ones(2, 5)) or codec in SCALED
    assert bool(found[[0, 2]].isfinite().all())


@pytest.mark.parametrize("codec", CODECS)
def test_zero_and_tiny_rows_stay_finite(codec):
    values = torch.tensor([[0.0, -0.0], [1e-45, -1e-45], [1e-30, 0.0]])
    for words in (None, words_of(3)):
        found = decode(encode(values, codec, words), codec, 2)
        assert torch.equal(found[0], torch.zeros(2))
        assert bool((found.abs() <= 2.0**-24).all())


# ---------------------------------------------------------------- what is representable stays
@pytest.mark.parametrize("codec", ["fp16", "bf16"])
def test_representable_values_never_move(codec):
    values = codes_of(codec)[:, None]
    for step in range(4):
        assert torch.equal(decode(encode(values, codec, words_of(len(values), step)), codec, 1),
                           values)


@pytest.mark.parametrize("codec", SCALED)
@pytest.mark.parametrize("columns", [1, 2, 5, 32])
def test_encoding_again_changes_nothing(codec, columns):
    """Whatever the random bits: an unchanged row keeps its bytes, its scale does not wander."""
    values = torch.randn(20_000, columns) * torch.exp2(torch.rand(20_000, 1) * 36 - 28)
    for words in (None, words_of(20_000)):
        records = encode(values, codec, words)
        for step in range(1, 4):
            again = None if step == 1 else words_of(20_000, step)
            assert torch.equal(encode(decode(records, codec, columns), codec, again), records)


# ---------------------------------------------------------------- unbiased
def mean_error_sigmas(value: float, below: float, above: float, found: Tensor) -> float:
    """How many standard deviations the mean of draws lies off, from the exact odds."""
    assert bool(((found == below) | (found == above)).all()), found.unique()
    odds = (value - below) / (above - below)
    deviation = math.sqrt(max(odds * (1 - odds), 1e-12) / found.numel())
    share = (found == above).double().mean().item()
    return abs(share - odds) / deviation


@pytest.mark.parametrize("share", [1 / 2, 1 / 10, 1 / 300, 1 / 1000, 999 / 1000])
@pytest.mark.parametrize("start", [1.0, -1.0, 0.3330078125, 65472.0, -65472.0, 2.0**-14 - 2.0**-24,
                                   2.0**-15, -(2.0**-18), 3 * 2.0**-24, 0.0])
def test_fp16_is_unbiased(start, share):
    """Normal, near the largest, the last subnormal, subnormal, and below the smallest."""
    step = max(2.0 ** (math.floor(math.log2(abs(start) or 1e-30)) - 10), 2.0**-24)
    sign = -1.0 if start < 0 else 1.0
    value = float(np.float32(start + sign * share * step))
    found = decode(encode(torch.full((DRAWS // 64, 64), value), "fp16", words_of(DRAWS // 64)),
                   "fp16", 64)
    assert mean_error_sigmas(value, start, start + sign * step, found) < SIGMAS


@pytest.mark.parametrize("share", [1 / 2, 1 / 300, 1 / 1000])
@pytest.mark.parametrize("start", [1.0, -3.0, 2.0**-130, 3e38])
def test_bf16_is_unbiased(start, share):
    low = float(torch.tensor(start).to(torch.bfloat16))
    step = max(2.0 ** (math.floor(math.log2(abs(low))) - 7), 2.0**-133)
    sign = -1.0 if low < 0 else 1.0
    value = float(np.float32(low + sign * share * step))
    found = decode(encode(torch.full((DRAWS // 64, 64), value), "bf16", words_of(DRAWS // 64)),
                   "bf16", 64)
    assert mean_error_sigmas(value, low, low + sign * step, found) < SIGMAS


@pytest.mark.parametrize("codec", SCALED)
@pytest.mark.parametrize("amax", [0.013, 0.0139, 1.0, 1.11, 111.7])
def test_scaled_rows_are_unbiased_up_to_their_largest_value(codec, amax):
    """Means of all columns, the row's largest included, whose place decides on the scale."""
    share = torch.tensor([1.0, -1.0, 0.997, -0.96, 0.9, 0.5003, -0.25, 0.1, 1 / 300, 1 / 1000, 0.0])
    row = (amax * share.double()).float()
    draws = DRAWS // 4
    found = decode(encode(row.expand(draws, -1).contiguous(), codec, words_of(draws)), codec, 11)
    error = found.double().mean(0) - row.double()
    # 24 random bits decide: a mean may be off by 2^-24 of a step beside the noise.
    bound = SIGMAS * found.double().std(0) / math.sqrt(draws) + amax * 2.0**-22
    assert bool((error.abs() <= bound).all()), (error / bound).tolist()


def test_rounding_depends_on_seed_and_step():
    values = torch.randn(50, 40)
    rows, seen = torch.arange(50), []
    for seed, step, stream in ((1, 1, 0), (2, 1, 0), (1, 2, 0), (1, 1, 1)):
        words = row_words(rounding_key(seed, step, stream), rows)
        seen.append(encode(values, "fp16", words))
        assert torch.equal(encode(values, "fp16", words), seen[-1])
    for a in range(4):
        for b in range(a):
            assert int((seen[a] != seen[b]).any(1).sum()) == 50


def test_rounding_follows_global_rows_and_columns():
    """A part of a table rounds as the whole does, wherever the part was cut out."""
    values = torch.randn(40, 48)
    whole = encode(values, "fp16", words_of(40))
    part = encode(values[10:30, 16:], "fp16", words_of(40)[10:30], 16)
    assert torch.equal(part, whole[10:30, 32:])


# ---------------------------------------------------------------- random bits
def unit(words: Tensor, counters: Tensor) -> Tensor:
    """Random numbers in [-1/2, 1/2), fp64."""
    return random_bits(words, counters).double() * 2.0**-32 - 0.5


def assert_uncorrelated(a: Tensor, b: Tensor) -> None:
    """Of uniform numbers; a product of two has the variance 1/144."""
    bound = SIGMAS / 12 / math.sqrt(a.numel())
    assert abs((a * b).mean().item()) < bound


COLUMNS = torch.arange(64)


@pytest.mark.parametrize("lag", [1, 2, 3, 7, 16, 32])
def test_columns_are_independent(lag):
    draws = unit(words_of(8192), COLUMNS)
    assert_uncorrelated(draws[:, lag:], draws[:, :-lag])


@pytest.mark.parametrize("lag", [1, 2, 64, 4096])
def test_rows_are_independent(lag):
    draws = unit(words_of(8192), COLUMNS)
    assert_uncorrelated(draws[lag:], draws[:-lag])


def test_steps_seeds_streams_and_tables_are_independent():
    rows = torch.arange(8192)
    keys = [rounding_key(1, 1), rounding_key(1, 2), rounding_key(2, 1), rounding_key(1, 1, 1),
            rounding_key(1, 1) ^ table_key("a"), rounding_key(1, 1) ^ table_key("b")]
    assert len(set(keys)) == len(keys)
    draws = [unit(row_words(key, rows), COLUMNS) for key in keys]
    for a in range(len(draws)):
        for b in range(a):
            assert_uncorrelated(draws[a], draws[b])


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_bits_are_uniform(shift):
    """Chi-square of every byte that rounding uses; 255 degrees of freedom, 330 is one in 1000.

    The lowest byte decides nothing; it is in the test since a bad one would tell of bad others.
    """
    bits = (random_bits(words_of(8192), COLUMNS) >> shift) & 255
    counts = torch.bincount(bits.view(-1), minlength=256).double()
    expected = bits.numel() / 256
    assert float(((counts - expected) ** 2 / expected).sum()) < 330


def test_pairs_of_columns_fill_the_plane():
    """Chi-square of (high bits of column c, of c + 1): 1023 degrees of freedom, 1168 is 1/1000."""
    high = random_bits(words_of(8192), COLUMNS) >> 27
    pairs = (high[:, 1:] * 32 + high[:, :-1]).reshape(-1)
    counts = torch.bincount(pairs, minlength=1024).double()
    expected = pairs.numel() / 1024
    assert float(((counts - expected) ** 2 / expected).sum()) < 1168


def test_scale_has_random_bits_of_its_own():
    words = words_of(100_000)
    scale, column = (unit(words, torch.tensor([c])) for c in (SCALE_COUNTER, 0))
    assert_uncorrelated(scale, column)


def test_keys_are_signed_words():
    keys = [rounding_key(seed, step) for seed in range(40) for step in range(40)]
    keys += [table_key(f"table_{i}") for i in range(400)]
    assert len(set(keys)) == 2000
    assert all(-(1 << 63) <= key < 1 << 63 for key in keys)
    assert table_key("ab") != table_key("ba")
