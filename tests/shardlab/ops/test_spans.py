"""Spans of gradients: faces, bounds, unbiased rounding, and what is not finite."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shardlab.ops.registry import native
from shardlab.ops.rounding import Rounding
from shardlab.ops.spans import (
    decode_spans,
    decode_spans_reference,
    encode_spans,
    encode_spans_reference,
)
from shardlab.wire_bytes import SPAN_LIMITS, dense_element_bytes, span_bytes
from tests.shardlab.ops.cases import face

CODECS = sorted(SPAN_LIMITS)
#: What rounding moves, of the span's largest magnitude: docs/wire.md, stochastic at most.
BOUND = {"fp16": 2.0**-10, "bf16": 2.0**-7, "fp8": 2.0**-3, "fp8_e5m2": 2.0**-2, "int8": 2 / 113,
         "int4": 2 / 6.2}
FACES = pytest.mark.parametrize("name", [
    "reference", pytest.param("native", marks=pytest.mark.skipif(
        native() is None, reason="the native library is not built"))])


def _values(seed: int, spans: int = 37) -> Tensor:
    """Spans of magnitudes from 2^-140 to 2^127, one of zeros, one with a single element."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(spans, 256, generator=generator)
    powers = torch.linspace(-140, 124, spans)
    values *= torch.exp2(powers / 2)[:, None]
    values *= torch.exp2(powers / 2)[:, None]
    values[3] = 0
    values[4] = 0
    values[4, 255] = -3e-7
    values[-1, 0] = 2.0**127
    return values


def _coded(values: Tensor, codec: str, rounding: Rounding) -> tuple[Tensor, Tensor]:
    records = torch.empty(len(values), span_bytes(codec), dtype=torch.uint8)
    encode_spans(values, codec, records, rounding)
    back = torch.empty_like(values)
    decode_spans(records, codec, back)
    return records, back


@pytest.mark.skipif(native() is None, reason="the native library is not built")
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("codec", CODECS)
def test_faces_give_the_same_bits(codec, stochastic, seed):
    values = _values(seed)
    values[5, 17], values[6, 0], values[7, 255] = float("inf"), float("nan"), -float("inf")
    rounding = Rounding(stochastic, seed + 99, 1 << 33)
    found, expected = (torch.empty(len(values), span_bytes(codec), dtype=torch.uint8)
                       for _ in range(2))
    encode_spans(values, codec, found, rounding)
    with face("reference"):
        encode_spans_reference(values, codec, expected, rounding)
    assert torch.equal(found, expected)
    for add in (False, True):
        outs = [torch.full_like(values, 0.3) for _ in range(2)]
        decode_spans(found, codec, outs[0], factor=1 / 3, add=add)
        with face("reference"):
            decode_spans_reference(found, codec, outs[1], factor=1 / 3, add=add)
        assert torch.equal(outs[0].view(torch.int32), outs[1].view(torch.int32))


@FACES
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("codec", CODECS)
def test_the_error_is_bounded_whatever_the_magnitude(name, codec, stochastic, seed):
    values = _values(seed)
    with face(name):
        _, back = _coded(values, codec, Rounding(stochastic, seed))
    error = (back.double() - values.double()).abs().amax(1)
    largest = values.double().abs().amax(1)
    # Below 2^-126 neither fp32 nor a scale has more bits.
    assert bool((error <= BOUND[codec] * (1 if stochastic else 0.5) * largest + 2.0**-148).all())


@FACES
@pytest.mark.parametrize("codec", CODECS)
def test_stochastic_rounding_is_unbiased(name, codec):
    values = torch.randn(1, 256, generator=torch.Generator().manual_seed(1)) * 1e-9
    values[0, :20] *= 1e-3  # far below the largest
    trials = 4000
    with face(name):
        _, back = _coded(values.expand(trials, 256).contiguous(), codec, Rounding(True, 5))
    error = (back.double().mean(0) - values[0].double()).abs()
    # A value between two codes a step apart: variance at most step * |value|; six of its standard
    # errors, and a few hits more where hits are rare.
    step = BOUND[codec] * values.abs().max().double()
    allowed = 6 * (step * values[0].double().abs() / trials).sqrt() + 6 * step / trials
    assert bool((error <= allowed).all())


@FACES
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_makes_its_span_nan(name, codec, bad):
    values = torch.ones(3, 256)
    values[1, 200] = bad
    with face(name):
        _, back = _coded(values, codec, Rounding(True, 1))
    assert bool(back[1].isnan().all())
    assert bool(((back[::2] - 1).abs() <= BOUND[codec]).all())


@FACES
def test_no_spans(name):
    with face(name):
        records, back = _coded(torch.empty(0, 256), "int8", Rounding())
    assert records.shape == (0, 258)
    assert back.shape == (0, 256)


@pytest.mark.skipif(native() is None, reason="the native library is not built")
def test_bits_do_not_depend_on_threads():
    values, threads = _values(3, 200), torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(_coded(values, "int8", Rounding(True, 7)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_bits_follow_from_the_span_and_not_from_the_call():
    values = _values(4)
    whole = _coded(values, "int4", Rounding(True, 7, 100))[0]
    part = _coded(values[10:20].contiguous(), "int4", Rounding(True, 7, 110))[0]
    assert torch.equal(whole[10:20], part)


def test_bytes_of_an_element():
    assert dense_element_bytes("fp32") == 4
    assert [span_bytes(codec) for codec in ("fp16", "bf16", "int8", "int4")] == [513, 513, 258, 130]
    assert dense_element_bytes("int8") == 258 / 256


@pytest.mark.parametrize(("values", "records", "text"), [
    (torch.zeros(2, 256).double(), (2, 258), "expected a contiguous torch.float32"),
    (torch.zeros(2, 255), (2, 258), r"expected values \(2, 255\)|expected values \(2, 256\)"),
    (torch.zeros(2, 256), (2, 257), r"records \(2, 258\), found \(2, 256\) and \(2, 257\)"),
], ids=["dtype", "width", "record"])
def test_other_tensors_are_refused(values, records, text):
    with pytest.raises(TypeError, match=text):
        encode_spans(values, "int8", torch.zeros(records, dtype=torch.uint8), Rounding())
