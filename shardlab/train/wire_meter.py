"""What every table sent: bytes by direction, and the worst relative error of sampled rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardlab.sharded import ShardedModel


@dataclass(frozen=True)
class TableWire:
    """One table on the wire, all ranks together.

    Attributes:
        ids, rows, gradients: bytes sent to other ranks; mean of a step where it says so.
        rows_error, gradients_error: largest relative error (L2) of any sampled row.
    """

    ids: float = 0
    rows: float = 0
    gradients: float = 0
    rows_error: float = 0
    gradients_error: float = 0

    def __add__(self, other: TableWire) -> TableWire:
        return TableWire(self.ids + other.ids, self.rows + other.rows,
                         self.gradients + other.gradients,
                         max(self.rows_error, other.rows_error),
                         max(self.gradients_error, other.gradients_error))

    def per_step(self, steps: int) -> TableWire:
        """Means of a step; errors stay what they are."""
        return TableWire(self.ids / steps, self.rows / steps, self.gradients / steps,
                         self.rows_error, self.gradients_error)

    @property
    def total(self) -> float:
        """Bytes of all directions."""
        return self.ids + self.rows + self.gradients


#: Numbers of a table that are summed over ranks, and of which the largest counts.
SUMS, LARGEST = 3, 2


class TableWireMeter:
    """Counts since the last look, of every table that can send.

    Args:
        model: the sharded model; every rank lists the same tables.
    """

    def __init__(self, model: ShardedModel) -> None:
        self._collections = list(model.collections().values())
        self.tables = [name for collection in self._collections
                       for name in collection.wire.tables]
        self._mark = self._now()

    def _now(self) -> list[int]:
        return [size for collection in self._collections
                for sizes in collection.wire.tables.values() for size in sizes]

    def restart(self) -> None:
        """Leaves out what was sent since the last `take`, such as a validation's rows."""
        self._mark = self._now()

    def take(self) -> list[float]:
        """This rank's bytes since the last call, table by table, `SUMS` numbers each."""
        before, self._mark = self._mark, self._now()
        return [float(new - old) for new, old in zip(self._mark, before, strict=True)]

    def errors(self) -> list[float]:
        """This rank's errors since the start, table by table, `LARGEST` numbers each."""
        return [error for collection in self._collections for name in collection.wire.tables
                for error in collection.wire_errors(name)]

    def named(self, sums: list[float], largest: list[float]) -> dict[str, TableWire]:
        """Numbers as `take` and `errors` give them, over all ranks, by table."""
        return {name: TableWire(*sums[SUMS * i:SUMS * (i + 1)],
                                *largest[LARGEST * i:LARGEST * (i + 1)])
                for i, name in enumerate(self.tables)}


def wire_record(wires: Mapping[str, TableWire], steps: int) -> dict[str, Any]:
    """What a line of metrics says by table; nothing where nothing travels."""
    if not any(wire.total for wire in wires.values()):
        return {}
    return {"wire_by_table": {name: asdict(wire.per_step(steps))
                              for name, wire in wires.items()}}
