"""Why an option was chosen, in one sentence with numbers."""

from __future__ import annotations

from shardlab.planner.cuts import Cut
from shardlab.planner.placement import HBM, Problem
from shardlab.planner.units import format_bytes, format_ms
from shardlab.specs import EmbeddingBagConfig
from shardlab.storage_specs import describe_storage


def describe_cut(cut: Cut) -> str:
    """``row_wise x8``, ``grid_shard 2x4``, ``table_wise``."""
    if cut.row_parts > 1 and cut.col_parts > 1:
        return f"{cut.sharding.value} {cut.col_parts}x{cut.row_parts}"
    parts = cut.row_parts * cut.col_parts
    return cut.sharding.value if parts == 1 else f"{cut.sharding.value} x{parts}"


def why(problem: Problem, table: EmbeddingBagConfig, index: int, option: int) -> str:
    """The reason for an option: the cheapest way, or what is wrong with the cheapest."""
    asked = table.allowed_sharding
    prefix = f"{' or '.join(kind.value for kind in asked)} was asked for; " if asked else ""
    ranked = problem.by_work(index)
    if len(ranked) == 1:
        return prefix.removesuffix("; ") or "the only way on one rank"
    if ranked[0] == option:
        runner, total = ranked[1], problem.total_ms
        return (f"{prefix}least work, {format_ms(total[option])}; next "
                f"{_name(problem, runner, option)}, {format_ms(total[runner])}")
    return prefix + _against(problem, ranked[0], option)


def _name(problem: Problem, option: int, beside: int) -> str:
    """A cut; the storage too where the two options differ in it."""
    name = describe_cut(problem.options.cut(option))
    if problem.options.variant[option] == problem.options.variant[beside]:
        return name
    return f"{name} of {describe_storage(problem.options.storage(option))}"


def _against(problem: Problem, cheapest: int, option: int) -> str:
    name = _name(problem, cheapest, option)
    if not problem.fits_alone[cheapest]:
        size, capacity = problem.largest_bytes[cheapest], problem.ranks.capacity
        if size > capacity:
            return (f"{name} does not fit: {format_bytes(size)} on one rank of "
                    f"{format_bytes(capacity)}")
        return f"{name} does not fit a host"
    extra = format_ms(problem.total_ms[option] - problem.total_ms[cheapest])
    if problem.largest_ms[option] < problem.largest_ms[cheapest]:
        return (f"balance: {format_ms(problem.largest_ms[option])} on a rank, {name} "
                f"{format_ms(problem.largest_ms[cheapest])}; costs {extra} more work")
    saved = problem.total_bytes[cheapest, HBM] - problem.total_bytes[option, HBM]
    if saved > 0:
        return f"saves {format_bytes(saved)} of hbm against {name}; costs {extra} more work"
    return f"packs better than {name}; costs {extra} more work"
