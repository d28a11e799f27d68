"""Files of a checkpoint: written once with a checksum, flushed to the disk, verified on reading.

Tensor files are in the safetensors format (https://github.com/huggingface/safetensors): 8 bytes
of header length, a JSON header, the tensors' bytes. They are written here, straight from the
tensors' memory, because the library's ``save`` copies every tensor twice and is about ten times
slower, and read in one pass that also takes the checksum. Checksums are XXH3 (64 bits), which
costs a seventh of a CRC-32.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from shardlab.errors import CheckpointError

_BLOCK = 4 << 20  # bytes written, or read to verify a checksum, at a time
_ALIGN = 8  # the safetensors header is padded with spaces to this many bytes
_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}
#: dtype of every name in a safetensors header.
TENSOR_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


@dataclass(frozen=True)
class FileEntry:
    """What the manifest says of one file: its name, its bytes, and the XXH3 of them in hex."""

    name: str
    bytes: int
    xxh3: str


def tell_nobody(count: int) -> None:
    """For files whose progress nobody watches."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor],
                  told: Callable[[int], None] = tell_nobody) -> FileEntry:
    """Writes host tensors as a safetensors file, without copying contiguous ones.

    Args:
        path: of the file.
        tensors: on the CPU, by name.
        told: is told how many bytes more are written.

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
    return _write(path, [len(text).to_bytes(8, "little"), text, *parts], told)


def write_bytes(path: Path, data: bytes) -> FileEntry:
    """Writes a file and flushes it to the disk."""
    return _write(path, [data])


def write_json(path: Path, value: object) -> FileEntry:
    """Writes a JSON file."""
    return _write(path, [json.dumps(value, indent=1).encode()])


def _write(path: Path, parts: Iterable[bytes | memoryview],
           told: Callable[[int], None] = tell_nobody) -> FileEntry:
    hasher, size = xxhash.xxh3_64(), 0
    with open(path, "wb", buffering=0) as file:
        for part in parts:
            view = memoryview(part)
            hasher.update(view)
            size += len(view)
            while view:
                count = file.write(view[:_BLOCK])
                view = view[count:]
                told(count)
        os.fsync(file.fileno())
        told(1)
    return FileEntry(path.name, size, hasher.hexdigest())


def read_tensors(folder: Path, entry: FileEntry) -> dict[str, Tensor]:
    """Reads a safetensors file once, and judges its size and checksum before its content.

    Raises:
        CheckpointError: missing, truncated, corrupted or malformed; names the file.
    """
    data = _read_verified(folder, entry)
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        header: dict[str, Any] = json.loads(bytes(data[8:start]))
        return {name: _tensor_at(data, start, field) for name, field in header.items()
                if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{folder / entry.name} is not a safetensors file: "
                              f"{type(error).__name__}: {error}") from None


def _tensor_at(data: bytearray, start: int, field: Mapping[str, Any]) -> Tensor:
    first, last = field["data_offsets"]
    dtype, shape = TENSOR_DTYPES[field["dtype"]], field["shape"]
    if first == last:
        return torch.empty(shape, dtype=dtype)
    if (start + first) % dtype.itemsize:  # views want aligned offsets, foreign files may not
        data, start, last, first = data[start + first:start + last], 0, last - first, 0
    return torch.frombuffer(data, dtype=dtype, count=math.prod(shape),
                            offset=start + first).view(shape)


def read_json(folder: Path, entry: FileEntry) -> object:
    """Reads a JSON file after verifying its size and checksum.

    Raises:
        CheckpointError: missing, truncated, corrupted or malformed; names the file.
    """
    try:
        return json.loads(_read_verified(folder, entry))
    except ValueError as error:
        raise CheckpointError(f"{folder / entry.name} cannot be read as JSON: {error}") from None


def _read_verified(folder: Path, entry: FileEntry) -> bytearray:
    verify_size(folder, entry)
    data = bytearray(entry.bytes)
    with open(folder / entry.name, "rb", buffering=0) as file:
        view, at = memoryview(data), 0
        while at < len(data) and (count := file.readinto(view[at:])):
            at += count
        del view
    _judge(folder, entry, xxhash.xxh3_64(data).hexdigest())
    return data


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
    """Refuses a file whose size or checksum differs from the manifest's.

    Raises:
        CheckpointError: names the file and the reason.
    """
    verify_size(folder, entry)
    hasher = xxhash.xxh3_64()
    with open(folder / entry.name, "rb") as file:
        while block := file.read(_BLOCK):
            hasher.update(block)
    _judge(folder, entry, hasher.hexdigest())


def _judge(folder: Path, entry: FileEntry, found: str) -> None:
    if found != entry.xxh3:
        raise CheckpointError(f"{folder / entry.name} is corrupted: XXH3 {found}, the manifest "
                              f"says {entry.xxh3}; load another checkpoint")


def sync_folder(path: Path) -> None:
    """Flushes a folder's own entries (names, renames) to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
