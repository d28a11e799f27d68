"""Which face runs where, by device, by what is installed and by SHARDLAB_FACE."""

from __future__ import annotations

import pytest
import torch

from shardlab.errors import ConfigError
from shardlab.ops import registry
from shardlab.ops.registry import FACES, OPS, address, check_tensor, describe_faces, face_of


class FakeNative:
    """Stands for the compiled module: it is only asked what it runs on here."""

    def processor_vendor(self) -> str:
        return "amd"

    def isa(self) -> str:
        return "avx2"

    def isas(self) -> list[str]:
        return ["avx512", "avx2"]


@pytest.fixture
def installed(monkeypatch):
    """Says which faces are installed; nothing is forced."""
    monkeypatch.delenv("SHARDLAB_FACE", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def set_installed(*, native: bool, triton: bool) -> None:
        monkeypatch.setattr(registry, "native", lambda: FakeNative() if native else None)
        monkeypatch.setattr(registry, "has_triton", lambda: triton)
        registry._choose.cache_clear()

    yield set_installed
    registry._choose.cache_clear()


@pytest.mark.parametrize(("native", "triton", "device", "expected"), [
    (True, True, "cpu", "native"),
    (False, True, "cpu", "reference"),
    (True, True, "cuda", "triton"),
    (True, False, "cuda", "reference"),
    (True, True, "meta", "reference"),
])
def test_face_follows_device_and_installation(installed, native, triton, device, expected):
    installed(native=native, triton=triton)
    assert face_of("update_rows", device) == expected


def test_index_arithmetic_on_cuda_is_plain_torch(installed):
    installed(native=True, triton=True)
    assert face_of("unique_segments", "cuda") == "reference"


@pytest.mark.parametrize(("forced", "device", "interpreted", "expected"), [
    ("reference", "cpu", False, "reference"),
    ("reference", "cuda", False, "reference"),
    ("native", "cpu", False, "native"),
    ("native", "cuda", False, "triton"),
    ("triton", "cpu", True, "triton"),
    ("triton", "cpu", False, "native"),
    ("triton", "cuda", False, "triton"),
])
def test_forced_face_runs_where_it_can(installed, monkeypatch, forced, device, interpreted,
                                       expected):
    installed(native=True, triton=True)
    monkeypatch.setenv("SHARDLAB_FACE", forced)
    if interpreted:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert face_of("gather_rows", device) == expected


def test_forced_face_that_an_op_lacks_leaves_its_own(installed, monkeypatch):
    installed(native=True, triton=True)
    monkeypatch.setenv("SHARDLAB_FACE", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert face_of("unique_segments", "cpu") == "native"


def test_unknown_face_is_refused(installed, monkeypatch):
    installed(native=True, triton=True)
    monkeypatch.setenv("SHARDLAB_FACE", "nativ")
    with pytest.raises(ConfigError,
                       match="SHARDLAB_FACE='nativ' is not a face; known: reference, native, tri"):
        face_of("gather_rows", "cpu")


def test_every_op_names_known_faces():
    assert {face for faces in OPS.values() for face in faces} < set(FACES)


@pytest.mark.parametrize(("native", "face", "reason"), [
    (True, "native", "CPU tensors, avx2 of avx512, avx2"),
    (False, "reference", "the native library is not built"),
])
def test_description_tells_every_op_and_why(installed, monkeypatch, native, face, reason):
    installed(native=native, triton=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert describe_faces() == [(op, face, reason) for op in OPS]


def test_description_tells_what_is_forced(installed, monkeypatch):
    installed(native=True, triton=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("SHARDLAB_FACE", "reference")
    assert ("pool_rows", "reference", "SHARDLAB_FACE") in describe_faces()


def test_address_of_nothing_is_zero():
    tensor = torch.ones(2)
    assert address(None) == 0
    assert address(tensor) == tensor.data_ptr()


@pytest.mark.parametrize("tensor", [torch.ones(3), torch.ones(4, 6, dtype=torch.int64)[:, ::2]],
                         ids=["dtype", "strides"])
def test_misread_tensors_are_refused(tensor):
    with pytest.raises(TypeError, match=r"ids: expected a contiguous torch.int64 tensor, found "
                                        rf"{tensor.dtype}, shape \({tensor.shape[0]},"):
        check_tensor("ids", tensor, torch.int64)
    check_tensor("ids", torch.ones(3, dtype=torch.int64), torch.int64)
