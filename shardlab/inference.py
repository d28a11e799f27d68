"""Tables for serving on a CPU: plain torch operations over fp32, int8 or int4 rows.

    shardlab export runs/mine/checkpoints/step-9000 served --format safetensors --quantize int8

    tables = shardlab.inference.load("served")
    pooled = tables(*tables.split(kjt))        # {feature: [B, columns]}

A module without ShardLab's kernels: `torch.export` and `torch.compile` take it. Quantised rows are
asymmetric per row, as TorchRec's: value = code * scale + bias, with fp32 scale and bias.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shardlab.errors import CheckpointError, InputError
from shardlab.train.tensor_file import TENSOR_DTYPES

#: Written beside the tables by ``shardlab export``.
INDEX = "tables.json"
BITS = {"int8": 8, "int4": 4}
_NUMPY = {"F32": np.float32, "U8": np.uint8}


def quantize_rows(rows: NDArray[np.float32], bits: int) -> dict[str, NDArray[Any]]:
    """Codes, scale and bias of rows: a row's least value is code 0, its greatest the last code.

    Args:
        rows: fp32 [n, d].
        bits: 8, or 4 with two codes a byte, the lower half first.

    Returns:
        ``weight`` uint8 [n, d] or [n, ceil(d / 2)], ``scale`` and ``bias`` fp32 [n].
    """
    low = rows.min(1, initial=np.inf) if rows.shape[1] else np.zeros(len(rows), np.float32)
    span = rows.max(1, initial=-np.inf) - low if rows.shape[1] else low
    scale = (span / (2 ** bits - 1)).astype(np.float32)
    safe = np.where(scale > 0, scale, np.float32(1))
    codes = np.clip(np.rint((rows - low[:, None]) / safe[:, None]), 0, 2 ** bits - 1)
    codes = codes.astype(np.uint8)
    if bits == 4:
        padded = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
        codes = padded[:, ::2] | padded[:, 1::2] << 4
    return {"weight": codes, "scale": scale, "bias": low.astype(np.float32)}


class ServedTable(nn.Module):
    """One table, its rows pooled by bag.

    Args:
        weight: fp32 [rows, columns], or codes as `quantize_rows` gives them.
        columns: of the table.
        mean: pool by mean, else by sum.
        scale, bias: fp32 [rows], of codes.
        bits: of a code.
    """

    def __init__(self, weight: Tensor, columns: int, mean: bool, scale: Tensor | None = None,
                 bias: Tensor | None = None, bits: int = 32) -> None:
        super().__init__()
        self.columns, self.mean, self.bits = columns, mean, bits
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def rows(self, ids: Tensor) -> Tensor:
        """fp32 [n, columns] of ids int64 [n]."""
        picked: Tensor = self.weight[ids]
        if self.scale is None:
            return picked
        if self.bits == 4:
            halves = torch.stack([picked & 15, picked >> 4], dim=2)
            picked = halves.flatten(1)[:, :self.columns]
        return picked.float() * self.scale[ids, None] + self.bias[ids, None]

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Pooled bags.

        Args:
            ids: int64 [n].
            offsets: int64 [B + 1]; bag b holds the ids [offsets[b], offsets[b + 1]).

        Returns:
            fp32 [B, columns]; zeros for an empty bag.
        """
        at = torch.arange(ids.shape[0], device=ids.device)
        bag = torch.searchsorted(offsets, at, right=True) - 1
        pooled = torch.zeros(offsets.shape[0] - 1, self.columns, device=ids.device)
        pooled = pooled.index_add(0, bag, self.rows(ids))
        if self.mean:
            pooled = pooled / offsets.diff().clamp(min=1)[:, None]
        return pooled


class ServedTables(nn.Module):
    """All tables of an export.

    Args:
        tables: by name.
        features: table of every feature, in the order of the training model's columns.
    """

    def __init__(self, tables: dict[str, ServedTable], features: dict[str, str]) -> None:
        super().__init__()
        self._names = list(tables)
        self.tables = nn.ModuleList(tables.values())
        self.features = features

    def table(self, name: str) -> ServedTable:
        """A table by name."""
        found = self.tables[self._names.index(name)]
        assert isinstance(found, ServedTable)
        return found

    def split(self, features: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(ids, offsets) by feature, of a KeyedJaggedTensor.

        Raises:
            InputError: a feature is missing.
        """
        keys = list(features.keys())
        lengths = features.lengths().view(len(keys), -1)
        ends = features.lengths().view(len(keys), -1).sum(1).cumsum(0).tolist()
        ids, offsets = {}, {}
        for name in self.features:
            if name not in keys:
                raise InputError(f"feature {name!r} is missing; the batch has {keys}")
            at = keys.index(name)
            ids[name] = features.values()[ends[at] - int(lengths[at].sum()):ends[at]]
            offsets[name] = nn.functional.pad(lengths[at].cumsum(0), (1, 0))
        return ids, offsets

    def forward(self, ids: dict[str, Tensor], offsets: dict[str, Tensor]) -> dict[str, Tensor]:
        """Pooled bags [B, columns] of every feature."""
        return {feature: self.table(table)(ids[feature], offsets[feature])
                for feature, table in self.features.items()}


def load(folder: str | Path) -> ServedTables:
    """Reads what ``shardlab export --format safetensors`` wrote; files are mapped, not copied.

    Raises:
        CheckpointError: no export, or a table's file is missing or damaged.
    """
    folder = Path(folder)
    try:
        index = json.loads((folder / INDEX).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is not an export for inference: {error}; make one with "
                              "`shardlab export CKPT OUT --format safetensors`") from None
    tables, features = {}, {}
    for entry in index["tables"]:
        tensors = map_tensors(folder / entry["file"])
        tables[entry["name"]] = ServedTable(
            tensors["weight"], entry["columns"], entry["pooling"] == "mean", tensors.get("scale"),
            tensors.get("bias"), BITS.get(entry["dtype"], 32))
        features |= dict.fromkeys(entry["features"], entry["name"])
    return ServedTables(tables, features)


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, mapped copy-on-write.

    Raises:
        CheckpointError: missing, or not such a file.
    """
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        found = {}
        for name, field in header.items():
            first, last = field["data_offsets"]
            if first == last:
                found[name] = torch.empty(field["shape"], dtype=TENSOR_DTYPES[field["dtype"]])
                continue
            mapped = np.memmap(path, _NUMPY[field["dtype"]], "c", 8 + size + first,
                               tuple(field["shape"]))
            found[name] = torch.from_numpy(mapped)
        return found
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from None
