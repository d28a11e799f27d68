"""The GPU benchmark's own checks, as far as they go without its device."""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks.gpu import Problem, Shape, check, main
from shardlab.ops.registry import has_triton
from tests.shardlab.ops.cases import face

interpreted = pytest.mark.skipif(
    not has_triton() or os.environ.get("TRITON_INTERPRET") != "1",
    reason="triton is not installed, or runs on the CUDA device here")
TINY = Shape(tables=3, dim=4, pooling=2, rows=20, batch=9)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(capsys):
    assert main([]) == 2
    assert "benchmarks/gpu.py needs a CUDA device" in capsys.readouterr().err


@interpreted
def test_faces_are_compared_before_timing():
    check(Problem(TINY, "cpu"))


@interpreted
def test_a_wrong_face_is_found(monkeypatch):
    from shardlab.ops.triton import rows as kernels

    monkeypatch.setattr(kernels, "sum_rows", lambda *arguments: arguments[-1].fill_(1.0))
    with pytest.raises(AssertionError, match=r"sum_rows Shape\(tables=3.*faces differ by"):
        check(Problem(TINY, "cpu"))


def test_bytes_count_every_id_once():
    problem = Problem(TINY, "cpu")
    uniques, entries = problem.uniques.ids.numel(), 3 * 9 * 2
    moved = {op: count for op, (_, _, count) in problem.ops().items()}
    assert moved["gather_rows"] == uniques * (16 + 16 + 8)
    assert moved["pool_rows"] == entries * (16 + 8) + 3 * 9 * 16


@pytest.mark.gpu
def test_it_runs_on_a_device(capsys):
    with face("triton"):
        assert main(["--rows", "1000", "--batch", "64", "--samples", "2"]) == 0
    assert capsys.readouterr().out.count("of_copy") == 16
