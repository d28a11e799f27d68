"""TorchRec's own cost model, so that one search can also plan by it and plans can be compared.

The formulas are those of ``EmbeddingPerfEstimator`` and ``EmbeddingStorageEstimator`` of TorchRec
1.8 for training with pooled features, fp32 rows and no optimiser state. With B samples and L ids a
bag on each of W devices, w of them on a host, a shard of d columns; sizes in bytes, i = L B / k
ids of k row blocks, o = min(1, L) B bags:

    forward     (8 i W + 4 d i W + 4 d o W) x penalty / bandwidth of the kernel
    backward    twice the forward
    exchange    4 d o W / link, both ways; row blocks: also a copy of 2.455 of it backward;
                table_row_wise: within the host, and 4 d o W / w between hosts
    hbm         rows of the shard + 8 i W + 4 d o W

A device has its own share of the host's memory (ddr). Of row blocks that differ by a row, all are
counted as the largest.

Source: torchrec/distributed/planner (perf and storage estimators, storage reservations).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardlab.planner.costs import Costs
from shardlab.planner.enumerate import SHARDING_TYPES, Options
from shardlab.planner.placement import Problem, Ranks
from shardlab.planner.variants import Variant
from shardlab.specs import EmbeddingBagConfig, ShardingType
from shardlab.storage_specs import LevelSpec, RowsSpec, Tier

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_INDEX_BYTES, _ELEMENT_BYTES = 8, 4
# Constants of TorchRec's planner.
_CACHE_SHARE = 0.2
_CACHE_ROW_BYTES, _CACHE_SLOT_BYTES = 4, 16
_BATCHED_COPY = 2.455
_DATA_PARALLEL_COPIES = 9.22
_DENSE_SHARE = 0.5
_UVM_SHARE = 0.1
_BACKWARD = 2
_MIN_COLUMNS = 128
_SMALLEST_LOOKUP = 32
_RESERVED_SHARE, _BATCH_COPIES = 0.15, 20


@dataclass(frozen=True)
class TorchRecMachine:
    """Equal devices as TorchRec's topology describes them; bandwidths in bytes per ms.

    Attributes:
        devices: how many.
        local_world_size: devices of a host.
        hbm_bytes: of a device, before TorchRec's reserve.
        ddr_bytes: host memory of a device.
        hbm_bandwidth: of device memory.
        hbm_to_ddr_bandwidth: between device and host memory.
        intra_host_bandwidth: between devices of a host.
        inter_host_bandwidth: between hosts.
    """

    devices: int
    local_world_size: int
    hbm_bytes: int
    ddr_bytes: int
    hbm_bandwidth: float
    hbm_to_ddr_bandwidth: float
    intra_host_bandwidth: float
    inter_host_bandwidth: float


# Kernels fused, fused_uvm and fused_uvm_caching, as storages.
_FUSED, _UVM, _CACHED = range(3)
_VARIANTS = tuple(Variant(RowsSpec(levels), 0) for levels in (
    (LevelSpec(tier=Tier.HBM),), (LevelSpec(tier=Tier.DDR),),
    (LevelSpec(tier=Tier.HBM, fraction=_CACHE_SHARE), LevelSpec(tier=Tier.DDR))))
KERNELS = ("fused", "fused_uvm", "fused_uvm_caching")


@dataclass(frozen=True)
class TorchRecModel:
    """Prices tables as TorchRec does.

    Attributes:
        tables: the tables; pooling factors count, everything else that a table asks for does not.
        machine: the devices.
        batch_size: samples of a device in a step.
    """

    tables: Sequence[EmbeddingBagConfig]
    machine: TorchRecMachine
    batch_size: int

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Tiers that TorchRec chooses from."""
        return (Tier.HBM, Tier.DDR)

    @property
    def capacity(self) -> int:
        """Bytes of a device that are left for tables: without 15 %, and 20 copies of a batch."""
        ids = sum(table.pooling_factor * self.batch_size for table in self.tables)
        return int((1 - _RESERVED_SHARE) * self.machine.hbm_bytes) - \
            _BATCH_COPIES * int(np.ceil(ids * _INDEX_BYTES))

    def problem(self, tiers: tuple[Tier, ...]) -> Problem:
        """The search problem; without `Tier.DDR` among ``tiers`` all tables lie on hbm."""
        options = self._options(Tier.DDR in tiers)
        machine = self.machine
        ranks = Ranks(machine.devices, machine.local_world_size, 1, self.capacity,
                      (machine.ddr_bytes, 0))
        return Problem(options, self._costs(options), ranks)

    def _cuts(self, table: EmbeddingBagConfig) -> Iterator[tuple[ShardingType, int, int, int]]:
        """(type, row blocks, column blocks, group) of every way to shard a table."""
        devices, host = self.machine.devices, self.machine.local_world_size
        blocks = table.embedding_dim // _MIN_COLUMNS \
            if table.embedding_dim % _MIN_COLUMNS == 0 else 1
        yield ShardingType.DATA_PARALLEL, 1, 1, 0
        yield ShardingType.TABLE_WISE, 1, 1, 0
        yield ShardingType.ROW_WISE, devices, 1, 0
        if devices > host:
            yield ShardingType.TABLE_ROW_WISE, host, 1, host
        if blocks > 1:
            yield ShardingType.COLUMN_WISE, 1, blocks, 0
            if devices > host and blocks <= host:
                yield ShardingType.TABLE_COLUMN_WISE, 1, blocks, blocks

    def _options(self, with_ddr: bool) -> Options:
        rows: list[tuple[int, ...]] = []
        counts = []
        for index, table in enumerate(self.tables):
            before = len(rows)
            for kind, row_parts, col_parts, group in self._cuts(table):
                copied = kind is ShardingType.DATA_PARALLEL
                pieces = self.machine.devices if copied else row_parts * col_parts
                rows += [(index, SHARDING_TYPES.index(kind), row_parts, col_parts, pieces, group,
                          variant, -(-table.num_embeddings // row_parts),
                          table.embedding_dim // col_parts)
                         for variant in ((_FUSED,) if copied or not with_ddr
                                         else range(len(_VARIANTS)))]
            counts.append(len(rows) - before)
        table, sharding, row_parts, col_parts, pieces, group, variant, height, width = \
            np.array(rows, dtype=np.int64).T
        return Options(_VARIANTS, np.concatenate([[0], np.cumsum(counts)]), table, sharding,
                       row_parts, col_parts, pieces, group, np.ones(len(rows), dtype=bool), variant,
                       height, width)

    def _costs(self, options: Options) -> Costs:
        world = self.machine.devices
        bags_per_id = np.array([table.pooling_factor for table in self.tables])[options.table]
        copied = options.copied
        # A copy sees its own batch only.
        sources = np.where(copied, 1, world)
        ids = bags_per_id * self.batch_size * sources / options.row_parts
        bags = np.minimum(bags_per_id, 1.0) * self.batch_size * sources
        indices = np.ceil(_INDEX_BYTES * ids)
        outputs = _ELEMENT_BYTES * options.columns * bags
        by_rows = options.row_parts > 1
        whole = ~by_rows & ~copied
        lookups = _ELEMENT_BYTES * ids * np.where(
            whole, np.maximum(options.columns, _SMALLEST_LOOKUP), options.columns)
        bandwidth = self._bandwidth(options)
        penalty = np.where(whole, _penalty(options.columns), 1.0)
        forward = (indices + lookups + outputs) * penalty / bandwidth
        exchange = self._exchange(options, outputs)
        backward = np.where(by_rows, _BATCHED_COPY * outputs / bandwidth, 0.0) + \
            np.where(copied, self._all_reduce(options, bandwidth), exchange)
        ms = forward * (1 + _BACKWARD) + np.where(copied, 0.0, exchange) + backward
        size = np.zeros((len(options), 3), dtype=np.int64)
        table_bytes = _ELEMENT_BYTES * options.rows * options.columns
        cached = np.ceil(_CACHE_SHARE * table_bytes) + np.ceil(
            options.rows * (_CACHE_ROW_BYTES + _CACHE_SHARE * _CACHE_SLOT_BYTES))
        held = np.choose(options.variant, [table_bytes, np.zeros(len(options)), cached])
        size[:, 0] = np.ceil(held + indices + outputs)
        size[:, 1] = np.where(options.variant == _FUSED, 0, table_bytes)
        nothing = np.zeros(len(options))
        return Costs(np.stack([ms, ms], axis=1), np.zeros((len(options), 2)), nothing, size,
                     nothing.astype(np.int64), 0.0)

    def _bandwidth(self, options: Options) -> Floats:
        hbm, link = self.machine.hbm_bandwidth, self.machine.hbm_to_ddr_bandwidth
        kernels = np.array([hbm, _UVM_SHARE * link,
                            _UVM_SHARE * (_CACHE_SHARE * hbm + (1 - _CACHE_SHARE) * link)])
        return np.asarray(np.where(options.copied, _DENSE_SHARE * hbm, kernels[options.variant]))

    def _exchange(self, options: Options, outputs: Floats) -> Floats:
        machine = self.machine
        hosts = machine.devices // machine.local_world_size
        wide = machine.intra_host_bandwidth if hosts <= 1 else machine.inter_host_bandwidth
        between = outputs / machine.local_world_size / machine.inter_host_bandwidth \
            if hosts > 1 else 0.0
        hosted = options.sharding == SHARDING_TYPES.index(ShardingType.TABLE_ROW_WISE)
        return np.where(hosted, outputs / machine.intra_host_bandwidth + between, outputs / wide)

    def _all_reduce(self, options: Options, bandwidth: Floats) -> Floats:
        machine = self.machine
        size = _ELEMENT_BYTES * options.rows * options.columns
        hosts = min(machine.devices / machine.local_world_size, 2)
        reduce = size * (2 * hosts - 1) / hosts / (
            machine.inter_host_bandwidth * machine.local_world_size)
        if machine.devices > 2 * machine.local_world_size:
            reduce = 2 * reduce
        return reduce + size * _DATA_PARALLEL_COPIES / bandwidth


def _penalty(columns: Ints) -> Floats:
    """Of blocks of threads that narrow rows leave partly idle."""
    return np.where(columns >= 128, 1.0, np.where(columns >= 64, 1.15, 1.75))
