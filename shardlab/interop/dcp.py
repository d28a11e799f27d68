"""Reads tensors that torch wrote, in a file or a DCP folder, without running what they may carry.

The index of a folder, ``.metadata``, is a pickle. It is read by an unpickler that knows the handful
of plain classes such an index is made of and refuses every other name; the tensors themselves are
read with ``torch.load(..., weights_only=True)``.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardlab.errors import CheckpointError

INDEX = ".metadata"
_METADATA = "torch.distributed.checkpoint.metadata"
_CLASSES = {
    _METADATA: {"Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties",
                "ChunkStorageMetadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
}


class _IndexUnpickler(pickle.Unpickler):
    """Makes the classes of an index, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        known = name in _CLASSES.get(module, ())
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            known = True
        if not known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no index needs")
        return super().find_class(module, name)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the folder, in one or more rectangles.

    Attributes:
        shape: of the whole tensor.
        parts: (file, first byte, bytes, offsets in the tensor).
    """

    shape: tuple[int, ...]
    parts: list[tuple[str, int, int, tuple[int, ...]]]


def read_index(folder: Path) -> dict[str, StoredTensor]:
    """Tensors by name; what is not a tensor is left out.

    Raises:
        CheckpointError: no such index, or one that asks for anything but an index's classes.
    """
    path = folder / INDEX
    try:
        with open(path, "rb") as file:
            index = _IndexUnpickler(file).load()
        found = {name: StoredTensor(tuple(entry.size), [])
                 for name, entry in index.state_dict_metadata.items() if hasattr(entry, "size")}
        for place, info in index.storage_data.items():
            if place.fqn in found:
                offsets = tuple(place.offset or (0,) * len(found[place.fqn].shape))
                found[place.fqn].parts.append((info.relative_path, info.offset, info.length,
                                               offsets))
    except (OSError, pickle.UnpicklingError, AttributeError, EOFError, TypeError) as error:
        raise CheckpointError(f"{path} is not the index of a torch.distributed.checkpoint: "
                              f"{error}") from None
    return found


def read_parts(folder: Path, tensor: StoredTensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """(offsets, rectangle) of a tensor, one at a time.

    Raises:
        CheckpointError: a file is missing or damaged; names it.
    """
    for file, first, size, offsets in tensor.parts:
        path = folder / file
        try:
            with open(path, "rb") as data:
                data.seek(first)
                part = torch.load(io.BytesIO(data.read(size)), "cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{path}: no tensor at byte {first}: {error}") from None
        if not isinstance(part, Tensor):
            raise CheckpointError(f"{path}: a {type(part).__name__} at byte {first}, not a tensor")
        yield offsets, part


def read_file(path: str | Path) -> dict[str, Tensor]:
    """Tensors by dotted name of a state dict that torch.save wrote; they stay in the file.

    Raises:
        CheckpointError: not such a file, or it holds more than tensors and plain values.
    """
    try:
        state = torch.load(path, "cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} is neither a DCP folder nor a file of tensors: {reason}; "
                              "ShardedTensors are saved with torch.distributed.checkpoint"
                              ) from None
    return dict(_flatten(state, ""))


def _flatten(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _flatten(item, f"{name}.{key}" if name else str(key))
