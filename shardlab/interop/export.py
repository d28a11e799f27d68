"""Writes a checkpoint's tables in formats that others read; memory stays bounded by pieces.

Every format gets a folder of its own:

    torch         tables.pt: state dict ``<table>.weight``, for a ModuleDict of nn.EmbeddingBag
    torchrec      model.pt: ``<path>.embedding_bags.<table>.weight`` and the dense parameters;
                  optimizer.pt: ``<table>.momentum1`` and so on
    parquet       <table>.parquet: columns ``id`` and ``embedding``
    npy           <table>.npy
    safetensors   <table>.safetensors, dense.safetensors, tables.json: for `shardlab.inference`
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardlab.errors import CheckpointError
from shardlab.inference import BITS, INDEX, quantize_rows
from shardlab.interop.whole import Rows, chosen_tables, lay_out, new_table, pieces, row_pieces
from shardlab.train.checkpoint_reader import CheckpointReader
from shardlab.train.manifest import TableEntry
from shardlab.train.tensor_file import write_tensors

_ALIGN = 8
#: TorchRec's names of a row optimiser's state.
_MOMENTS = {"sum": "momentum1", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


@dataclass(frozen=True)
class _Export:
    """What an export works on.

    Attributes:
        scratch: folder for whole tables while they are written.
        bits: of quantised rows; None: fp32.
    """

    reader: CheckpointReader
    tables: list[TableEntry]
    out: Path
    scratch: Path
    quantize: str | None

    def whole(self, table: TableEntry) -> Rows:
        """A table's weights, in a file that is mapped."""
        rows = new_table(self.scratch / f"{table.name}.f32", table.rows, table.columns)
        lay_out(self.reader, table, rows)
        return rows

    def arrays(self, table: TableEntry) -> dict[str, NDArray[Any]]:
        """What is written of a table: fp32 weights, or codes, scale and bias."""
        rows = self.whole(table)
        if self.quantize is None:
            return {"weight": rows}
        parts = {name: np.memmap(self.scratch / f"{table.name}.{name}", like.dtype, "w+",
                                 shape=(table.rows, *like.shape[1:]))
                 for name, like in quantize_rows(rows[:1], BITS[self.quantize]).items()}
        for first, piece in row_pieces(rows):
            for name, value in quantize_rows(piece, BITS[self.quantize]).items():
                parts[name][first:first + len(piece)] = value
        return dict(parts)


def export(path: str | Path, out: str | Path, format: str, tables: tuple[str, ...] = (),
           quantize: str | None = None) -> list[Path]:
    """Writes a checkpoint's tables in another format.

    Args:
        path: the checkpoint, full or incremental.
        out: a new folder.
        format: a key of `FORMATS`.
        tables: names; none: all.
        quantize: ``int8`` or ``int4`` rows; not for parquet and torchrec.

    Returns:
        The files.

    Raises:
        CheckpointError: an unknown format or table, ``out`` exists, or a file is damaged.
    """
    if format not in FORMATS:
        raise CheckpointError(f"no export format {format!r}; known: {', '.join(FORMATS)}")
    if quantize is not None and (quantize not in BITS or format in ("parquet", "torchrec")):
        raise CheckpointError(f"--quantize {quantize} with {format}: quantised rows are int8 or "
                              "int4, in the formats torch, npy and safetensors")
    out = Path(out)
    if out.exists():
        raise CheckpointError(f"{out} exists; export to a new folder")
    reader = CheckpointReader(path)
    chosen = chosen_tables(reader, tables)
    staging = out.parent / f".tmp-{out.name}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        with tempfile.TemporaryDirectory(dir=staging) as scratch:
            FORMATS[format](_Export(reader, chosen, staging, Path(scratch), quantize))
        staging.rename(out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return sorted(out.iterdir())


def _torch(job: _Export) -> None:
    state = {f"{table.name}.{name}": _tensor(array) for table in job.tables
             for name, array in job.arrays(table).items()}
    torch.save(state, job.out / "tables.pt")


def _torchrec(job: _Export) -> None:
    model: dict[str, Tensor] = dict(job.reader.dense())
    moments: dict[str, dict[str, Tensor]] = {}
    for table in job.tables:
        prefix = f"{table.collection}." if table.collection else ""
        name = f"{prefix}embedding_bags.{table.name}.weight"
        model[name] = _tensor(job.whole(table))
        moments[name] = {f"{table.name}.{_MOMENTS[field]}": value
                         for field, value in _row_states(job, table).items()}
    torch.save(model, job.out / "model.pt")
    torch.save({"state": moments, "param_groups": []}, job.out / "optimizer.pt")


def _row_states(job: _Export, table: TableEntry) -> dict[str, Tensor]:
    """Optimiser state of a whole table: [rows, columns] by element, [rows] by row.

    Columns that were cut kept a per-row state each; a row's is their mean, weighted by columns.
    """
    found: dict[str, Rows] = {}
    for chunk in pieces(job.reader, table):
        for field, value in chunk.state.items():
            wide = table.columns if value.dim() == 2 else 1
            if field not in found:
                found[field] = new_table(job.scratch / f"{table.name}.{field}", table.rows, wide)
            rows = slice(chunk.row_start, chunk.row_start + len(value))
            columns = chunk.weights.shape[1]
            if value.dim() == 2:
                found[field][rows, chunk.col_start:chunk.col_start + columns] = value.numpy()
            else:
                found[field][rows, 0] += value.numpy() * np.float32(columns / table.columns)
    by_row = {field for chunk in pieces(job.reader, table, slice(0, 1))
              for field, value in chunk.state.items() if value.dim() == 1}
    return {field: _tensor(array[:, 0] if field in by_row else array)
            for field, array in found.items()}


def _parquet(job: _Export) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for table in job.tables:
        kind = pa.list_(pa.float32(), table.columns)
        schema = pa.schema([("id", pa.int64()), ("embedding", kind)])
        with pq.ParquetWriter(job.out / f"{table.name}.parquet", schema) as writer:
            for first, rows in row_pieces(job.whole(table)):
                flat = pa.array(np.asarray(rows).reshape(-1))
                writer.write_table(pa.table([
                    pa.array(np.arange(first, first + len(rows))),
                    pa.FixedSizeListArray.from_arrays(flat, table.columns)], schema=schema))


def _npy(job: _Export) -> None:
    for table in job.tables:
        if job.quantize is None:
            out = np.lib.format.open_memmap(
                job.out / f"{table.name}.npy", "w+", np.float32, (table.rows, table.columns))
            lay_out(job.reader, table, out)
            out.flush()
            continue
        for name, array in job.arrays(table).items():
            suffix = "" if name == "weight" else f".{name}"
            np.save(job.out / f"{table.name}{suffix}.npy", array)


def _safetensors(job: _Export) -> None:
    index = []
    for table in job.tables:
        file = f"{table.name}.safetensors"
        _write_arrays(job.out / file, job.arrays(table))
        index.append({"name": table.name, "file": file, "rows": table.rows,
                      "columns": table.columns, "pooling": table.pooling,
                      "features": list(table.features), "dtype": job.quantize or "fp32"})
    write_tensors(job.out / "dense.safetensors", job.reader.dense())
    (job.out / INDEX).write_text(json.dumps({"tables": index}, indent=1))


def _write_arrays(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """A safetensors file whose data comes from mapped files, a piece at a time."""
    header, end = {}, 0
    for name, array in arrays.items():
        dtype = "F32" if array.dtype == np.float32 else "U8"
        header[name] = {"dtype": dtype, "shape": [*array.shape],
                        "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGN)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            for _, piece in row_pieces(array.reshape(len(array), -1)):
                file.write(np.ascontiguousarray(piece).data)


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


#: Writers by name.
FORMATS: dict[str, Callable[[_Export], None]] = {
    "torch": _torch, "torchrec": _torchrec, "parquet": _parquet, "npy": _npy,
    "safetensors": _safetensors}
