"""The cores of one shard in memory: slices are rows of blocks, which the row kernels step.

A shard holds the slices of the first core that its rows and columns need, and the whole of all
other cores. A slice is stepped as a row of a plain table is: its gradient summed, one exact step,
written back in the cores' dtype. "Row-wise" state is one number per slice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardlab.codecs import table_key
from shardlab.ops.blocks import Encoding
from shardlab.ops.codecs import decode_rows, encode_rows
from shardlab.ops.records import Records
from shardlab.ops.rounding import Rounding
from shardlab.ops.step_parameters import StepParameters
from shardlab.ops.tensor_train_batch import join_gradients
from shardlab.ops.tensor_train_types import CoreGradients, TensorTrain, Workspace
from shardlab.storage.base import LocalShard, StorageOptions
from shardlab.storage.levels import Clock
from shardlab.storage.tensor_train_init import lr_multiples
from shardlab.storage.tensor_train_memory import CoreKind, CoreMemory, CorePart
from shardlab.storage_bytes import OPTIMIZER_STATE
from shardlab.storage_specs import TensorTrainSpec
from shardlab.tensor_train_shapes import TensorTrainShape


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


def is_shared(local: LocalShard) -> bool:
    """Whether other ranks hold some of the shard's cores, too."""
    return not local.replicated and (
        (local.shard.rows, local.shard.columns)
        != (local.table.num_embeddings, local.table.embedding_dim))


def build_cores(shards: list[LocalShard], options: StorageOptions,
                clock: Clock) -> tuple[list[CoreArena], list[CoreMemory]]:
    """The cores of all shards, and the memories in which they lie.

    Raises:
        ConfigError: factors that do not fit a table.
    """
    pieces = [piece_of(local) for local in shards]
    kinds: dict[CoreKind, list[CorePart]] = {}
    for number, (local, piece) in enumerate(zip(shards, pieces, strict=True)):
        assert isinstance(local.storage, TensorTrainSpec)
        multiples = lr_multiples(local.storage, piece.whole, options.optimizer)
        for core, (before, slices, columns, after) in enumerate(piece.piece.core_shapes):
            kind = CoreKind(local.storage.dtype, multiples[core], is_shared(local))
            kinds.setdefault(kind, []).append(CorePart(
                (number, core), slices, before * columns * after,
                _encoding(local, piece, core, options.optimizer)))
    memories = [CoreMemory(kind, parts, options.device, clock) for kind, parts in kinds.items()]
    places = {owner: (memory, block) for memory in memories
              for block, owner in enumerate(memory.owners)}
    return [CoreArena(local, piece, [places[number, core]
                                     for core in range(len(piece.piece.row_factors))], clock)
            for number, (local, piece) in enumerate(zip(shards, pieces, strict=True))], memories


def _encoding(local: LocalShard, piece: PieceShape, core: int, optimizer: str) -> Encoding:
    assert isinstance(local.storage, TensorTrainSpec)
    per_column, per_row = OPTIMIZER_STATE[optimizer]
    first_slice, column = 0, 0
    if core == 0:
        first_slice, column = piece.first_slice, piece.first_column * piece.piece.ranks[1]
    return Encoding(codec=local.storage.dtype, state_codec="fp32", element_states=per_column,
                    row_states=per_row, row_start=first_slice, col_start=column,
                    table_key=table_key(f"{local.table.name}/core{core}"))


class CoreArena:
    """The cores of a shard and their optimiser state.

    Args:
        local: the shard.
        piece: where it lies among its table's cores.
        places: of every core, its memory and block.
        clock: for the random bits of rounding.
    """

    def __init__(self, local: LocalShard, piece: PieceShape,
                 places: list[tuple[CoreMemory, int]], clock: Clock) -> None:
        assert isinstance(local.storage, TensorTrainSpec)
        self.place, self._places, self._clock = piece, places, clock
        self.dtype = local.storage.dtype
        self.device = places[0][0].data.device
        self._train: TensorTrain | None = None
        if self.dtype == "fp32":
            self._train = self.train(Workspace())

    @property
    def shape(self) -> TensorTrainShape:
        """Of the shard."""
        return self.place.piece

    def train(self, workspace: Workspace) -> TensorTrain:
        """The cores as fp32: themselves, or decoded into the workspace."""
        if self._train is not None:
            return self._train
        return TensorTrain(self.shape, tuple(
            self.read_core(number, workspace) for number in range(len(self._places))))

    def size(self, number: int) -> tuple[int, int]:
        """(slices, elements of a slice) of a core."""
        memory, block = self._places[number]
        elements, slices = memory.blocks.table[block, 4:].tolist()
        return slices, elements

    def read_core(self, number: int, workspace: Workspace | None = None) -> Tensor:
        """fp32 [slices, elements] of a core; a view where cores are fp32."""
        memory, block = self._places[number]
        if self.dtype == "fp32":
            return memory.blocks.rows(memory.data, block)
        slices, elements = self.size(number)
        like = torch.empty(0, device=self.device)
        out = torch.empty(slices, elements, device=self.device) if workspace is None else \
            workspace.take(f"core{number}", slices * elements, like).view(slices, elements)
        decode_rows(memory.blocks.payloads(memory.data, block), self.dtype, out)
        return out

    def write_core(self, number: int, values: Tensor) -> None:
        """Encodes fp32 [slices, elements]."""
        memory, block = self._places[number]
        encoding = memory.blocks.encoding(block)
        rounding = Rounding(True, self._clock.key(0) ^ encoding.table_key, encoding.row_start,
                            encoding.col_start)
        encode_rows(values.to(self.device).contiguous(), self.dtype,
                    memory.blocks.payloads(memory.data, block), rounding)

    def read_state(self, number: int) -> Tensor:
        """fp32 [slices, state elements] of a core, a copy."""
        memory, block = self._places[number]
        if not int(memory.blocks.table[block, 3]):
            return torch.empty(self.size(number)[0], 0)
        if self.dtype == "fp32":
            return memory.blocks.state(memory.data, block).to("cpu", copy=True)
        return self._records(number).read_states().cpu()

    def write_state(self, number: int, state: Tensor) -> None:
        """Writes fp32 [slices, state elements]."""
        memory, block = self._places[number]
        if not int(memory.blocks.table[block, 3]):
            return
        if self.dtype == "fp32":
            memory.blocks.state(memory.data, block).copy_(state)
        else:
            self._records(number).write_states(state.to(self.device), None)

    def _records(self, number: int) -> Records:
        memory, block = self._places[number]
        places = torch.arange(self.size(number)[0], device=self.device)
        return Records(memory.data, memory.blocks, block, places)

    def step(self, grads: CoreGradients, step: StepParameters,
             first_squares: Tensor | None = None) -> None:
        """One optimiser step on slices of all cores, which the shard shares with other ranks.

        Args:
            grads: fp32 [slices, elements] of every core.
            step: gradients are scaled and clipped already.
            first_squares: fp32 [slices]: mean square of every slice's gradient of the first core,
                where the shard holds only a part of the slice.
        """
        for memory in dict.fromkeys(memory for memory, _ in self._places):
            pairs = [(grads.touched[0][:0], grads.grads[0].new_empty(0, elements))
                     for elements in memory.blocks.table[:, 4].tolist()]
            squares = [torch.empty(0, device=self.device) for _ in pairs]
            for core, (found, block) in enumerate(self._places):
                if found is memory:
                    pairs[block] = grads.touched[core], grads.grads[core]
                    squares[block] = grads.grads[core].new_full((len(pairs[block][0]),), -1.0)
                    if core == 0 and first_squares is not None:
                        squares[block] = first_squares
            memory.step(join_gradients(pairs, self.device), step,
                        None if first_squares is None else torch.cat(squares))
