"""What options cost, as flat arrays: what cost models make and the search reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Costs:
    """What options cost; the pieces of an option are alike but for the first of every column block.

    Attributes:
        busy_ms: [O, 2] milliseconds of a first piece and of another, without prefetching.
        fetch_ms: [O, 2] milliseconds of prefetching.
        common_ms: [O] milliseconds on every rank, as a source.
        piece_bytes: [O, 3] a piece on hbm with its buffers, on ddr and on ssd.
        common_bytes: [O] hbm buffers on every rank, as a source.
        fixed_ms: milliseconds of a step whatever the plan.
    """

    busy_ms: Floats
    fetch_ms: Floats
    common_ms: Floats
    piece_bytes: Ints
    common_bytes: Ints
    fixed_ms: float

    def take(self, chosen: Ints) -> Costs:
        """Only these options."""
        return Costs(self.busy_ms[chosen], self.fetch_ms[chosen], self.common_ms[chosen],
                     self.piece_bytes[chosen], self.common_bytes[chosen], self.fixed_ms)


@dataclass(frozen=True)
class Priced:
    """Phases and buffers of options.

    Attributes:
        phase_ms: [O, 2, phases] of a first piece and of another, on its owner.
        buffer_bytes: [O] ids, rows and gradients that an owner of a piece holds for all sources.
        common_phase_ms: [O, phases] on every rank as a source.
        common_bytes: [O] buffers on every rank as a source.
        written_bytes: [O, 2] that a step writes to the disk, of a first piece and of another.
    """

    phase_ms: Floats
    buffer_bytes: Ints
    common_phase_ms: Floats
    common_bytes: Ints
    written_bytes: Floats
