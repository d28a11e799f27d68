"""A plan seen in two stages: what ranks of a host ask each other, and what hosts ask each other.

Rank (h, l) is number l of host h. It asks shards of rank (g, k) through rank (h, k), its own host's
member of their column. *Inside* a host, number k thus answers for all shards of column k; *across*
hosts, it asks for its whole host. Both views are layouts, so all that a layout serves serves them:

    inside    world: the ranks of this host. Slots of number k: those of (g, k), hosts g in the
              order of `across`.
    across    world: the hosts. Slots of host g: those of (g, own number).

What this rank answers for inside is, in this order, what it asks across.
"""

from __future__ import annotations

from dataclasses import replace

from shardlab.comm import Stages
from shardlab.sharded.layout import Layout, Slot


def inside_layout(layout: Layout, stages: Stages) -> Layout:
    """Ranks of this host ask each other.

    A slot's block is its number among the slots of its column. Gradients travel as fp32: they are
    rounded once, when they leave the host.
    """
    places = [*(p for p in range(stages.ranks_per_host) if p != stages.place), stages.place]
    slots = [replace(slot, rank=place, block=number) for place in places
             for number, slot in enumerate(_column(layout, stages, place))]
    wires = tuple(replace(wire, backward="fp32", error_feedback=False) for wire in layout.wires)
    return replace(layout, rank=stages.place, world_size=stages.ranks_per_host,
                   slots=tuple(slots), wires=wires)


def across_layout(layout: Layout, stages: Stages) -> Layout:
    """Hosts ask each other, through the ranks of this rank's column."""
    slots = [replace(slot, rank=slot.rank // stages.ranks_per_host)
             for slot in _column(layout, stages, stages.place)]
    return replace(layout, rank=stages.host, world_size=stages.hosts, slots=tuple(slots))


def _column(layout: Layout, stages: Stages, place: int) -> list[Slot]:
    """Slots of the ranks of one number, other hosts ascending, then this one."""
    hosts = [*(h for h in range(stages.hosts) if h != stages.host), stages.host]
    return [slot for host in hosts
            for slot in layout.slots_of(host * stages.ranks_per_host + place)]
