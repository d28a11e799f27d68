"""From a batch to ids per slot: de-duplicate (``rows``) or route bags (``pooled``), then pack."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardlab.ops.cells import route_slots
from shardlab.ops.id_bytes import pack_bytes
from shardlab.ops.route import RoutedBags, RouteTables, route_bags
from shardlab.ops.unique import (
    BOUNDS_CODE,
    OutOfBoundsError,
    Segments,
    Uniques,
    pack_ids,
    split_sorted,
    unique_segments,
)
from shardlab.sharded.hot_ids import HotIds
from shardlab.sharded.inputs import Batch, InputReader, PerShape
from shardlab.sharded.layout import Layout, column
from shardlab.specs import BoundsMode, ExchangeKind


@dataclass(frozen=True)
class Outgoing:
    """What this rank asks of every slot.

    Attributes:
        batch: where the ids come from.
        ids: uint8, slot by slot, in the fewest bytes that hold a shard's rows, which count from its
            first; in a world of one int64 [sum of counts].
        counts: int64 [slots] on CPU.
        starts: int64 [slots] on CPU: first unique of the slot's group (``rows`` slots).
        uniques: unique ids of the ``rows`` tables, counted from their first hot rows; None without
            such tables.
        lengths: int64 [pooled slots, size], or None when every bag has the batch's length.
        weights: fp32, entry by entry of the pooled slots in slot order; or None.
    """

    batch: Batch
    ids: Tensor
    counts: Tensor
    starts: Tensor
    uniques: Uniques | None
    lengths: Tensor | None
    weights: Tensor | None


class Router:
    """Turns batches into `Outgoing`.

    Args:
        layout: the compiled plan.
        reader: knows the names for an out-of-bounds error.
    """

    def __init__(self, layout: Layout, reader: InputReader) -> None:
        self.layout, self.reader = layout, reader
        self._rows_features = [f for t in layout.tables_of(ExchangeKind.ROWS)
                               for f in layout.features_of(t)]
        self._pooled_features = [f for t in layout.tables_of(ExchangeKind.POOLED)
                                 for f in layout.features_of(t)]
        self._hot = HotIds(layout)
        self._set_up_rows()
        self._set_up_pooled()
        # Hot ids are asked of this rank's own copy alone.
        first_row = [slot.shard.row_start
                     - (layout.groups[slot.group].row_start if slot.feature >= 0 else 0)
                     for slot in layout.slots]
        self._slots = column([
            [slot.group, int(not slot.hot or slot.rank == layout.rank), first,
             1 if layout.world_size == 1 else slot.id_bytes]
            for slot, first in zip(layout.slots, first_row, strict=True)]).view(-1, 4)
        self._pooled_slots = [i for i, slot in enumerate(layout.slots) if slot.feature >= 0]

    def _set_up_rows(self) -> None:
        layout = self.layout
        tables = layout.tables_of(ExchangeKind.ROWS)
        segment = {t: s for s, t in enumerate(tables)}
        features = self._rows_features
        self._rows_columns = column(features)
        self._segments = Segments(
            column([layout.tables[t].num_embeddings + len(layout.hot_rows[t]) for t in tables]),
            column([BOUNDS_CODE[layout.tables[t].bounds] for t in tables]))
        chunks = [[segment[layout.feature_table[f]], 0, 0, layout.feature_columns[f],
                   layout.total_columns] for f in features]
        self._chunks = column(chunks).reshape(-1, 5)
        self._rows_chunks: PerShape[Tensor] = PerShape()
        groups = [group for group in layout.groups if group.feature < 0]
        self._queries = column([[segment[g.table], row] for g in groups
                                for row in (g.row_start, g.row_end)]).reshape(-1, 2)
        self.num_rows_groups = len(groups)

    def _set_up_pooled(self) -> None:
        layout = self.layout
        groups = [group for group in layout.groups if group.feature >= 0]
        owner = {}
        for number, group in enumerate(groups):
            owner.setdefault(group.feature, []).append(number)
        table = []
        for f in self._pooled_features:
            config = layout.tables[layout.feature_table[f]]
            table.append([f, 1, owner[f][0], len(owner[f]), config.num_embeddings,
                          BOUNDS_CODE[config.bounds]])
        self._route = RouteTables(column(table).reshape(-1, 6),
                                  column([group.row_end for group in groups]))
        self._first_group = column([owner[group.feature][0] for group in groups])
        self._group_feature = column([group.feature for group in groups])
        self._may_drop = any(
            layout.tables[layout.feature_table[f]].bounds is BoundsMode.IGNORE or len(owner[f]) > 1
            for f in self._pooled_features)

    def needs_lengths(self, batch: Batch) -> bool:
        """Whether the bags of the pooled slots may differ in length."""
        return bool(self._pooled_features) and (batch.length < 0 or self._may_drop)

    def route(self, batch: Batch) -> Outgoing:
        """Checks, de-duplicates and packs the batch's ids.

        Raises:
            BoundsError: an id outside its table, where the table's mode says so.
        """
        try:
            uniques = self._unique(batch) if self._rows_features else None
            routed = self._route_bags(batch) if self._pooled_features else None
        except OutOfBoundsError as error:
            raise self.reader.bounds_error(batch, error.position) from None
        starts, counts, sources = [], [], []
        if uniques is not None:
            marks = split_sorted(uniques.ids, uniques.splits, self._queries).view(-1, 2)
            starts.append(marks[:, 0])
            counts.append(marks[:, 1] - marks[:, 0])
            sources.append(uniques.ids)
        if routed is not None:
            before = 0 if uniques is None else uniques.ids.numel()
            starts.append(self._group_starts(batch, routed) + before)
            counts.append(routed.counts)
            sources.append(routed.ids)
        pieces, slot_counts, slot_starts, total = route_slots(self._slots, _joined(starts),
                                                              _joined(counts))
        source = _joined(sources)
        if self.layout.world_size == 1:  # nothing travels: as the kernels read them
            ids = pack_ids(source, pieces[:, :4].contiguous(), torch.int64)
        else:
            ids = pack_bytes(source, pieces, total)
        return Outgoing(batch, ids, slot_counts, slot_starts, uniques,
                        *self._bag_extras(batch, routed, pieces, source.numel()))

    def check(self, batch: Batch) -> Tensor:
        """int64 [n]: the batch's ids, checked and clamped; every table pooled and in one block.

        Raises:
            BoundsError: an id outside its table, where the table's mode says so.
        """
        try:
            return route_bags(batch.values, batch.offsets, batch.length, batch.size, self._route,
                              positions=False, lengths=False).ids
        except OutOfBoundsError as error:
            raise self.reader.bounds_error(batch, error.position) from None

    def unique(self, batch: Batch, chunks: Tensor, segments: Segments, num_ids: int) -> Uniques:
        """The batch's ids by row of this rank's blocks, checked; every table in one block.

        Args:
            batch: what is looked up.
            chunks: of every feature, as `unique_segments` takes them; segments are blocks.
            segments: rows and bounds of every block.
            num_ids: ids of all chunks.

        Raises:
            BoundsError: an id outside its table, where the table's mode says so.
        """
        try:
            return unique_segments(batch.values, chunks, segments, None, num_ids=num_ids,
                                   positions=batch.weights is not None)
        except OutOfBoundsError as error:
            raise self.reader.bounds_error(batch, error.position) from None

    def _unique(self, batch: Batch) -> Uniques:
        chunks = self._rows_chunks.of(batch, self._make_chunks)
        return unique_segments(self._hot.renumbered(batch), chunks, self._segments, batch.bags,
                               positions=batch.weights is not None, inverse=True)

    def _make_chunks(self, batch: Batch) -> Tensor:
        """Chunks of `unique_segments`: the features of the ``rows`` tables."""
        chunks, edges = self._chunks.clone(), batch.feature_starts
        chunks[:, 1] = edges[self._rows_columns]
        chunks[:, 2] = edges[self._rows_columns + 1] - chunks[:, 1]
        return chunks

    def _route_bags(self, batch: Batch) -> RoutedBags:
        return route_bags(batch.values, batch.offsets, batch.length, batch.size, self._route,
                          positions=batch.weights is not None, lengths=self.needs_lengths(batch))

    def _group_starts(self, batch: Batch, routed: RoutedBags) -> Tensor:
        """int64 [pooled groups]: where the ids of every group begin in ``routed.ids``."""
        before = routed.counts.cumsum(0) - routed.counts
        return before - before[self._first_group] + batch.feature_starts[self._group_feature]

    def _bag_extras(self, batch: Batch, routed: RoutedBags | None, pieces: Tensor,
                    total: int) -> tuple[Tensor | None, Tensor | None]:
        """(lengths, weights) of the pooled slots, where they are needed."""
        if routed is None:
            return None, None
        lengths = weights = None
        if routed.lengths is not None:
            group = self._slots[self._pooled_slots, 0] - self.num_rows_groups
            lengths = routed.lengths.view(routed.counts.numel(), batch.size)[group]
        if batch.weights is not None:
            assert routed.positions is not None
            before = total - routed.ids.numel()
            spans = pieces[self._pooled_slots][:, :2].tolist()
            where = [routed.positions[start - before:start - before + count]
                     for start, count in spans]
            weights = batch.weights[torch.cat(where)]
        return lengths, weights


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
