"""Bytes and times against hand counts of the documented formulas."""

from __future__ import annotations

import numpy as np
import pytest

from shardlab.planner.enumerate import Options, enumerate_options
from shardlab.planner.estimate import PHASES, Costs, estimate
from shardlab.planner.topology import Topology, read_topology
from shardlab.planner.workload import Workload, build_workload
from shardlab.specs import (
    OPTIMIZER_STATE,
    EmbeddingBagConfig,
    ExchangeKind,
    ShardingType,
    Tier,
    tier_bytes,
)

BATCH = 100


def priced(table: EmbeddingBagConfig, topology: Topology,
           optimizer: str = "sgd") -> tuple[Options, Workload, Costs]:
    work = build_workload([table], topology.world_size, BATCH)
    options = enumerate_options([table], topology, work)
    return options, work, estimate([table], options, work, topology, optimizer)


def table_of(kind: str | None, exchange: str = "auto", *, rows: int = 1000, columns: int = 32,
             pooling: float = 3.0, features: tuple[str, ...] = ("f", "g")) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(rows, columns, "t", feature_names=features,
                              sharding=None if kind is None else ShardingType(kind),
                              exchange=ExchangeKind(exchange), pooling_factor=pooling)


@pytest.mark.parametrize("optimizer", OPTIMIZER_STATE)
def test_table_bytes_are_tier_bytes(optimizer: str) -> None:
    table = table_of(None, rows=1001, columns=48)
    options, _, costs = priced(table, read_topology("3xcpu"), optimizer)
    for rows, columns, size in zip(options.rows, options.columns, costs.table_bytes, strict=True):
        assert size == tier_bytes(table.storage, Tier.HBM, int(rows), int(columns),
                                  optimizer).total


def phases(costs: Costs, piece: int) -> dict[str, float]:
    return dict(zip(PHASES, costs.phase_ms[piece].tolist(), strict=True))


def test_rows_exchange_between_two_ranks() -> None:
    topology = read_topology("2xcpu")
    _, work, costs = priced(table_of("table_wise", "rows"), topology)
    unique, touched = float(work.unique[0]), float(work.step_unique[0])
    link, memory = topology.intra_host.bytes_per_s, topology.memory
    found = phases(costs, 0)
    vectors = 4 * unique * 32
    assert found["ids"] == pytest.approx(1e3 * (4 * unique + 8) / link)
    assert found["rows"] == found["grads"] == pytest.approx(1e3 * vectors / link)
    random = touched * (1 / memory.rows_per_s + 128 / memory.row_bytes_per_s)
    stream = 2 * vectors / memory.stream_bytes_per_s
    assert found["read"] == pytest.approx(1e3 * (topology.shard_overhead_s + random + stream))
    assert found["update"] == pytest.approx(
        1e3 * (2 * unique / memory.ids_per_s + 1.1 * random + stream))
    assert costs.buffer_bytes[0] == int(2 * (4 * unique + 8 + 2 * vectors))
    common = dict(zip(PHASES, costs.common_phase_ms[0].tolist(), strict=True))
    assert common["ids"] == pytest.approx(1e3 * 600 / memory.ids_per_s)
    assert common["pool"] == pytest.approx(
        1e3 * 128 * (2 * 600 + 200 + unique) / memory.stream_bytes_per_s)


def test_pooled_exchange_between_two_ranks() -> None:
    topology = read_topology("2xcpu")
    _, _, costs = priced(table_of("table_wise", "pooled"), topology)
    link, memory = topology.intra_host.bytes_per_s, topology.memory
    found = phases(costs, 0)
    assert found["ids"] == pytest.approx(1e3 * 2 * (4 * 300 + 4 * 100 + 8) / link)
    assert found["rows"] == found["grads"] == pytest.approx(1e3 * 2 * 4 * 100 * 32 / link)
    common = dict(zip(PHASES, costs.common_phase_ms[0].tolist(), strict=True))
    assert common["pool"] == pytest.approx(1e3 * 8 * 2 * 32 * 100 / memory.stream_bytes_per_s)


def test_pooled_exchange_of_row_blocks_sends_every_bag_from_each() -> None:
    topology = read_topology("4xcpu")
    options, _, costs = priced(table_of("row_wise", "pooled"), topology)
    whole = [2 * 4 * 100 * 32 * 3 * 1e3 / topology.intra_host.bytes_per_s] * 4
    last = options.pieces(len(options.cuts) - 1)
    np.testing.assert_allclose(costs.phase_ms[last, PHASES.index("rows")], whole)


def test_bags_of_one_id_need_no_lengths() -> None:
    _, _, costs = priced(table_of("table_wise", "pooled", pooling=1.0, features=("f",)),
                         read_topology("2xcpu"))
    assert phases(costs, 0)["ids"] == pytest.approx(1e3 * (4 * 100 + 8) / 2.0e9)


def test_row_blocks_share_the_work_of_the_whole() -> None:
    options, _, costs = priced(table_of("row_wise", "rows"), read_topology("4xcpu"))
    whole, overhead, count = None, 1e3 * 2e-6, 1e3 * 3 * 8 / 2.0e9
    for option in range(len(options.cuts)):
        pieces = options.pieces(option)
        parts = pieces.stop - pieces.start
        work = costs.ms[pieces].sum() - parts * (overhead + count)
        whole = work if whole is None else whole
        assert work == pytest.approx(whole)


def test_copies_send_gradients_only() -> None:
    topology = read_topology("2xcpu")
    _, work, costs = priced(table_of("data_parallel"), topology)
    unique = float(work.unique[0])
    for piece in range(2):
        found = phases(costs, piece)
        assert found["rows"] == 0
        assert found["grads"] == pytest.approx(1e3 * 4 * unique * 32 / 2.0e9)


def test_one_rank_sends_nothing() -> None:
    options, _, costs = priced(table_of(None), read_topology("h100"))
    assert options.pooled.all()
    assert costs.fixed_ms == 0
    assert [phases(costs, 0)[name] for name in ("ids", "rows", "grads")] == [0, 0, 0]
    assert costs.common_phase_ms[0, PHASES.index("pool")] == 0


def test_messages_take_their_latency() -> None:
    _, _, costs = priced(table_of(None), read_topology("3x2xcpu"))
    assert costs.fixed_phase_ms == pytest.approx(
        [2 * 5 * 0.165, 0, 5 * 0.165, 0, 5 * 0.165, 0])


def test_slower_of_two_links_counts() -> None:
    table = table_of("table_wise", "rows")
    for name, seconds_per_byte in (("2x4xh100", 4 / (50e9 * 230 / 300)),
                                   ("2x1xh100", 1 / (50e9 * 230 / 300)),
                                   ("1x8xh100", 7 / (450e9 * 230 / 300))):
        _, work, costs = priced(table, read_topology(name))
        assert phases(costs, 0)["rows"] == pytest.approx(
            1e3 * 4 * work.unique[0] * 32 * seconds_per_byte)


def test_large_shards_send_wide_ids() -> None:
    small, large = (phases(priced(table_of("table_wise", "rows", rows=rows, columns=1),
                                  read_topology("2xcpu"))[2], 0)["ids"]
                    for rows in (2**31 - 1, 2**31))
    assert large == pytest.approx(2 * small, rel=0.02)
