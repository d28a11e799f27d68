"""Encoding and decoding of matrices: every face against the reference, to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shardlab.codecs import CODECS
from shardlab.ops.codecs import decode_rows, encode_rows
from shardlab.ops.registry import native
from shardlab.ops.rounding import Rounding
from shardlab.storage_bytes import payload_bytes
from tests.shardlab.ops.cases import REFERENCE, ROW_PLACES, Place, face
from tests.shardlab.ops.encoded_cases import all_encoded, assert_same, run_codec

needs_native = pytest.mark.skipif(native() is None, reason="the native library is not built")


@pytest.fixture(params=ROW_PLACES)
def place(request) -> Place:
    return request.param


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dim", [1, 2, 15, 16, 17, 64, 131])
@pytest.mark.parametrize("codec", CODECS)
def test_faces_give_the_same_bits(place, codec, dim, stochastic):
    found, expected = (run_codec(codec, dim, where, stochastic=stochastic)
                       for where in (place, REFERENCE))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1].view(torch.int32), expected[1].view(torch.int32))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("rows", "columns"), [(0, 4), (0, 0), (1, 1)])
def test_few_rows(place, codec, rows, columns):
    values = torch.full((rows, columns), 3.0, device=place.device)
    records = torch.empty(rows, payload_bytes(codec, columns), dtype=torch.uint8,
                          device=place.device)
    back = torch.empty_like(values)
    with face(place.face):
        encode_rows(values, codec, records, Rounding(key=1))
        decode_rows(records, codec, back)
    assert back.shape == values.shape
    assert bool(((back - values).abs() <= 0.2).all())


def test_rows_are_counted_from_the_first_where_none_are_given(place):
    values = torch.randn(30, 20).to(place.device)
    outs = [torch.empty(30, 40, dtype=torch.uint8, device=place.device) for _ in range(2)]
    rows = torch.arange(30, device=place.device) + (1 << 41)
    with face(place.face):
        encode_rows(values, "fp16", outs[0], Rounding(True, 9, 1 << 41))
        encode_rows(values, "fp16", outs[1], Rounding(True, 9, 0, 0, rows))
    assert torch.equal(*outs)


@needs_native
def test_native_is_bit_identical_for_any_threads():
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            results.append(all_encoded(Place("native", "cpu")))
    finally:
        torch.set_num_threads(before)
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@pytest.fixture(scope="module")
def of_the_reference() -> dict[str, torch.Tensor]:
    return all_encoded(REFERENCE)


@pytest.mark.parametrize("isa", [] if native() is None else native().isas())
def test_every_instruction_set_gives_the_bits_of_the_reference(isa, tmp_path, of_the_reference):
    """The instruction set is chosen once a process, hence another process for each."""
    path, root = tmp_path / "outputs.pt", Path(__file__).resolve().parents[3]
    subprocess.run([sys.executable, "-m", "tests.shardlab.ops.encoded_cases", str(path), isa],
                   check=True, cwd=root, timeout=120,
                   env={**os.environ, "SHARDLAB_ISA": isa, "SHARDLAB_FACE": "native"})
    assert_same(torch.load(path, weights_only=True), of_the_reference)


@pytest.mark.parametrize(("values", "records", "message"), [
    (torch.ones(2, 4, dtype=torch.float64), torch.empty(2, 5, dtype=torch.uint8),
     r"int8 rows: expected fp32 values whose rows are contiguous, found torch.float64"),
    (torch.ones(4, 2).T, torch.empty(2, 5, dtype=torch.uint8),
     r"int8 rows: expected fp32 values whose rows are contiguous, found torch.float32, strides"),
    (torch.ones(2, 4), torch.empty(2, 4, dtype=torch.uint8),
     r"int8 rows: expected uint8 records of shape \(2, 5\) .* found torch.uint8, shape \(2, 4\)"),
    (torch.ones(2, 4), torch.empty(5, 2, dtype=torch.uint8).T,
     r"int8 rows: expected uint8 records of shape \(2, 5\) .* strides \(1, 2\)"),
])
def test_misread_matrices_are_refused(values, records, message):
    with pytest.raises(TypeError, match=message):
        encode_rows(values, "int8", records, Rounding())
    with pytest.raises(TypeError, match=message):
        decode_rows(records, "int8", values)
