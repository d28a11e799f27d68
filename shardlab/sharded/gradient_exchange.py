"""Gradients on their way from the ranks that looked rows up to the owners of the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from shardlab.comm import WireBytes, Work
from shardlab.phases import WAIT
from shardlab.sharded.cells import Buffer
from shardlab.sharded.clock import PhaseClock
from shardlab.sharded.early import Asked
from shardlab.sharded.gradients import (
    PendingGradients,
    entry_bags,
    entry_weights,
    owner_chunks,
)
from shardlab.sharded.lookup import Lookup
from shardlab.sharded.path import Path
from shardlab.sharded.source_sums import SourceSlots, SourceSums
from shardlab.sharded.two_stage import Inside
from shardlab.sharded.urgent import PartedSender, Parting
from shardlab.sharded.wire_gradients import GradientSender, SlotSums


class GradientExchange:
    """Sums this rank's gradients per unique id and sends them to the owners.

    Args:
        path: to the owners.
        sender: encodes and decodes.
        clock: is told when a phase ends.
        wire: counts the bytes.
    """

    def __init__(self, path: Path, sender: GradientSender, clock: PhaseClock,
                 wire: WireBytes) -> None:
        self._path, self._cells, self._sender = path, path.cells, sender
        self._clock, self._wire = clock, wire
        self._parted = PartedSender(path.cells, sender, clock.lap)
        self._sources = SourceSlots(path.asked, path.asked_cells)

    def part(self, asked: Asked) -> Parting:
        """How the gradients of a batch part whose urgent ids are marked; from any thread."""
        return self._parted.plan(asked)

    def send(self, lookup: Lookup, grad: Tensor, *, behind: bool,
             parting: Parting | None) -> PendingGradients:
        """Starts to send the gradients of a batch.

        Args:
            lookup: of the forward.
            grad: fp32 [size, total columns], gradient of the sums of bags.
            behind, parting: as of `Exchange.backward`.
        """
        incoming = lookup.incoming
        sums: SlotSums = SourceSums(self._sources, lookup.own, grad)
        if parting is not None:
            pending = self._parted.send(parting, sums, grad.device, (self._now, self._behind))
            self._clock.lap("grads")
            return pending
        place = self._cells.backward(lookup.outgoing, incoming)
        buffer = torch.empty(place.total, dtype=torch.uint8, device=grad.device)
        if lookup.inside is not None:
            work = self._staged(lookup.inside, sums, (buffer, place), behind=behind)
        else:
            self._sender.encode(sums, place, buffer)
            self._clock.lap("pool")
            work = (self._behind if behind else self._now)(buffer, place)
        grads, start, work = self._sender.receive(buffer, place, work)
        chunks = owner_chunks(self._cells, incoming, start, None)
        self._clock.lap("grads")
        return PendingGradients(incoming.ids, chunks, entry_bags(incoming, self._cells),
                                entry_weights(incoming, self._cells), grads, work)

    def _staged(self, inside: Inside, sums: SlotSums, out: tuple[Tensor, Buffer], *,
                behind: bool) -> Work:
        """Merges the host's gradients and sends them, in a thread where there is one for it."""
        (buffer, place), path = out, self._path
        stages, relay = path.groups.stages, path.relay
        assert stages is not None
        assert relay is not None
        own, bound = relay.write(inside, sums, scaled=self._cells.scale_limit is not None)
        self._clock.lap("pool")

        def pass_on() -> Work:
            self._sender.encode(relay.collect(inside, own, bound), place, buffer)
            return path.transfers.start(buffer, place, stages.across_grads, owner_sends=False)

        if behind:  # optimiser steps do not wait, and random bits follow from their number
            self._sender.encode(relay.collect(inside, own, bound), place, buffer)
            self._clock.lap("grads")
            return self._behind(buffer, place)
        path.transfers.count(self._wire, place, path.lane, owner_sends=False)
        if stages.worker is None:
            return pass_on()
        return Work(stages.worker.submit(lambda: pass_on().wait()).result)

    def _now(self, buffer: Tensor, place: Buffer) -> Work:
        return self._path.send(buffer, place, self._wire, owner_sends=False)

    def _behind(self, buffer: Tensor, place: Buffer) -> Work:
        """In the thread that looks ahead, once the next batch has its rows."""
        path = self._path
        path.transfers.count(self._wire, place, path.lane, owner_sends=False)
        worker = path.groups.worker
        assert worker is not None
        number = worker.right_of_way.number()

        def send() -> None:
            lap = self._clock.other_thread().lap
            worker.right_of_way.wait(number)
            lap(WAIT)
            path.transfers.start(buffer, place, path.ahead, owner_sends=False).wait()
            lap("grads")

        sent = worker.submit(send)

        def finish() -> None:
            worker.right_of_way.give(number)
            sent.result()

        return Work(finish)
