"""Files with checksums: readable by the safetensors library, refused when a byte differs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shardlab.errors import CheckpointError
from shardlab.train.tensor_file import (
    FileEntry,
    read_json,
    read_tensors,
    verify,
    verify_size,
    write_bytes,
    write_json,
    write_tensors,
)

TENSORS = {
    "fp32": torch.randn(3, 5), "strided": torch.arange(12).view(3, 4).t(), "scalar": torch.ones(()),
    "one_of_a_column": torch.arange(6.0).view(3, 2)[:1, 0],
    "empty": torch.empty(0, 7), "bf16": torch.randn(3).bfloat16(), "bool": torch.tensor([True]),
    "int8": torch.tensor([-1], dtype=torch.int8), "fp64": torch.tensor([1e-300]).double(),
    "named \"ü\"": torch.zeros(1, dtype=torch.int32),
}


@pytest.mark.parametrize("tensors", [TENSORS, {}, {"empty": torch.empty(0)}],
                         ids=["many", "none", "empty"])
def test_library_reads_what_is_written(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    entry = write_tensors(tmp_path / "a.safetensors", tensors)
    assert entry.bytes == (tmp_path / "a.safetensors").stat().st_size
    for found in (load_file(tmp_path / "a.safetensors"), read_tensors(tmp_path, entry)):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)


def test_dtype_that_the_format_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a\.st: tensor 'z' has dtype torch\.complex64"):
        write_tensors(tmp_path / "a.st", {"z": torch.zeros(1, dtype=torch.complex64)})


def test_json_round_trip(tmp_path: Path) -> None:
    entry = write_json(tmp_path / "a.json", {"lr": 0.1, "list": [1, None]})
    assert read_json(tmp_path, entry) == {"lr": 0.1, "list": [1, None]}


@pytest.fixture
def entry(tmp_path: Path) -> FileEntry:
    return write_tensors(tmp_path / "a.safetensors", {"w": torch.randn(100)})


@pytest.mark.parametrize("place", [0, 9, 60, -1], ids=["length", "header", "data", "last"])
def test_flipped_bit_is_refused(tmp_path: Path, entry: FileEntry, place: int) -> None:
    data = bytearray((tmp_path / entry.name).read_bytes())
    data[place] ^= 1
    (tmp_path / entry.name).write_bytes(data)
    verify_size(tmp_path, entry)
    with pytest.raises(CheckpointError, match=r"a\.safetensors is corrupted: XXH3"):
        read_tensors(tmp_path, entry)


def test_truncated_file_is_refused(tmp_path: Path, entry: FileEntry) -> None:
    data = (tmp_path / entry.name).read_bytes()
    (tmp_path / entry.name).write_bytes(data[:-3])
    with pytest.raises(CheckpointError, match=f"has {entry.bytes - 3} bytes, the manifest says "
                                              f"{entry.bytes}: the file is torn"):
        verify(tmp_path, entry)


def test_missing_file_is_refused(tmp_path: Path, entry: FileEntry) -> None:
    (tmp_path / entry.name).unlink()
    with pytest.raises(CheckpointError, match=r"a\.safetensors is missing; the manifest lists"):
        verify(tmp_path, entry)


def test_foreign_file_with_a_right_checksum_is_refused(tmp_path: Path) -> None:
    entry = write_json(tmp_path / "a.safetensors", {"not": "tensors" * 10})
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        read_tensors(tmp_path, entry)


def test_text_that_is_not_json_is_refused(tmp_path: Path) -> None:
    entry = write_bytes(tmp_path / "a.json", b"{")
    with pytest.raises(CheckpointError, match=r"a\.json cannot be read as JSON"):
        read_json(tmp_path, entry)
