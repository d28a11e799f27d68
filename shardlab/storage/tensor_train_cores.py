"""The cores of one shard in memory: slices are rows of blocks, which the row kernels step.

A shard holds the slices of the first core that its rows and columns need, and the whole of all
other cores. A slice is stepped as a row of a plain table is: its gradient summed, one exact step,
written back in the cores' dtype. "Row-wise" state is one number per slice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from shardlab.codecs import table_key
from shardlab.ops.blocks import Blocks, Encoding
from shardlab.ops.codecs import Rounding, decode_rows, encode_rows
from shardlab.ops.records import Records
from shardlab.ops.rows import StepParameters, update_rows
from shardlab.ops.tensor_train import CoreGradients, TensorTrain, Workspace
from shardlab.ops.unique import Uniques, fill_affine
from shardlab.storage.base import LocalShard
from shardlab.storage.levels import Clock
from shardlab.storage_bytes import OPTIMIZER_STATE, payload_bytes
from shardlab.storage_specs import TensorTrainSpec
from shardlab.tensor_train_shapes import TensorTrainShape
from shardlab.tiers import allocate

_FP32_BYTES = 4


@dataclass(frozen=True)
class PieceShape:
    """Where a shard lies among the cores of its table.

    Attributes:
        whole: shape of the table.
        piece: shape of the shard.
        first_slice: of the table's first core.
        first_column: of the table's first core.
    """

    whole: TensorTrainShape
    piece: TensorTrainShape
    first_slice: int
    first_column: int

    def area(self, number: int) -> tuple[range, range]:
        """Slices and columns of a core that the shard holds."""
        slices, columns = self.piece.row_factors[number], self.piece.column_factors[number]
        if number:
            return range(slices), range(columns)
        return (range(self.first_slice, self.first_slice + slices),
                range(self.first_column, self.first_column + columns))


def piece_of(local: LocalShard) -> PieceShape:
    """Where a shard lies, by its table's storage.

    Raises:
        ConfigError: factors that do not fit the table.
    """
    assert isinstance(local.storage, TensorTrainSpec)
    rows, columns = local.table.num_embeddings, local.table.embedding_dim
    spec = local.storage.resolve(rows, columns)
    whole, shard = spec.piece_shape(rows, columns), local.shard
    return PieceShape(whole, spec.piece_shape(shard.rows, shard.columns),
                      shard.row_start // whole.row_unit, shard.col_start // whole.column_unit)


class CoreArena:
    """The cores of a shard and their optimiser state.

    Args:
        local: the shard.
        optimizer: kind of row optimiser.
        device: where the cores lie.
        clock: for the random bits of rounding.
    """

    def __init__(self, local: LocalShard, optimizer: str, device: torch.device,
                 clock: Clock) -> None:
        assert isinstance(local.storage, TensorTrainSpec)
        self.place, self.clock, self._optimizer = piece_of(local), clock, optimizer
        self.dtype, self._name = local.storage.dtype, local.table.name
        per_column, per_row = OPTIMIZER_STATE[optimizer]
        table, offset = torch.zeros(len(self.shape.row_factors), 6, dtype=torch.int64), 0
        for number, (before, slices, columns, after) in enumerate(self.shape.core_shapes):
            elements = before * columns * after
            size = payload_bytes(self.dtype, elements)
            state = _FP32_BYTES * (per_column * elements + per_row)
            table[number] = torch.tensor([offset, size, 0, state, elements, slices])
            offset += slices * size
        offset = -(-offset // _FP32_BYTES) * _FP32_BYTES if table[:, 3].any() else offset
        for number in range(len(table)):
            table[number, 2] = offset
            offset += int(table[number, 3] * table[number, 5])
        self.data = allocate(offset, device)
        self.blocks = Blocks(table) if self.dtype == "fp32" else \
            Blocks.build(table, [self._encoding(number) for number in range(len(table))])
        self._train: TensorTrain | None = None
        if self.dtype == "fp32":
            self._train = self.train(Workspace())

    def _encoding(self, number: int) -> Encoding:
        per_column, per_row = OPTIMIZER_STATE[self._optimizer]
        first_slice, column = 0, 0
        if number == 0:
            first_slice = self.place.first_slice
            column = self.place.first_column * self.shape.ranks[1]
        return Encoding(codec=self.dtype, state_codec="fp32", element_states=per_column,
                        row_states=per_row, row_start=first_slice, col_start=column,
                        table_key=table_key(f"{self._name}/core{number}"))

    @property
    def shape(self) -> TensorTrainShape:
        """Of the shard."""
        return self.place.piece

    def train(self, workspace: Workspace) -> TensorTrain:
        """The cores as fp32: themselves, or decoded into the workspace."""
        if self._train is not None:
            return self._train
        return TensorTrain(self.shape, tuple(
            self.read_core(number, workspace) for number in range(len(self.blocks.table))))

    def read_core(self, number: int, workspace: Workspace | None = None) -> Tensor:
        """fp32 [slices, elements] of a core; a view where cores are fp32."""
        if self.dtype == "fp32":
            return self.blocks.rows(self.data, number)
        _, _, _, _, elements, slices = self.blocks.table[number].tolist()
        like = torch.empty(0, device=self.data.device)
        out = torch.empty(slices, elements, device=self.data.device) if workspace is None else \
            workspace.take(f"core{number}", slices * elements, like).view(slices, elements)
        decode_rows(self.blocks.payloads(self.data, number), self.dtype, out)
        return out

    def write_core(self, number: int, values: Tensor) -> None:
        """Encodes fp32 [slices, elements]."""
        encoding = self.blocks.encoding(number)
        rounding = Rounding(True, self.clock.key(0) ^ encoding.table_key, encoding.row_start,
                            encoding.col_start)
        encode_rows(values.to(self.data.device).contiguous(), self.dtype,
                    self.blocks.payloads(self.data, number), rounding)

    def read_state(self, number: int) -> Tensor:
        """fp32 [slices, state elements] of a core, a copy."""
        slices = int(self.blocks.table[number, 5])
        if not int(self.blocks.table[number, 3]):
            return torch.empty(slices, 0)
        if self.dtype == "fp32":
            return self.blocks.state(self.data, number).to("cpu", copy=True)
        return self._records(number).read_states().cpu()

    def write_state(self, number: int, state: Tensor) -> None:
        """Writes fp32 [slices, state elements]."""
        if not int(self.blocks.table[number, 3]):
            return
        if self.dtype == "fp32":
            self.blocks.state(self.data, number).copy_(state)
        else:
            self._records(number).write_states(state.to(self.data.device), None)

    def _records(self, number: int) -> Records:
        places = torch.arange(int(self.blocks.table[number, 5]), device=self.data.device)
        return Records(self.data, self.blocks, number, places)

    def step(self, grads: CoreGradients, step: StepParameters, cores: range,
             row_squares: dict[int, Tensor] | None = None) -> None:
        """One optimiser step on slices of some cores.

        Args:
            grads: of those cores; fp32 [slices, elements] each.
            step: gradients are scaled and clipped already.
            cores: numbers of the cores that ``grads`` lists.
            row_squares: by core, fp32 [slices]: mean square of every slice's gradient, where the
                shard holds only a part of the slice.
        """
        edges = [0] * (len(self.blocks.table) + 1)
        for number, touched in zip(cores, grads.touched, strict=True):
            edges[number + 1] = touched.numel()
        splits = torch.tensor(edges).cumsum(0)
        flat, sources = _joined(grads)
        ids = torch.cat(grads.touched)
        squares = None
        if row_squares is not None:
            squares = torch.cat([
                row_squares.get(number, torch.full_like(touched, -1, dtype=torch.float32))
                for number, touched in zip(cores, grads.touched, strict=True)])
        uniques = Uniques(ids, splits, torch.arange(ids.numel() + 1, device=ids.device), sources)
        update_rows(self.data, self.blocks, uniques, None, flat,
                    replace(step, scale=1.0, clip_value=0.0, key=self.clock.key(0), rows=None),
                    squares)

    def all_slices(self, grads: CoreGradients) -> CoreGradients:
        """The same with zeros for the slices that got no gradient: rules that move every slice."""
        touched, full = [], []
        for core, (where, values) in enumerate(zip(grads.touched, grads.grads, strict=True)):
            slices, elements = int(self.blocks.table[core, 5]), int(self.blocks.table[core, 4])
            dense = torch.zeros(slices, elements, device=values.device)
            dense[where] = values
            touched.append(torch.arange(slices, device=values.device))
            full.append(dense)
        return CoreGradients(tuple(touched), tuple(full))


def _joined(grads: CoreGradients) -> tuple[Tensor, Tensor]:
    """All gradients in one buffer, and where every slice's begins."""
    if grads.flat is None:
        parts = [values for values in grads.grads if values.numel()]
        flat = torch.cat([part.reshape(-1) for part in parts]) if parts else torch.empty(0)
        starts = list(accumulate((values.numel() for values in grads.grads), initial=0))
    else:
        flat, starts = grads.flat
    pieces, at = [], 0
    for values, first in zip(grads.grads, starts, strict=False):
        pieces.append([at, values.shape[0], first, values.shape[1]])
        at += values.shape[0]
    return flat, fill_affine(torch.tensor(pieces), at, flat.device)
