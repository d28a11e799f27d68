"""Numbers of hot rows: in a batch the hot ids of a table come first, the others behind them.

Row r of a table with K hot rows is number k where it is the k-th of these, else number K + r.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shardlab.ops.unique import Uniques
from shardlab.sharded.inputs import Batch
from shardlab.sharded.layout import Layout
from shardlab.specs import BoundsMode, ExchangeKind


class HotIds:
    """Renumbers ids of tables with hot rows, and back.

    Args:
        layout: the compiled plan.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._rows = {t: torch.tensor(rows) for t, rows in enumerate(layout.hot_rows) if rows}
        tables = layout.tables_of(ExchangeKind.ROWS)
        self._segments = [(segment, t) for segment, t in enumerate(tables) if t in self._rows]

    def renumbered(self, batch: Batch) -> Tensor:
        """int64 [n]: the batch's ids as numbers; ids outside their table stay outside.

        Args:
            batch: ids as rows of their tables.
        """
        if not self._rows:
            return batch.values
        values, edges = batch.values.long().clone(), batch.feature_starts.tolist()
        for t in self._rows:
            features = self._layout.features_of(t)
            part = values[edges[features[0]]:edges[features[-1] + 1]]
            part.copy_(self._number(part, t))
        return values

    def _number(self, ids: Tensor, table: int) -> Tensor:
        config, rows = self._layout.tables[table], self._rows[table].to(ids.device)
        if config.bounds is BoundsMode.CLAMP_TO_ZERO:
            ids = torch.where((ids < 0) | (ids >= config.num_embeddings), 0, ids)
        place = torch.searchsorted(rows, ids).clamp_(max=rows.numel() - 1)
        number = torch.where(rows[place] == ids, place, ids + rows.numel())
        # An id below the table must not become the number of a hot row.
        return torch.where(ids < 0, ids, number)

    def table_rows(self, uniques: Uniques) -> Tensor:
        """int64 [m]: the rows of their tables that unique numbers stand for.

        Args:
            uniques: of the ``rows`` tables, a segment each.
        """
        if not self._segments:
            return uniques.ids
        found = uniques.ids.clone()
        for segment, table in self._segments:
            first, end = uniques.splits[segment:segment + 2].tolist()
            part, rows = found[first:end], self._rows[table].to(found.device)
            hot = rows[part.clamp(max=rows.numel() - 1)]
            found[first:end] = torch.where(part < rows.numel(), hot, part - rows.numel())
        return found
