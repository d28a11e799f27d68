"""Buffers of rows and of gradients on their way, and the count of their bytes."""

from __future__ import annotations

from torch import Tensor

from shardlab.comm import Groups, WireBytes, Work, all_to_all
from shardlab.sharded.cells import Buffer, CellIndex


class Transfers:
    """Sends buffers between the ranks of one layout.

    Args:
        cells: of the layout.
    """

    def __init__(self, cells: CellIndex) -> None:
        self._cells = cells
        self._tables = [table.name for table in cells.layout.tables]

    @staticmethod
    def start(buffer: Tensor, place: Buffer, groups: Groups, *, owner_sends: bool) -> Work:
        """Starts to send what travels; fills what arrives.

        Args:
            buffer: uint8 [place.total].
            place: of the buffer.
            groups: the ranks of the layout.
            owner_sends: rows; else gradients.
        """
        arrives = buffer[place.travels:place.travels + place.arrives]
        splits = (place.slot_splits, place.cell_splits)
        if not owner_sends:
            splits = (place.cell_splits, place.slot_splits)
        return all_to_all(arrives, buffer[:place.travels], *splits, groups,
                          "rows" if owner_sends else "grads")

    def count(self, wire: WireBytes, place: Buffer, groups: Groups, *, owner_sends: bool) -> None:
        """Counts what travels; arguments as of `start`."""
        if owner_sends:
            wire.count(1, place.cell_splits, groups)
        else:
            wire.count(2, place.slot_splits, groups)
        wire.add(1 if owner_sends else 2, self._tables,
                 self._cells.table_bytes(place, cells=owner_sends))
