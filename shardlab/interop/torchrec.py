"""Makes a checkpoint of TorchRec's tables: a DCP folder, or state dicts that torch saved.

Tables are named ``<path>.embedding_bags.<table>.weight``, their optimiser state either
``<table>.momentum1`` (fused) or as torch.optim has it (``sum``, ``exp_avg``, ``exp_avg_sq``).
Everything else under the model is a dense parameter. What it holds of the dense optimiser, and
hyper-parameters, is left out: those come from the job that goes on.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shardlab.errors import CheckpointError
from shardlab.interop.dcp import INDEX, StoredTensor, read_file, read_index, read_parts
from shardlab.interop.whole import Rows, new_table, row_pieces
from shardlab.storage import TableChunk
from shardlab.train.manifest import ALL, MANIFEST, Manifest, TableEntry
from shardlab.train.table_files import NamedChunk, TableFiles
from shardlab.train.tensor_file import (
    FileEntry,
    sync_folder,
    write_bytes,
    write_json,
    write_tensors,
)

_TABLE = re.compile(r"(?P<path>(?:.*\.)?)embedding_bags\.(?P<table>[^.]+)\.weight"
                    r"(?:\.(?:(?P=table)\.)?(?P<field>\w+))?")
_PREFIX = re.compile(r"(?:model|module|state_dict|optim|optimizer|state|_dmp_wrapped_module)\.")
#: Our names of the fields of an optimiser with one moment, and with two.
_ONE = {"momentum1": "sum", "sum": "sum"}
_TWO = {"momentum1": "exp_avg", "momentum2": "exp_avg_sq", "exp_avg": "exp_avg",
        "exp_avg_sq": "exp_avg_sq"}
_KINDS = {(): "sgd", (("sum", 1),): "row_wise_adagrad", (("sum", 2),): "adagrad",
          (("exp_avg", 2), ("exp_avg_sq", 1)): "row_wise_adam",
          (("exp_avg", 2), ("exp_avg_sq", 2)): "adam"}

Source = StoredTensor | Tensor


@dataclass
class _Found:
    """What a source holds.

    Attributes:
        weights: by (path of the collection, table).
        moments: by the same, then by field.
        dense: by parameter.
    """

    weights: dict[tuple[str, str], Source] = field(default_factory=dict)
    moments: dict[tuple[str, str], dict[str, Source]] = field(default_factory=dict)
    dense: dict[str, Source] = field(default_factory=dict)


def import_torchrec(source: str | Path, out: str | Path,
                    optimizer: str | Path | None = None) -> Path:
    """Writes a checkpoint that `shardlab.load` takes; rows go through in bounded memory.

    Args:
        source: a DCP folder, or a state dict that ``torch.save`` wrote.
        out: the new checkpoint folder.
        optimizer: the optimiser's state dict, where it is a file of its own.

    Returns:
        ``out``.

    Raises:
        CheckpointError: no tables in it, an optimiser state that ShardLab does not have, a pickle
            of anything but tensors, or ``out`` exists.
    """
    source, out = Path(source), Path(out)
    if out.exists():
        raise CheckpointError(f"{out} exists; import to a new folder")
    tensors: dict[str, Source] = dict(read_index(source) if (source / INDEX).is_file()
                                      else read_file(source))
    if optimizer is not None:
        tensors |= {f"optimizer.{name}": value for name, value in read_file(optimizer).items()}
    found = _sort(tensors, source)
    staging = out.parent / f".tmp-{out.name}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        with tempfile.TemporaryDirectory(dir=staging) as scratch:
            manifest = _write(staging, Path(scratch), source, found)
        manifest.check_coverage()
        write_bytes(staging / MANIFEST, manifest.to_bytes())
        sync_folder(staging)
        staging.rename(out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return out


def _sort(tensors: dict[str, Source], source: Path) -> _Found:
    found = _Found()
    for name, tensor in tensors.items():
        bare = name
        while prefix := _PREFIX.match(bare):
            bare = bare[prefix.end():]
        match = _TABLE.fullmatch(bare)
        if match is None:
            if not name.startswith("optim"):
                found.dense[bare] = tensor
            continue
        key = (match["path"].removesuffix("."), match["table"])
        if match["field"] is None:
            found.weights[key] = tensor
        elif match["field"] != "step":
            found.moments.setdefault(key, {})[match["field"]] = tensor
    if not found.weights:
        raise CheckpointError(f"{source} holds no `embedding_bags.<table>.weight`; it has: "
                              f"{', '.join(sorted(tensors)[:10]) or 'no tensors'}")
    return found


def _write(staging: Path, scratch: Path, source: Path, found: _Found) -> Manifest:
    written, tables, kinds = TableFiles(staging, 0), [], set()
    for number, (key, tensor) in enumerate(sorted(found.weights.items())):
        rows, columns = tensor.shape
        tables.append(TableEntry(key[0], key[1], rows, columns, features=(key[1],)))
        weights = new_table(scratch / f"{number}", rows, columns)
        _lay_out(source, tensor, weights)
        fields = found.moments.get(key, {})
        names = _TWO if len(fields) > 1 else _ONE
        state = {}
        for name, moment in fields.items():
            if name not in names:
                raise CheckpointError(f"{source}: table {key[1]!r} has optimiser state {name!r}; "
                                      f"ShardLab knows {', '.join(sorted({*_ONE, *_TWO}))}")
            state[names[name]] = _moment(source, moment, columns, scratch / f"{number}-{name}")
        kinds.add(_kind(source, key[1], state))
        written.write(_chunks(key, weights, state))
        for path in scratch.iterdir():
            path.unlink()
    if len(kinds) > 1:
        raise CheckpointError(f"{source}: tables were trained by different optimisers: "
                              f"{', '.join(sorted(kinds))}; ShardLab has one for all tables")
    dense = {name: _whole(source, tensor) for name, tensor in found.dense.items()}
    files: list[FileEntry] = [*written.files,
                              write_tensors(staging / "dense.safetensors", dense)]
    for name, tree in (("shared", {"optimizer": None, "extra": {}}),
                       ("rank-00000", {"rng": None, "buffers": {}})):
        files += [write_json(staging / f"{name}.json", tree),
                  write_tensors(staging / f"{name}.safetensors", {})]
    return Manifest(1, tuple(tables), tuple(files), tuple(written.chunks), kinds.pop())


def _moment(source: Path, tensor: Source, columns: int, path: Path) -> Rows:
    """fp32 [rows, columns], or [rows, 1] of a row's state: the mean of its column shards'."""
    rows, wide = tensor.shape[0], tensor.shape[1] if len(tensor.shape) == 2 else 1
    out = new_table(path, rows, wide)
    _lay_out(source, tensor, out)
    if wide not in (1, columns):
        out = np.ascontiguousarray(out.mean(1, keepdims=True))
    return out


def _kind(source: Path, table: str, state: dict[str, Rows]) -> str:
    shape = tuple((name, 1 if array.shape[1] == 1 else 2) for name, array in sorted(state.items()))
    if shape not in _KINDS:
        raise CheckpointError(f"{source}: table {table!r} has optimiser state "
                              f"{sorted(state)} of shapes {[a.shape for a in state.values()]}, "
                              "which no optimiser of ShardLab has")
    return _KINDS[shape]


def _chunks(key: tuple[str, str], weights: Rows, state: dict[str, Rows]) -> Iterator[NamedChunk]:
    for first, piece in row_pieces(weights):
        part = slice(first, first + len(piece))
        fields = {name: torch.from_numpy(np.array(array[part] if array.shape[1] > 1
                                                  else array[part, 0]))
                  for name, array in state.items()}
        yield NamedChunk(key[0], TableChunk(key[1], first, 0, torch.from_numpy(np.array(piece)),
                                            fields), ALL)


def _lay_out(source: Path, tensor: Source, out: Rows) -> None:
    for offsets, part in _parts(source, tensor):
        values = part.detach().float().numpy().reshape(part.shape[0], -1)
        left = offsets[1] if len(offsets) > 1 else 0
        out[offsets[0]:offsets[0] + len(values), left:left + values.shape[1]] = values


def _whole(source: Path, tensor: Source) -> Tensor:
    if isinstance(tensor, Tensor):
        return tensor.detach()
    out: Tensor | None = None
    for offsets, part in _parts(source, tensor):
        if out is None:
            out = torch.empty(tensor.shape, dtype=part.dtype)
        out[tuple(slice(at, at + size)
                  for at, size in zip(offsets, part.shape, strict=True))] = part
    assert out is not None
    return out


def _parts(source: Path, tensor: Source) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    if isinstance(tensor, Tensor):
        yield (0,) * tensor.dim(), tensor
    else:
        yield from read_parts(source, tensor)
