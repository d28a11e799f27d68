"""What an exchange in two stages would send and take, beside the flat one.

With W ranks on H hosts of L, a shard's owner has W - L askers on other hosts if every rank asks it,
and H - 1 if hosts do. A rank asks u different rows of a table and a host v, u <= v <= L u; of the s
that lie in the shard travel, per asker of unique rows,

    ids   s i + 4 B        rows   s vectors        grads   s vectors

(`estimate` has the rest: pooled bags, replicas). In two stages hosts' rows travel across, and
inside each of H hosts ranks' rows to and from the L - 1 others, gradients as fp32. Pooled bags are
not united: they cross as often as flat, and travel inside as well. Times of a mean rank:

    flat       max(inside, across), de-duplicate and pass u rows and gradients at their owners
    two_stage  inside + across, de-duplicate and pass v / L at owners, u twice on the way, and the
               bookkeeping of a step once more
"""

from __future__ import annotations

from dataclasses import dataclass

from shardlab.plan import ShardingPlan
from shardlab.planner.request import Request
from shardlab.planner.speeds import Speeds
from shardlab.planner.topology import Link
from shardlab.planner.units import format_bytes
from shardlab.planner.workload import Workload, build_workload
from shardlab.specs import ExchangeKind
from shardlab.storage_bytes import payload_bytes
from shardlab.table_plan import TablePlan
from shardlab.wire_bytes import HEAD_NUMBER_BYTES, id_bytes

_FP32_BYTES = 4
#: Of a step: heads, ids, rows, gradients.
_MESSAGES = 4
_MS = 1e3
#: Ranks of a host wait for each other once more in every direction, which no byte count shows: on
#: two busy cores, predictions within a tenth of each other went either way.
_WORTH = 0.9


@dataclass(frozen=True)
class ExchangeCost:
    """A step's exchange.

    Attributes:
        across_bytes, inside_bytes: what all ranks send to other hosts, and to ranks of their own.
        ms: of a mean rank.
    """

    across_bytes: float
    inside_bytes: float
    ms: float


@dataclass(frozen=True)
class HierarchyCosts:
    """Both ways of a plan's exchange."""

    flat: ExchangeCost
    two_stage: ExchangeCost

    @property
    def two_stage_pays(self) -> bool:
        """Whether two stages take so much less time that waiting twice is made up for."""
        return self.two_stage.ms < _WORTH * self.flat.ms

    def in_words(self) -> str:
        """Both ways in one line."""
        staged, flat = self.two_stage, self.flat
        return (f"two stages send {format_bytes(staged.across_bytes)} across hosts a step, flat "
                f"{format_bytes(flat.across_bytes)}, expected to take {staged.ms:.3g} and "
                f"{flat.ms:.3g} ms")


@dataclass
class _Volume:
    """Sums over shards: bytes of one asker elsewhere, and what sorting and passing takes."""

    flat: float = 0.0  # one rank asks
    host: float = 0.0  # one host asks
    inside: float = 0.0  # one rank asks a rank of its host: gradients are fp32
    ids: float = 0.0
    host_ids: float = 0.0
    passed: float = 0.0
    host_passed: float = 0.0


def compare_hierarchies(plan: ShardingPlan, request: Request) -> HierarchyCosts:
    """Expected bytes and time of a plan's exchange, flat and in two stages.

    Args:
        plan: of the request's tables; codecs are its own.
        request: machine (hosts and ranks of it count), batch and statistics.
    """
    topology = request.topology
    work = build_workload(request.tables, topology.world_size, request.batch_size,
                          request.settings.statistics)
    per_host = work.access.unique(topology.ranks_per_host * request.batch_size)
    number = {table.name: t for t, table in enumerate(request.tables)}
    volume = _Volume()
    for entry in plan.tables:
        _add(volume, entry, work, number[entry.table], float(per_host[number[entry.table]]),
             topology.ranks_per_host)
    return _costs(volume, Speeds(topology))


def _add(volume: _Volume, entry: TablePlan, work: Workload, table: int, per_host: float,
         ranks_per_host: int) -> None:
    """Adds a table's shards."""
    features, bags = float(work.features[table]), float(work.bags[table])
    ids = features * float(work.ids[table])
    told = any(shard.rows < work.rows[table] for shard in entry.shards) or \
        work.ids[table] != work.bags[table]
    pooled = entry.exchange is ExchangeKind.POOLED and not entry.replicated
    for shard in entry.shards:
        share, width = shard.rows / float(work.rows[table]), id_bytes(shard.rows)
        forward = 0 if entry.replicated else payload_bytes(entry.wire.forward, shard.columns)
        backward = payload_bytes(entry.wire.backward, shard.columns)
        fp32 = _FP32_BYTES * shard.columns
        if pooled:
            asked, vectors = ids * share, features * bags
            head = features * (HEAD_NUMBER_BYTES + bags * told)
            host_asked, host_vectors = ranks_per_host * asked, ranks_per_host * vectors
            host_head = head * ranks_per_host
        else:
            asked = vectors = float(work.unique[table]) * share
            host_asked = host_vectors = per_host * share
            head = host_head = float(HEAD_NUMBER_BYTES)
        volume.flat += asked * width + head + vectors * (forward + backward)
        volume.host += host_asked * width + host_head + host_vectors * (forward + backward)
        volume.inside += asked * width + head + vectors * (forward + fp32)
        volume.ids += asked
        volume.host_ids += host_asked
        volume.passed += vectors * (forward + fp32)
        volume.host_passed += host_vectors * (forward + fp32)


def _costs(volume: _Volume, speeds: Speeds) -> HierarchyCosts:
    topology = speeds.topology
    hosts, size, world = topology.hosts, topology.ranks_per_host, speeds.world
    flat = ((world - size) * volume.flat, (size - 1) * volume.flat)
    staged = ((hosts - 1) * volume.host, hosts * (size - 1) * volume.inside)
    at_owner = speeds.sort * volume.ids + speeds.stream * volume.passed
    # Of the host's askers an owner has 1 / size as many; u rows pass twice more on their way.
    relayed = (speeds.sort * volume.host_ids + speeds.stream * volume.host_passed) / size + \
        speeds.sort * volume.ids + 2 * speeds.stream * volume.passed
    flat_ms = max(_link_ms(topology.inter_host, flat[0] / world, world - size),
                  _link_ms(topology.intra_host, flat[1] / world, size - 1))
    staged_ms = _link_ms(topology.inter_host, staged[0] / world, hosts - 1) + \
        _link_ms(topology.intra_host, staged[1] / world, size - 1)
    staged_ms += speeds.overhead
    return HierarchyCosts(ExchangeCost(*flat, flat_ms + at_owner),
                          ExchangeCost(*staged, staged_ms + relayed))


def _link_ms(link: Link, sent: float, peers: int) -> float:
    """ms to send so many bytes in a step's messages to so many peers."""
    messages = _MESSAGES * peers
    return _MS * float(link.seconds(sent / messages, messages)) if messages else 0.0
