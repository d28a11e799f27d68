"""A sharding plan as data: where all tables go, in how many groups of ranks, and what they send."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from shardlab.errors import ConfigError, PlanError
from shardlab.plan_problems import (
    cover_problems,
    dense_wire_problems,
    hot_row_problems,
    wire_problems,
)
from shardlab.replication import replica_problem
from shardlab.row_sets import rows_from_text, rows_to_text
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType
from shardlab.storage_bytes import TierBytes
from shardlab.storage_specs import Choice
from shardlab.storage_text import parse_storage, storage_to_data
from shardlab.table_plan import DenseWire, Shard, TablePlan, WireDtypes

SCHEMA_VERSION = 2
#: Top-level fields that the planner adds for readers and that a run ignores.
ANNOTATIONS = ("predicted",)
_GROUPS = ("replicas", "sync_every_steps")


@dataclass(frozen=True)
class ShardingPlan:
    """The placement of all tables over ``world_size`` ranks, or over each of several groups of so
    many.

    Attributes:
        world_size: ranks of a group, which numbers its ranks from 0; without groups, of the job.
        tables: where they go.
        replicas: groups that hold all tables, each placed alike; ranks of a group follow each
            other in the job.
        sync_every_steps: 1: groups merge the gradients of every step, and train as one; N: every N
            steps, rows that they have changed become the mean over the groups.
        dense_wire: of the gradients of what is no table.
    """

    world_size: int
    tables: tuple[TablePlan, ...]
    version: int = SCHEMA_VERSION
    replicas: int = 1
    sync_every_steps: int = 1
    dense_wire: DenseWire = field(default_factory=DenseWire)

    @property
    def job_ranks(self) -> int:
        """Ranks of a job that executes this plan."""
        return self.world_size * self.replicas

    def with_replicas(self, replicas: int, sync_every_steps: int = 1) -> ShardingPlan:
        """The same placement in each of so many groups of ranks.

        Raises:
            PlanError: a number below 1.
        """
        for name, value in (("replicas", replicas), ("sync_every_steps", sync_every_steps)):
            if value < 1:
                raise PlanError(f"{name}: must be at least 1, found {value}")
        return replace(self, replicas=replicas, sync_every_steps=sync_every_steps)

    def to_json(self, predicted: Mapping[str, Any] | None = None) -> str:
        """JSON text with a schema version; `from_json` reads it back to an equal plan.

        Args:
            predicted: plain data that goes beside the plan, for readers.
        """
        tables = [{**asdict(entry), "storage": storage_to_data(entry.storage),
                   "hot_rows": rows_to_text(entry.hot_rows)} for entry in self.tables]
        beside = {} if predicted is None else {"predicted": predicted}
        return json.dumps({**asdict(self), "tables": tables, **beside}, indent=1, default=str)

    @staticmethod
    def from_json(text: str) -> ShardingPlan:
        """Reads a plan.

        Raises:
            PlanError: not JSON, another schema version, or a missing or unknown field.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"plan is not JSON: {error}") from None
        found = data.get("version") if isinstance(data, dict) else None
        if found != SCHEMA_VERSION:
            raise PlanError(f"plan has schema version {found!r}, this ShardLab reads "
                            f"{SCHEMA_VERSION}; write it again with this version")
        unknown = sorted(data.keys() - {"world_size", "tables", "version", "dense_wire", *_GROUPS,
                                        *ANNOTATIONS})
        if unknown:
            raise PlanError(f"plan has unknown fields {unknown}; a plan holds world_size, tables, "
                            "version, replicas, sync_every_steps and dense_wire")
        try:
            return ShardingPlan(
                int(data["world_size"]), tuple(_table_from(entry) for entry in data["tables"]),
                dense_wire=DenseWire(**data.get("dense_wire", {}))
            ).with_replicas(*(int(data.get(name, 1)) for name in _GROUPS))
        except (KeyError, TypeError, ValueError, ConfigError) as error:
            raise PlanError(f"plan is malformed: {type(error).__name__}: {error}") from None

    def with_wire(self, wire: WireDtypes,
                  tables: Mapping[str, WireDtypes] | None = None) -> ShardingPlan:
        """The same placement with other codecs on the wire.

        Args:
            wire: of every table that ``tables`` does not name.
            tables: by table.

        Raises:
            PlanError: an unknown codec or table, or error feedback for a table whose bags are
                pooled by their owner: a bag has no next gradient to add it to.
        """
        given = dict(tables or {})
        unknown = sorted(given.keys() - {entry.table for entry in self.tables})
        if unknown:
            raise PlanError(f"wire: the plan has no tables {unknown}")
        entries = [replace(entry, wire=given.get(entry.table, wire)) for entry in self.tables]
        problems = [problem for entry in entries for problem in wire_problems(entry)]
        if problems:
            raise PlanError("\n".join(problems))
        return replace(self, tables=tuple(entries))

    def with_dense_wire(self, codec: str, rounding: str = "stochastic") -> ShardingPlan:
        """The same placement with another codec of the dense part's gradients.

        Raises:
            PlanError: an unknown codec or rounding.
        """
        plan = replace(self, dense_wire=DenseWire(codec, rounding))
        if problems := dense_wire_problems(plan.dense_wire):
            raise PlanError("\n".join(problems))
        return plan

    def with_hot_rows(self, tables: Mapping[str, Sequence[int]]) -> ShardingPlan:
        """The same placement with other hot rows; tables that are not named keep theirs.

        Args:
            tables: rows by table, in any order.

        Raises:
            PlanError: an unknown table, or one that cannot have hot rows, with the reason.
        """
        unknown = sorted(tables.keys() - {entry.table for entry in self.tables})
        if unknown:
            raise PlanError(f"hot rows: the plan has no tables {unknown}")
        entries = tuple(replace(entry, hot_rows=tuple(sorted(tables[entry.table])))
                        if entry.table in tables else entry for entry in self.tables)
        problems = [problem for entry in entries for problem in hot_row_problems(entry)]
        if problems:
            raise PlanError("\n".join(problems))
        return replace(self, tables=entries)

    def check(self, tables: Sequence[EmbeddingBagConfig], world_size: int) -> None:
        """Refuses a plan that does not cover exactly these tables on so many ranks of a job.

        Raises:
            PlanError: lists every mismatch by table name.
        """
        problems = []
        if self.job_ranks != world_size:
            groups = "" if self.replicas == 1 else f" ({self.replicas} groups of {self.world_size})"
            problems.append(f"plan is for {self.job_ranks} ranks{groups}, this job runs "
                            f"{world_size}; plan again for this world size")
        planned = {entry.table: entry for entry in self.tables}
        if len(planned) != len(self.tables):
            problems.append("plan names a table twice")
        wanted = {table.name: table for table in tables}
        problems += [f"table {name!r} is not in the plan" for name in wanted if name not in planned]
        problems += [f"plan names table {name!r}, which the model does not have"
                     for name in planned if name not in wanted]
        for name in planned.keys() & wanted.keys():
            problems += cover_problems(planned[name], wanted[name], self.world_size)
            problems += wire_problems(planned[name])
            problems += hot_row_problems(planned[name])
            if self.replicas > 1 and planned[name].hot_rows:
                problems.append(f"table {name!r}: hot rows are copied to the ranks of one group "
                                "and cannot be kept alike over replicas; leave hot_rows or "
                                "parallel.replicas out")
            if self.replicas > 1 and (problem := replica_problem(planned[name].storage,
                                                                 self.sync_every_steps)):
                problems.append(f"table {name!r}: {problem}")
        problems += dense_wire_problems(self.dense_wire)
        if problems:
            raise PlanError("\n".join(sorted(problems)))


def _table_from(entry: dict[str, Any]) -> TablePlan:
    shards = tuple(Shard(**{**shard, "bytes": TierBytes(**shard.get("bytes", {}))})
                   for shard in entry["shards"])
    storage = parse_storage(entry.get("storage"), f"table {entry['table']!r}: storage")
    if isinstance(storage, Choice):
        raise ValueError(f"table {entry['table']!r}: a plan holds one storage, not a choice")
    return TablePlan(**{**entry, "sharding": ShardingType(entry["sharding"]),
                        "exchange": ExchangeKind(entry["exchange"]), "shards": shards,
                        "storage": storage, "wire": WireDtypes(**entry.get("wire", {})),
                        "hot_rows": rows_from_text(entry.get("hot_rows", ""))})
