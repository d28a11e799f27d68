"""Plans again with something changed, and lays the two plans side by side.

A scenario is one text with one or more changes, such as ``hosts=+1``, ``no ssd`` or
``hosts=x2 wire=bf16``:

    no ssd, no ddr             the machine without that tier
    hosts=+1, hosts=32         a field of the topology, by name (`hbm_bytes`, `ssd.read_iops`,
    hbm_bytes=x2               `intra_host.bytes_per_s`): a value as in a topology file, or +, -,
    inter_host.latency_s=/2    x or / and by how much
    topology=16x8xh200         another machine
    wire=bf16, wire.forward=   dtype of rows and gradients on the wire
    any other key              a key of the job, as in --set
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

from shardlab.errors import ConfigError, PlanError, nearest_name
from shardlab.phases import PHASES
from shardlab.planner import plan
from shardlab.planner.report_text import grid, number, rate_text, signed
from shardlab.planner.request import Request
from shardlab.planner.result import PlanResult
from shardlab.planner.topology import Link, Topology
from shardlab.planner.topology_file import change_fields, parse_quantity, read_topology
from shardlab.planner.units import format_bytes, format_ms
from shardlab.table_plan import WireDtypes

if TYPE_CHECKING:
    from rich.console import Console

#: From overrides of the job, as --set takes them, to what is planned.
Rebuild = Callable[[list[str]], Request]

_BETWEEN = re.compile(r"[\s,]+(?=no\s|[A-Za-z_][\w.\[\]]*=)")
_TIERS = {"no ssd": ("ssd", None), "no ddr": ("ddr_bytes", 0)}
_RELATIVE = re.compile(r"([+\-x/])\s*(.+)")
_SHORT = {"hbm": "hbm_bytes", "ddr": "ddr_bytes"}
_SHOWN_MOVES = 5
_TIMES = 2  # larger growth is shown as a factor, not in percent


@dataclass(frozen=True)
class Outcome:
    """What a scenario comes to.

    Attributes:
        scenario: the text that was asked.
        result: its plan; None: nothing fits.
        problem: why nothing fits.
    """

    scenario: str
    result: PlanResult | None
    problem: str = ""


def run_scenario(scenario: str, request: Request, rebuild: Rebuild) -> Outcome:
    """Plans a scenario.

    Args:
        scenario: what changes.
        request: what is planned without it.
        rebuild: makes a request of the job with overrides; its topology is not used.

    Raises:
        ConfigError: a change that cannot be read; names it.
    """
    changed = _changed(scenario, request, rebuild)
    try:
        return Outcome(scenario, plan(changed.tables, changed.topology, changed.batch_size,
                                      changed.optimizer, changed.settings))
    except PlanError as error:
        return Outcome(scenario, None, str(error))


def _changed(scenario: str, request: Request, rebuild: Rebuild) -> Request:
    topology, wire, overrides = request.topology, request.settings.wire, []
    for change in _BETWEEN.split(scenario.strip()):
        words = " ".join(change.split())
        key, equals, value = (part.strip() for part in change.partition("="))
        if words in _TIERS:
            key, new = _TIERS[words]
            topology = change_fields(topology, {key: new})
        elif not equals:
            raise ConfigError(f"--what-if {scenario!r}: {words!r} is no change; write key=value, "
                              f"or {' or '.join(_TIERS)}")
        elif key == "topology":
            topology = read_topology(value)
        elif key.split(".")[0] == "wire":
            wire = _wire(wire, key, value)
        elif _is_field(key):
            topology = _change_topology(topology, _SHORT.get(key, key), value, scenario)
        else:
            overrides.append(f"{key}={value}")
    if topology.name == request.topology.name and topology != request.topology:
        topology = replace(topology, name=f"{topology.name}, {scenario}")
    if overrides:
        request = _rebuilt(overrides, scenario, rebuild)
    return replace(request, topology=topology, settings=replace(request.settings, wire=wire))


def _rebuilt(overrides: list[str], scenario: str, rebuild: Rebuild) -> Request:
    """What is no field of the machine is one of the job, or misspelt: the error helps with both."""
    try:
        return rebuild(overrides)
    except ConfigError as error:
        names = [override.partition("=")[0] for override in overrides]
        known = [*_SHORT, *(entry.name for entry in fields(Topology))]
        hints = "".join(nearest_name(name, known) for name in names)
        first, *others = error.problems
        raise ConfigError([f"--what-if {scenario!r}{hints}: {first}", *others]) from None


def _wire(wire: WireDtypes, key: str, value: str) -> WireDtypes:
    if key == "wire":
        return WireDtypes(value, value)
    direction = key.partition(".")[2]
    if direction not in ("forward", "backward"):
        raise ConfigError(f"--what-if {key}: a wire has forward and backward"
                          f"{nearest_name(direction, ['forward', 'backward'])}")
    return replace(wire, forward=value) if direction == "forward" else \
        replace(wire, backward=value)


def _is_field(key: str) -> bool:
    first = key.split(".")[0]
    return first in _SHORT or first in {entry.name for entry in fields(Topology)}


def _change_topology(topology: Topology, key: str, value: str, scenario: str) -> Topology:
    """A field set, or moved by what follows its sign."""
    where, new = f"--what-if {scenario!r}: {key}", value if value not in ("none", "null") else None
    relative = _RELATIVE.fullmatch(value)
    if relative:
        amount, old = parse_quantity(relative[2]), _field(topology, key, where)
        if amount is None or (relative[1] == "/" and not amount):
            raise ConfigError(f"{where}: expected a number behind {relative[1]!r}, found "
                              f"{relative[2]!r}")
        new = _moved(old, relative[1], amount)
    *parents, last = key.split(".")
    values: dict[str, Any] = {last: new}
    for name in reversed(parents):
        values = {name: values}
    try:
        return change_fields(topology, values)
    except ConfigError as error:
        raise ConfigError([f"--what-if {scenario!r}: {problem}"
                           for problem in error.problems]) from None


def _field(topology: Topology, key: str, where: str) -> Any:
    found: Any = topology
    for name in key.split("."):
        if isinstance(found, Link) and name == "bytes_per_s":
            return dict(found.curve)
        if not is_dataclass(found) or not hasattr(found, name):
            known = [entry.name for entry in fields(found)] if is_dataclass(found) else []
            raise ConfigError(f"{where}: there is no {name!r}{nearest_name(name, known)} to "
                              f"change" + (f"; known: {', '.join(known)}" if known else ""))
        found = getattr(found, name)
    if not isinstance(found, (int, float)):
        raise ConfigError(f"{where}: is no number that could be moved; give a whole value")
    return found


def _moved(old: Any, sign: str, amount: float) -> Any:
    if isinstance(old, dict):  # a link's speed by message size
        return {size: _moved(speed, sign, amount) for size, speed in old.items()}
    new = {"+": old + amount, "-": old - amount, "x": old * amount,
           "/": old / amount if amount else old}[sign]
    return round(new) if isinstance(old, int) else new


def print_outcomes(console: Console, before: PlanResult, outcomes: Sequence[Outcome], *,
                   title: str = "What if", now: str = "now") -> None:
    """Prints the plan as it is beside every scenario: old and new, and the difference."""
    table = grid(title, ["", now], [], [outcome.scenario for outcome in outcomes])
    found = [outcome.result for outcome in outcomes]
    for name, value, text in _FIGURES:
        if not any(value(result) for result in (before, *found) if result):
            continue
        table.add_row(name, text(value(before)),
                      *(_against(value(before), value(result), text) if result
                        else "does not fit" for result in found))
    for index, phase in enumerate(PHASES):
        values = [result.slowest.phase_ms[index] if result else None for result in found]
        old = before.slowest.phase_ms[index]
        if old or any(values):
            table.add_row(f"  {phase}", number(old),
                          *("" if new is None else _against(old, new, number) for new in values))
    console.print(table)
    for outcome in outcomes:
        if outcome.result is not None:
            console.print(f"  {outcome.scenario}: {describe_moves(before, outcome.result)}")
        else:
            console.print(f"  {outcome.scenario}: {outcome.problem}")


def _against(old: float, new: float, text: Callable[[float], str]) -> str:
    if old == new:
        return f"{text(new)} (=)"
    if not old:
        return text(new)
    ratio = new / old
    change = f"x{ratio:.3g}" if ratio >= _TIMES else signed(new - old, f"{ratio - 1:.1%}")
    return f"{text(new)} ({change})"


def _tier(tier: str) -> Callable[[PlanResult], float]:
    return lambda result: max(getattr(size, tier) for size in result.hosts)


_FIGURES: list[tuple[str, Callable[[PlanResult], float], Callable[[float], str]]] = [
    ("ranks", lambda result: float(result.plan.job_ranks), lambda value: f"{value:.0f}"),
    ("samples/s", lambda result: result.samples_per_s,
     lambda value: rate_text(value).removesuffix(" samples/s")),
    ("slowest / average", lambda result: result.imbalance, number),
    ("fullest rank's hbm", lambda result: max(rank.bytes.hbm for rank in result.ranks),
     format_bytes),
    ("fullest host's ddr", _tier("ddr"), format_bytes),
    ("fullest host's ssd", _tier("ssd"), format_bytes),
    ("step", lambda result: result.step_ms, format_ms)]


def describe_moves(before: PlanResult, after: PlanResult) -> str:
    """Which tables another plan lays differently, in words."""
    old = {entry.table: (entry.sharding, len(entry.ranks), entry.exchange, entry.storage)
           for entry in before.tables}
    moved = [entry.table for entry in after.tables
             if old.get(entry.table) != (entry.sharding, len(entry.ranks), entry.exchange,
                                         entry.storage)]
    if not moved:
        return "every table keeps its choice"
    more = f" and {len(moved) - _SHOWN_MOVES} more" if len(moved) > _SHOWN_MOVES else ""
    return (f"{len(moved)} of {len(after.tables)} tables change: "
            f"{', '.join(moved[:_SHOWN_MOVES])}{more}")
