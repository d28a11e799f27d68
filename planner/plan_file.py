"""Plans as JSON files: a plan with its predictions beside it, written and read.

The plan itself is what `ShardingPlan.from_json` reads. ``predicted`` holds what `shardlab plan`
shows: machine, totals, and bytes and milliseconds per rank and table.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shardlab.errors import PlanError
from shardlab.phases import PHASES
from shardlab.plan import ShardingPlan
from shardlab.planner.result import PlanResult, RankPrediction, TablePrediction
from shardlab.storage_bytes import TierBytes
from shardlab.storage_text import storage_to_data


@dataclass(frozen=True)
class Prediction:
    """What was predicted for a plan, as far as it can be measured.

    Attributes:
        topology: name of the machine.
        assumption: about ids, in words.
        batch_size: samples of one rank in one step.
        phase_ms: milliseconds of every rank of the job by phase, in the order of `phases.PHASES`.
        hidden_ms: of every rank, the part of prefetching that runs beside the dense part.
        tables: bytes of every rank's shards, by tier.
    """

    topology: str
    assumption: str
    batch_size: int
    phase_ms: tuple[tuple[float, ...], ...]
    hidden_ms: tuple[float, ...]
    tables: tuple[TierBytes, ...]

    @property
    def rank_ms(self) -> list[float]:
        """Milliseconds of every rank's step."""
        return [sum(phases) - hidden
                for phases, hidden in zip(self.phase_ms, self.hidden_ms, strict=True)]

    @property
    def step_ms(self) -> float:
        """Milliseconds of the slowest rank's step."""
        return max(self.rank_ms)


def prediction_of(result: PlanResult) -> Prediction:
    """The predictions of a plan that was just made or rated."""
    ranks = result.ranks * result.plan.replicas
    return Prediction(
        topology=result.topology.name, assumption=result.assumption, batch_size=result.batch_size,
        phase_ms=tuple(rank.phase_ms for rank in ranks),
        hidden_ms=tuple(rank.hidden_ms for rank in ranks),
        tables=tuple(rank.held.total for rank in ranks))


def plan_to_json(result: PlanResult) -> str:
    """The plan as JSON, its predictions beside it."""
    return result.plan.to_json(predicted_data(result))


def predicted_data(result: PlanResult) -> dict[str, Any]:
    """All predictions as plain data."""
    return {
        "topology": asdict(result.topology), "batch_size": result.batch_size,
        "optimizer": result.optimizer, "wire": asdict(result.settings.wire),
        "dense": asdict(result.settings.dense), "assumption": result.assumption,
        "phases": list(PHASES), "step_ms": result.step_ms, "samples_per_s": result.samples_per_s,
        "barrier_ms": result.barrier_ms, "imbalance": result.imbalance,
        "lower_bound_ms": result.lower_bound_ms, "gap": result.gap, "optimal": result.optimal,
        "binding": list(result.binding), "start": result.start,
        "rank_capacity": {"hbm": result.capacity},
        "sync_bytes": result.sync_bytes,
        "host_capacity": {"ddr": result.host_capacity.ddr, "ssd": result.host_capacity.ssd},
        "ranks": [_rank(rank) for rank in result.ranks],
        "tables": [_table(table) for table in result.tables]}


def _rank(rank: RankPrediction) -> dict[str, Any]:
    return {**asdict(rank), "ms": rank.ms}


def _table(table: TablePrediction) -> dict[str, Any]:
    return {"table": table.table, "storage": storage_to_data(table.storage),
            "preference": table.preference, "preferences": table.preferences,
            "held": asdict(table.held), "buffer_bytes": table.buffer_bytes,
            "common_ms": table.common_ms, "phase_ms": list(table.phase_ms), "why": table.why}


def read_plan_file(path: Path) -> tuple[ShardingPlan, Prediction | None]:
    """Reads a plan, and what was predicted for it where the file says so.

    Raises:
        PlanError: the file cannot be read or holds no plan; names it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        plan = ShardingPlan.from_json(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PlanError(f"plan {path}: cannot be read: {reason}") from None
    except PlanError as error:
        raise PlanError(f"plan {path}: {error}") from None
    beside = json.loads(text).get("predicted")
    try:
        return plan, None if beside is None else _prediction(beside, plan.replicas)
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(f"plan {path}: 'predicted' is malformed ({type(error).__name__}: {error}); "
                        "plan again, or remove it") from None


def _prediction(data: dict[str, Any], replicas: int) -> Prediction:
    if tuple(data["phases"]) != PHASES:
        raise ValueError(f"phases {data['phases']}, expected {list(PHASES)}")
    ranks = data["ranks"] * replicas
    return Prediction(
        topology=str(data["topology"]["name"]), assumption=str(data["assumption"]),
        batch_size=int(data["batch_size"]),
        phase_ms=tuple(tuple(float(ms) for ms in rank["phase_ms"]) for rank in ranks),
        hidden_ms=tuple(float(rank["hidden_ms"]) for rank in ranks),
        tables=tuple(sum((TierBytes(**rank["held"][part]) for part in ("tables", "state", "cache")),
                         TierBytes()) for rank in ranks))
