"""Files of a checkpoint: written once with a checksum, flushed to the disk, verified on reading.

Tensor files are in the safetensors format (https://github.com/huggingface/safetensors): 8 bytes
of header length, a JSON header, the tensors' bytes. They are written here, straight from the
tensors' memory, because the library's ``save`` copies every tensor twice and is about ten times
slower; they are read with the library.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from shardlab.errors import CheckpointError

_BLOCK = 4 << 20  # bytes read at a time to verify a checksum
_ALIGN = 8  # the safetensors header is padded with spaces to this many bytes
_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}


@dataclass(frozen=True)
class FileEntry:
    """What the manifest says of one file: its name, its bytes, and the CRC-32 of them."""

    name: str
    bytes: int
    crc32: int


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileEntry:
    """Writes host tensors as a safetensors file, without copying contiguous ones.

    Raises:
        CheckpointError: a dtype that the format does not have.
        OSError: the disk is full or not writable.
    """
    header, views, end = {}, [], 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPE_NAMES:
            raise CheckpointError(f"{path.name}: tensor {name!r} has dtype {tensor.dtype}, which "
                                  "safetensors files do not hold")
        # as_strided, because a contiguous tensor of one element may carry any stride
        view = tensor.detach().contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": [*tensor.shape],
                        "data_offsets": [end, end + view.numel()]}
        end += view.numel()
        views.append(view)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGN)
    parts = (memoryview(view.numpy()) for view in views)
    return _write(path, [len(text).to_bytes(8, "little"), text, *parts])


def write_json(path: Path, value: object) -> FileEntry:
    """Writes a JSON file."""
    return _write(path, [json.dumps(value, indent=1).encode()])


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> FileEntry:
    crc = size = 0
    with open(path, "wb") as file:
        for part in parts:
            file.write(part)
            crc = zlib.crc32(part, crc)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(path.name, size, crc)


def read_tensors(folder: Path, entry: FileEntry) -> dict[str, Tensor]:
    """Reads a safetensors file after verifying its size and checksum.

    Raises:
        CheckpointError: missing, truncated, corrupted or malformed; names the file.
    """
    verify(folder, entry)
    try:
        return load_file(folder / entry.name)
    except SafetensorError as error:
        raise CheckpointError(f"{folder / entry.name} is not a safetensors file: {error}") from None


def read_json(folder: Path, entry: FileEntry) -> object:
    """Reads a JSON file after verifying its size and checksum.

    Raises:
        CheckpointError: missing, truncated, corrupted or malformed; names the file.
    """
    verify(folder, entry)
    return parse_json(folder / entry.name)


def parse_json(path: Path) -> object:
    """Reads a JSON file whose checksum is not known (the manifest itself).

    Raises:
        CheckpointError: missing, unreadable or not JSON; names the file.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None


def verify_size(folder: Path, entry: FileEntry) -> None:
    """Refuses a file that is missing or has another size than the manifest says.

    Raises:
        CheckpointError: names the file and both sizes.
    """
    path = folder / entry.name
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the manifest lists it with {entry.bytes} "
                              "bytes") from None
    if found != entry.bytes:
        raise CheckpointError(f"{path} has {found} bytes, the manifest says {entry.bytes}: "
                              "the file is torn; load another checkpoint")


def verify(folder: Path, entry: FileEntry) -> None:
    """Refuses a file whose size or CRC-32 differs from the manifest's.

    Raises:
        CheckpointError: names the file and the reason.
    """
    verify_size(folder, entry)
    crc = 0
    with open(folder / entry.name, "rb") as file:
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    if crc != entry.crc32:
        raise CheckpointError(f"{folder / entry.name} is corrupted: CRC-32 {crc:08x}, the manifest "
                              f"says {entry.crc32:08x}; load another checkpoint")


def sync_folder(path: Path) -> None:
    """Flushes a folder's own entries (names, renames) to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
