"""Two plans side by side; and what was predicted beside what a run measured.

Of a run, times are medians over its last steps. A phase that exchanges waits for the slowest rank,
so it is compared where it waits least: on the rank that works longest. ``overhead`` is predicted
for the whole step, and measured inside the other phases as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardlab.errors import PlanError
from shardlab.phases import MEASURED_PHASES, PHASES, WAIT
from shardlab.planner.plan_file import Prediction
from shardlab.planner.report_text import grid, number
from shardlab.planner.result import PlanResult
from shardlab.planner.units import format_bytes, format_ms
from shardlab.planner.what_if import Outcome, print_outcomes
from shardlab.storage_bytes import TierBytes

if TYPE_CHECKING:
    from rich.console import Console

#: Phases in which ranks wait for each other.
_EXCHANGES = ("ids", "rows", "grads")
_TIERS = ("hbm", "ddr", "ssd")


@dataclass(frozen=True)
class Measured:
    """What a run measured.

    Attributes:
        name: the run folder.
        phase_ms: milliseconds of a step by phase, one entry a rank, `phases.MEASURED_PHASES`.
        tables: bytes of the tables by tier, one entry a rank.
        step_ms: median milliseconds of a step on the first rank, waiting for data included.
    """

    name: str
    phase_ms: tuple[Mapping[str, float], ...]
    tables: tuple[TierBytes, ...]
    step_ms: float

    @property
    def longest(self) -> int:
        """The rank that waits least for others."""
        return min(range(len(self.phase_ms)),
                   key=lambda rank: sum(self.phase_ms[rank][phase] for phase in _EXCHANGES))

    @property
    def work_ms(self) -> float:
        """Milliseconds of a step without waiting for data, mean over ranks."""
        total = sum(ms for rank in self.phase_ms for phase, ms in rank.items() if phase != WAIT)
        return total / len(self.phase_ms)


def is_run(path: Path) -> bool:
    """Whether a path is a run's folder, and not a plan."""
    return path.is_dir()


def read_run(path: Path) -> Measured:
    """Reads what a run measured.

    Raises:
        PlanError: the folder holds no finished run, or its phases were not timed.
    """
    file = path / "summary.json"
    try:
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        ranks = [{str(phase): float(ms) for phase, ms in rank.items()}
                 for rank in data["phase_ms"]]
        tables = tuple(TierBytes(**rank) for rank in data["tables"])
        step = float(data["pace"]["step_ms_p50"])
    except OSError as error:
        raise PlanError(f"run {path}: {file.name} cannot be read: {error.strerror}; name the "
                        "folder of a run that has ended") from None
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(f"run {path}: {file.name} is not that of a run ({type(error).__name__}: "
                        f"{error})") from None
    if not ranks or not all(set(rank) == set(MEASURED_PHASES) for rank in ranks):
        raise PlanError(f"run {path}: its phases were not timed; on GPUs train with "
                        "--set train.time_phases=true, and for at least one step")
    return Measured(str(path), tuple(ranks), tables, step)


def print_measured(console: Console, predicted: Prediction, measured: Measured) -> None:
    """Prints what was predicted beside what was measured: bytes per tier, ms per phase.

    Raises:
        PlanError: they are of different numbers of ranks.
    """
    ranks = len(predicted.tables)
    if ranks != len(measured.tables):
        raise PlanError(f"run {measured.name}: {len(measured.tables)} ranks, its plan has {ranks}")
    console.print(f"Predicted and measured: {measured.name}", style="bold")
    console.print(f"  machine  {predicted.topology}, {ranks} ranks, batch {predicted.batch_size} "
                  "per rank")
    console.print(f"  assumed  {predicted.assumption}\n")
    _print_bytes(console, predicted, measured)
    _print_phases(console, predicted, measured)
    waiting = sum(rank[WAIT] for rank in measured.phase_ms) / ranks
    console.print(f"  step: {format_ms(predicted.step_ms)} predicted, "
                  f"{format_ms(measured.work_ms)} measured, "
                  f"{_ratio(measured.work_ms, predicted.step_ms)}; besides "
                  f"{format_ms(waiting)} of waiting for data")


def _print_bytes(console: Console, predicted: Prediction, measured: Measured) -> None:
    table = grid("Tables: bytes by tier", ["rank", "tier"], ["predicted", "measured", "ratio"])
    pairs = list(zip(predicted.tables, measured.tables, strict=True))
    for rank, (wanted, found) in enumerate(pairs):
        for tier in _TIERS:
            old, new = getattr(wanted, tier), getattr(found, tier)
            if old or new:
                table.add_row(str(rank), tier, format_bytes(old), format_bytes(new),
                              _ratio(new, old))
    console.print(table)
    console.print()


def _print_phases(console: Console, predicted: Prediction, measured: Measured) -> None:
    rank = measured.longest
    table = grid(f"The step of rank {rank}, which waits least for others (ms)", ["phase"],
                 ["predicted", "measured", "ratio", "mean of ranks"])
    count = len(measured.phase_ms)
    for index, phase in enumerate(PHASES):
        old, new = predicted.phase_ms[rank][index], measured.phase_ms[rank][phase]
        if not old and not new:
            continue
        mean = sum(one[phase] for one in measured.phase_ms) / count
        table.add_row(phase, number(old), number(new), _ratio(new, old), number(mean))
    old, new = predicted.rank_ms[rank], sum(measured.phase_ms[rank][phase] for phase in PHASES)
    table.add_section()
    table.add_row("sum", number(old), number(new), _ratio(new, old), number(measured.work_ms))
    console.print(table)


def _ratio(measured: float, predicted: float) -> str:
    """Measured over predicted."""
    return f"{measured / predicted:.2f}" if predicted else "-"


def print_plans(console: Console, mine: PlanResult, other: PlanResult, name: str) -> None:
    """Prints a plan beside another one, both rated on the same machine."""
    print_outcomes(console, mine, [Outcome(name, other)], title="Two plans", now="this plan")
