"""What the user asked for, checked once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shardlab.errors import ConfigError, PlanError, nearest_name
from shardlab.planner.settings import PlanSettings
from shardlab.planner.topology import Topology
from shardlab.planner.units import format_bytes
from shardlab.planner.variants import storage_options
from shardlab.replication import replica_problem
from shardlab.specs import EmbeddingBagConfig, ShardingType, check_tables
from shardlab.storage_bytes import OPTIMIZER_STATE
from shardlab.storage_specs import DTYPES, RowsSpec, StorageSpec, Tier


@dataclass(frozen=True)
class Request:
    """A planning job.

    Attributes:
        tables: the tables.
        topology: the machine; of replica groups, the part that one has.
        batch_size: samples of one rank in one step.
        optimizer: sparse optimiser, a name of `storage_bytes.OPTIMIZER_STATE`.
        settings: everything else.
    """

    tables: tuple[EmbeddingBagConfig, ...]
    topology: Topology
    batch_size: int
    optimizer: str
    settings: PlanSettings

    @property
    def capacity(self) -> int:
        """Bytes of one rank's hbm for shards and exchange buffers."""
        return self.topology.capacity - self.settings.dense.bytes


def build_request(tables: Sequence[EmbeddingBagConfig], topology: Topology, batch_size: int,
                  optimizer: str, settings: PlanSettings) -> Request:
    """Checks the parts of a request.

    Raises:
        ConfigError: lists every problem: table clashes, unknown optimiser or wire dtype, a number
            that is not positive, ranks or tiers that the machine does not have.
        PlanError: the dense model leaves no room for tables.
    """
    check_tables(tables)
    problems = [*_setting_problems(batch_size, optimizer, settings)]
    for table in tables:
        problems += [f"table {table.name!r}: {problem}"
                     for problem in (*_table_problems(table, topology),
                                     *_replica_problems(table, settings))]
    if problems:
        raise ConfigError(problems)
    request = Request(tuple(tables), topology, batch_size, optimizer, settings)
    if request.capacity <= 0:
        raise PlanError(
            f"dense model: {format_bytes(settings.dense.bytes)} per rank leave no room for "
            f"tables: a rank of {topology.name} has {format_bytes(topology.capacity)} after its "
            f"reserve; smallest change: keep the dense model below "
            f"{format_bytes(topology.capacity)}")
    return request


def _setting_problems(batch_size: int, optimizer: str, settings: PlanSettings) -> Iterator[str]:
    if optimizer not in OPTIMIZER_STATE:
        yield (f"optimizer: unknown {optimizer!r}"
               f"{nearest_name(optimizer, list(OPTIMIZER_STATE))}; "
               f"known: {', '.join(OPTIMIZER_STATE)}")
    if batch_size < 1:
        yield f"batch_size: expected at least 1 sample per rank, found {batch_size}"
    dense = settings.dense
    for name, value in (("bytes", dense.bytes), ("parameters", dense.parameters),
                        ("flops_per_sample", dense.flops_per_sample),
                        ("activations_per_sample", dense.activations_per_sample),
                        ("update_bytes", dense.update_bytes), ("layers", dense.layers)):
        if not value >= 0:
            yield f"dense.{name}: expected at least 0, found {value}"
    if dense.dtype not in ("fp32", "bf16"):
        yield f"dense.dtype: expected fp32 or bf16, found {dense.dtype!r}"
    for name, dtype in (("forward", settings.wire.forward), ("backward", settings.wire.backward),
                        ("dense", dense.wire)):
        if dtype not in DTYPES:
            yield (f"wire.{name}: unknown dtype {dtype!r}{nearest_name(dtype, list(DTYPES))}; "
                   f"known: {', '.join(DTYPES)}")
    if settings.time_limit is not None and not settings.time_limit > 0:
        yield f"time_limit: expected a number of seconds above 0, found {settings.time_limit}"


def _table_problems(table: EmbeddingBagConfig, topology: Topology) -> Iterator[str]:
    if not table.pooling_factor > 0:
        yield f"pooling_factor must be above 0, found {table.pooling_factor!r}"
    absent = [rank for rank in table.ranks if rank >= topology.world_size]
    if absent:
        yield (f"asks for ranks {absent}; {topology.name} has ranks 0 to "
               f"{topology.world_size - 1}")
    elif table.ranks and table.allowed_sharding == (ShardingType.DATA_PARALLEL,) and \
            len(table.ranks) < topology.world_size:
        yield (f"asks for data_parallel, which copies it to every rank, and for ranks "
               f"{list(table.ranks)} only; leave out one of them")
    sizes = {Tier.DDR: topology.ddr_capacity, Tier.SSD: topology.ssd_capacity}
    for option in storage_options(table.storage):
        yield from (f"asks for tier {tier.value!r}; a host of {topology.name} has none"
                    for tier, size in sizes.items() if not size and tier in _asked_tiers(option))


def _replica_problems(table: EmbeddingBagConfig, settings: PlanSettings) -> Iterator[str]:
    """Storages whose copies in several replica groups cannot be kept alike."""
    if settings.replicas.groups > 1:
        for option in storage_options(table.storage):
            yield from filter(None, [replica_problem(option, settings.replicas.sync_every_steps)])


def _asked_tiers(spec: StorageSpec) -> set[Tier | None]:
    if isinstance(spec, RowsSpec):
        return {level.tier for level in spec.levels}
    return {spec.tier}
