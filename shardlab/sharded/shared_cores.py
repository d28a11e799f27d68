"""Gradients of what the ranks of a table share: cores of tensor trains, chunks of pruned tables.

A rectangle of such a table is a part of its first core and all of the others. Every owner knows the
gradients that its rows and columns give to the shared cores; their sum, over all tables in one
all-reduce, is what all owners step by, so that the copies stay equal. Tables cut by columns add the
squares of the first core's slices, for row-wise rules. Row blocks of a pruned table with
``absent: shared`` do the same for the row that their absent chunks share.

Bytes per step: the parameters of the shared cores, once around (a table of 10 million rows at rank
32 has 480,000, 1.9 MB); the columns of a pruned table, and a count of every chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from shardlab.comm import Groups, all_reduce_
from shardlab.ops.step_parameters import StepParameters
from shardlab.sharded.layout import Layout
from shardlab.storage_specs import PrunedSpec, TensorTrainSpec
from shardlab.table_plan import TablePlan


@runtime_checkable
class SharesCores(Protocol):
    """A storage whose shards may share cores, or chunks, with other ranks."""

    def shared_gradients(self, block: int, out: Tensor) -> bool:
        """Adds what a shard knows; whether ids touched it."""

    def step_shared(self, block: int, shared: Tensor, step: StepParameters) -> None:
        """Steps a shard by the sum over ranks."""


@dataclass(frozen=True)
class _Span:
    """A table's part of the buffer: a flag whether ids touched it, then gradients."""

    first: int
    size: int


class SharedCores:
    """Sums gradients of shared cores and chunks over the ranks.

    Args:
        layout: the compiled plan.
        groups: the ranks.
    """

    def __init__(self, layout: Layout, groups: Groups) -> None:
        self._layout, self._groups = layout, groups
        self._spans: dict[str, _Span] = {}
        self._size = 0
        for plan in layout.plans:
            size = _shared_elements(plan, layout)
            if size:
                self._spans[plan.table] = _Span(self._size + 1, size)
                self._size += 1 + size

    @property
    def needed(self) -> bool:
        """Whether any table's cores are shared."""
        return self._size > 0

    def step(self, storage: SharesCores, step: StepParameters) -> None:
        """One step on all shared tables; every rank must call it.

        Args:
            storage: this rank's shards, after its own `update`.
            step: hyper-parameters.
        """
        buffer = torch.zeros(self._size, device=self._groups.device)
        blocks = [(block, self._spans[local.table.name])
                  for block, local in enumerate(self._layout.local_shards)
                  if local.table.name in self._spans]
        for block, span in blocks:
            # Two shards of one table on a rank are two terms of the sum.
            part = torch.zeros(span.size, device=buffer.device)
            if storage.shared_gradients(block, part):
                buffer[span.first - 1] += 1
                buffer[span.first:span.first + span.size] += part
        all_reduce_(buffer, self._groups)
        for block, span in blocks:
            if float(buffer[span.first - 1]):
                storage.step_shared(block, buffer[span.first:span.first + span.size], step)


def _shared_elements(plan: TablePlan, layout: Layout) -> int:
    """Numbers that the ranks of a table exchange; 0 where each holds all of it."""
    if plan.replicated or len(plan.shards) == 1:
        return 0
    table = next(table for table in layout.tables if table.name == plan.table)
    if isinstance(plan.storage, PrunedSpec) and plan.storage.shares_absent \
            and any(shard.rows < table.num_embeddings for shard in plan.shards):
        return table.embedding_dim + table.embedding_dim // plan.storage.width
    if not isinstance(plan.storage, TensorTrainSpec):
        return 0
    shape = plan.storage.resolve(table.num_embeddings, table.embedding_dim).piece_shape(
        table.num_embeddings, table.embedding_dim)
    cores = shape.core_shapes
    size = sum(before * slices * columns * after for before, slices, columns, after in cores[1:])
    cut = any(shard.columns < table.embedding_dim for shard in plan.shards)
    return size + (shape.row_factors[0] if cut else 0)
