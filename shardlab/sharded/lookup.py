"""A batch on its way through the exchange."""

from __future__ import annotations

from dataclasses import dataclass

from shardlab.comm import WireBytes, Work
from shardlab.sharded.early import EarlyRows
from shardlab.sharded.inputs import Batch
from shardlab.sharded.messages import Incoming
from shardlab.sharded.routes import Outgoing
from shardlab.sharded.two_stage import Inside


@dataclass(frozen=True)
class Lookup:
    """What a forward leaves for its backward, and `Exchange.look_ahead` for the forward."""

    outgoing: Outgoing  # in two stages: what this rank asks of the hosts
    incoming: Incoming
    early: EarlyRows | None = None
    sent: WireBytes | None = None
    inside: Inside | None = None  # in two stages: what came before that, on this host
    late: Work | None = None  # late rows that are on their way already

    @property
    def own(self) -> Outgoing:
        """What this rank asks for itself."""
        return self.outgoing if self.inside is None else self.inside.own

    @property
    def batch(self) -> Batch:
        """The batch that was looked up."""
        return self.own.batch
