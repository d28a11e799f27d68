"""Whom this rank asks, and who asks it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shardlab.comm import Groups, WireBytes, Work
from shardlab.errors import PlanError
from shardlab.sharded.cells import Buffer, CellIndex
from shardlab.sharded.host_layouts import across_layout, inside_layout
from shardlab.sharded.layout import Layout
from shardlab.sharded.transfer import Transfers
from shardlab.sharded.two_stage import HostRelay


@dataclass(frozen=True)
class Path:
    """What ids, rows and gradients pass: all ranks, or in two stages this host and all hosts.

    The network is all ranks, or the hosts: what its members ask and answer is the same code.

    Attributes:
        groups: the ranks of the job.
        network: layout of the members of the network.
        cells: of the network.
        lane, ahead: the network's lanes of this batch, and of batches that come.
        transfers: between members of the network.
        asked, asked_cells: layout of those that this rank asks itself, and their cells.
        relay: in two stages, the stage inside this host.
    """

    groups: Groups
    network: Layout
    cells: CellIndex
    lane: Groups
    ahead: Groups
    transfers: Transfers
    asked: Layout
    asked_cells: CellIndex
    relay: HostRelay | None

    def send(self, buffer: Tensor, place: Buffer, wire: WireBytes, *, owner_sends: bool,
             ahead: bool = False) -> Work:
        """Starts to send what travels, and counts it.

        Args:
            buffer: uint8 [place.total].
            place: of the buffer.
            wire: counts the bytes.
            owner_sends: rows; else gradients.
            ahead: in the lane of batches that come.
        """
        groups = self.ahead if ahead else self.lane
        self.transfers.count(wire, place, groups, owner_sends=owner_sends)
        return self.transfers.start(buffer, place, groups, owner_sends=owner_sends)


def find_path(layout: Layout, groups: Groups, wire: WireBytes) -> Path:
    """The path of a plan.

    Args:
        layout: the compiled plan.
        groups: the ranks.
        wire: counts what the stage inside a host sends.

    Raises:
        PlanError: copies of hot rows beside two stages.
    """
    stages = groups.stages
    if stages is None:
        cells = CellIndex(layout)
        return Path(groups, layout, cells, groups, groups.ahead(), Transfers(cells), layout, cells,
                    None)
    if any(layout.hot_rows):
        raise PlanError("copies of hot rows are made beside a flat exchange only, and these "
                        "ranks have lanes for two stages; leave hot_rows or "
                        "`comm.with_stages` out")
    network = across_layout(layout, stages)
    cells = CellIndex(network)
    relay = HostRelay(inside_layout(layout, stages), cells, stages, wire)
    return Path(groups, network, cells, stages.across, stages.across_ahead, Transfers(cells),
                relay.layout, relay.cells, relay)
