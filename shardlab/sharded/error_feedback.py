"""Error feedback: what rounding took from a row's gradient is added to its next one.

Every rank keeps the rest of its own gradients, fp32 by row and column of the table. Rounding to the
nearest is then right in the long run: small elements of a row that a large one drowns add up until
they are sent. Source: 1-bit SGD (Seide et al. 2014), per row instead of per tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shardlab.sharded.layout import Layout


class ErrorFeedback:
    """The rests of this rank's gradients.

    Args:
        layout: the compiled plan; tables whose wire asks for it, exchanged as unique rows.
        device: where gradients are.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self._layout, self._device = layout, device
        self._slots = [(i, slot) for i, slot in enumerate(layout.slots)
                       if slot.feature < 0 and layout.wires[slot.table].error_feedback]
        self._rests: dict[int, Tensor] = {}

    @property
    def wanted(self) -> bool:
        """Whether any table has it."""
        return bool(self._slots)

    def forget(self) -> None:
        """Drops all rests."""
        self._rests.clear()

    def take(self, rows: Tensor, counts: Tensor) -> dict[int, Tensor]:
        """The rests of rows that are to be sent.

        Args:
            rows: int64, slot by slot, rows of the tables.
            counts: int64 [slots] on CPU.

        Returns:
            By slot, fp32 [count, columns].
        """
        parts = rows.split(counts.tolist())
        return {i: self._rest(slot.table)[parts[i], slot.shard.col_start:slot.shard.col_end]
                for i, slot in self._slots}

    def keep(self, rows: Tensor, counts: Tensor, rests: dict[int, Tensor]) -> None:
        """Replaces the rests of these rows; arguments as those and the result of `take`."""
        parts = rows.split(counts.tolist())
        for i, slot in self._slots:
            self._rest(slot.table)[parts[i], slot.shard.col_start:slot.shard.col_end] = rests[i]

    def _rest(self, table: int) -> Tensor:
        if table not in self._rests:
            config = self._layout.tables[table]
            self._rests[table] = torch.zeros(config.num_embeddings, config.embedding_dim,
                                             device=self._device)
        return self._rests[table]
