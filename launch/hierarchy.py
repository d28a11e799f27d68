"""Whether a job's exchange has two stages: as it asks, or as the plan's byte count says."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from shardlab.comm import Groups, broadcast_text, two_stages_refusal, with_stages
from shardlab.errors import ShardLabError
from shardlab.launch.hot_rows import wishes
from shardlab.launch.planning import job_request, job_topology
from shardlab.plan import ShardingPlan

if TYPE_CHECKING:
    from shardlab.config import JobConfig


@dataclass(frozen=True)
class HierarchyChoice:
    """How ids, rows and gradients cross hosts, and why.

    Attributes:
        hierarchy: ``flat`` or ``two_stage``.
        reason: in words.
        costs: what was expected of both, as plain data; None: nothing was to be chosen.
    """

    hierarchy: str
    reason: str
    costs: dict[str, Any] | None = None

    def to_json(self) -> str:
        """The text of ``exchange.json``."""
        return json.dumps(asdict(self), indent=1)


def choose_hierarchy(job: JobConfig, plan: ShardingPlan,
                     groups: Groups) -> tuple[HierarchyChoice, Groups]:
    """Chooses, and makes the lanes; every rank calls it and gets the same choice.

    Returns:
        The choice, and the ranks with lanes for it.

    Raises:
        LaunchError: the job asks for two stages, and the ranks' hosts do not allow it.
    """
    text = ""
    if groups.rank == 0:
        text = _decide(job, plan, groups).to_json()
    choice = HierarchyChoice(**json.loads(broadcast_text(text, groups)))
    if choice.hierarchy == "two_stage":
        groups = with_stages(groups)
        groups = replace(groups, transport=f"{groups.transport}; {choice.reason}")
    elif choice.costs is not None:
        groups = replace(groups, transport=f"{groups.transport}; flat: {choice.reason}")
    return choice, groups


def _decide(job: JobConfig, plan: ShardingPlan, groups: Groups) -> HierarchyChoice:
    asked = job.exchange.hierarchy
    if plan.replicas > 1:
        return HierarchyChoice("flat", "replica groups of the tables exchange flat")
    if wishes(job) or any(entry.hot_rows for entry in plan.tables):
        return HierarchyChoice("flat", "copies of hot rows are made beside a flat exchange only")
    if asked != "auto":
        return HierarchyChoice(asked, "as exchange.hierarchy asks")
    if refusal := two_stages_refusal(groups):
        return HierarchyChoice("flat", refusal)
    from shardlab.planner.hierarchy import compare_hierarchies

    hosts = max(groups.host_of_rank) + 1
    topology = replace(job_topology(job, groups), hosts=hosts,
                       ranks_per_host=groups.world_size // hosts)
    try:
        costs = compare_hierarchies(plan, job_request(job, topology))
    except ShardLabError as error:  # of a machine that the plan was not made for
        return HierarchyChoice("flat", f"two stages were not compared: {error}")
    return HierarchyChoice("two_stage" if costs.two_stage_pays else "flat", costs.in_words(),
                           asdict(costs))
