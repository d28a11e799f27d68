"""``wire: auto``: measures every codec on the first batches, and takes the cheapest that is good.

Nothing is trained: rows are read, losses computed and gradients summed, and no step is taken. The
error of a codec is the largest relative error (L2) of any sampled row of any rank; it must stay
below ``wire.bound``. The same job, data and ranks give the same choice, and the run keeps it:
``plan.json`` has the codecs, ``wire.json`` the errors they were chosen by.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from shardlab.comm import Groups, gather_objects_json
from shardlab.plan import ShardingPlan
from shardlab.sharded.wire_watch import BACKWARD, FORWARD, WireWatch
from shardlab.storage_bytes import payload_bytes
from shardlab.storage_specs import DTYPES
from shardlab.table_plan import WireDtypes

if TYPE_CHECKING:
    from shardlab.config import JobConfig
    from shardlab.launch.readers import JobReader
    from shardlab.sharded import ShardedModel

#: Batches that are looked at, a fraction of a second.
BATCHES = 8
#: A width at which codecs are compared by bytes; no other width orders them differently.
_COLUMNS = 64
Errors = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True)
class Choice:
    """What was chosen, and by what.

    Attributes:
        plan: with the chosen codecs.
        errors: direction -> table -> codec -> largest relative error.
        lines: the choice in words.
    """

    plan: ShardingPlan
    errors: Errors
    lines: list[str]

    def to_json(self, bound: float) -> str:
        """What the run folder keeps."""
        chosen = {entry.table: {"forward": entry.wire.forward, "backward": entry.wire.backward}
                  for entry in self.plan.tables}
        return json.dumps({"bound": bound, "batches": BATCHES, "chosen": chosen,
                           "errors": self.errors}, indent=1) + "\n"


def choose_wire(job: JobConfig, plan: ShardingPlan, model: ShardedModel, reader: JobReader,
                groups: Groups) -> Choice:
    """Measures and chooses; every rank must call it, and all choose alike.

    Args:
        job: the job.
        plan: what the model executes.
        model: the sharded model; it ends with the chosen codecs and otherwise as it was.
        reader: of the training rows.
        groups: the ranks.
    """
    errors = _measure(plan, model, reader, groups)
    entries = []
    for entry in plan.tables:
        section = job.wire.tables.get(entry.table)
        wire = entry.wire
        for direction in (FORWARD, BACKWARD):
            own = None if section is None else getattr(section, direction)
            if (own or getattr(job.wire, direction)) == "auto":
                found = errors[direction].get(entry.table, {})
                codec = _cheapest(found, job.wire.bound)
                wire = replace(wire, **{direction: codec})  # type: ignore[arg-type]
        entries.append(replace(entry, wire=wire))
    chosen = replace(plan, tables=tuple(entries))
    for collection in model.collections().values():
        collection.change_wire(chosen)
    return Choice(chosen, errors, _lines(chosen, errors, job.wire.bound))


def _measure(plan: ShardingPlan, model: ShardedModel, reader: JobReader,
             groups: Groups) -> Errors:
    """Errors of every codec, the largest of all ranks."""
    watch = WireWatch(tuple(DTYPES), always=True)
    plain = replace(plan, tables=tuple(replace(entry, wire=WireDtypes(
        rounding=entry.wire.rounding)) for entry in plan.tables))
    for collection in model.collections().values():
        collection.change_wire(plain, watch)
    for batch in islice(reader, BATCHES):
        part = batch.to(groups.device)
        logits = model(part.dense, part.sparse).float()
        loss = functional.binary_cross_entropy_with_logits(logits, part.labels, reduction="sum")
        torch.autograd.backward(loss / reader.batch_size)
        for collection in model.collections().values():
            for pending in collection.pending:
                pending.work.wait()
            collection.pending.clear()
    for parameter in model.parameters():
        parameter.grad = None
    mine = [[*key, error] for key, error in sorted(watch.errors.items())]
    largest: Errors = {FORWARD: {}, BACKWARD: {}}
    for found in gather_objects_json(mine, groups):
        for direction, table, codec, error in found:
            codecs = largest[direction].setdefault(table, {})
            codecs[codec] = max(codecs.get(codec, 0.0), error)
    return largest


def _cheapest(errors: dict[str, float], bound: float) -> str:
    """The codec of fewest bytes below the bound, of equal ones the most exact; fp32 has no error.

    A table that no sample met stays fp32.
    """
    good = [codec for codec, error in errors.items() if error <= bound]
    return min(good, default="fp32",
               key=lambda codec: (payload_bytes(codec, _COLUMNS), errors[codec], codec))


def _lines(plan: ShardingPlan, errors: Errors, bound: float) -> list[str]:
    lines = [f"wire: auto, {BATCHES} batches, relative error of any row at most {bound:g}"]
    for direction, what in ((FORWARD, "rows"), (BACKWARD, "gradients")):
        by_codec: dict[str, list[str]] = {}
        for entry in plan.tables:
            by_codec.setdefault(getattr(entry.wire, direction), []).append(entry.table)
        for codec, tables in sorted(by_codec.items()):
            worst = max(errors[direction].get(table, {}).get(codec, 0.0) for table in tables)
            names = ", ".join(tables[:3]) + (", ..." if len(tables) > 3 else "")
            lines.append(f"  {what}: {codec} for {len(tables)} tables ({names}), error at most "
                         f"{worst:.2g}")
    return lines
