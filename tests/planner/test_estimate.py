"""Bytes and times against hand counts of the documented formulas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shardlab.planner.costs import Priced
from shardlab.planner.enumerate import Options, enumerate_options
from shardlab.planner.estimate import PHASES, Pricer
from shardlab.planner.settings import DenseModel, PlanSettings
from shardlab.planner.topology import Link, Topology
from shardlab.planner.topology_file import read_topology
from shardlab.planner.workload import Workload, build_workload
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType
from shardlab.table_plan import WireDtypes
from tests.planner.fleets import request_for

BATCH = 100


def pricer_for(tables: list[EmbeddingBagConfig], topology: Topology,
               settings: PlanSettings | None = None, optimizer: str = "sgd") -> Pricer:
    request = request_for(tables, topology, BATCH, optimizer, settings)
    return Pricer(request, build_workload(tables, topology.world_size, BATCH))


def priced(table: EmbeddingBagConfig, topology: Topology,
           settings: PlanSettings | None = None) -> tuple[Options, Workload, Priced]:
    pricer = pricer_for([table], topology, settings)
    options = enumerate_options([table], topology)
    return options, pricer.work, pricer.price(options, np.arange(len(options)))


def table_of(kind: str | None, exchange: str = "rows", *, rows: int = 1000, columns: int = 32,
             pooling: float = 3.0, features: tuple[str, ...] = ("f", "g"),
             storage: object = "fp32") -> EmbeddingBagConfig:
    return EmbeddingBagConfig(rows, columns, "t", feature_names=features,
                              sharding=None if kind is None else ShardingType(kind),
                              exchange=ExchangeKind(exchange), pooling_factor=pooling,
                              storage=storage)  # type: ignore[arg-type]


def phases(costs: Priced, option: int, which: int = 0) -> dict[str, float]:
    return dict(zip(PHASES, costs.phase_ms[option, which].tolist(), strict=True))


def common(costs: Priced, option: int = 0) -> dict[str, float]:
    return dict(zip(PHASES, costs.common_phase_ms[option].tolist(), strict=True))


def per_byte(topology: Topology, message: float) -> float:
    """ms of a byte to the one other rank."""
    link = topology.intra_host
    return 1e3 * (float(link.seconds(message)) - link.latency_s) / message


def test_rows_exchange_between_two_ranks() -> None:
    topology = read_topology("2xcpu")
    _, work, costs = priced(table_of("table_wise"), topology)
    unique, touched = float(work.unique[0]), float(work.step_unique[0])
    link, memory = topology.intra_host.bytes_per_s, topology.hbm
    found = phases(costs, 0)
    vectors = 4 * unique * 32
    assert found["ids"] == pytest.approx(1e3 * (2 * unique + 4) / link)
    assert found["rows"] == found["grads"] == pytest.approx(1e3 * vectors / link)
    random = touched * float(memory.row_seconds(128))
    stream = 2 * vectors / memory.stream_bytes_per_s
    assert found["read"] == pytest.approx(1e3 * (topology.shard_overhead_s + random + stream))
    assert found["update"] == pytest.approx(
        1e3 * (2 * unique / memory.ids_per_s + memory.rewrite_factor * random + stream))
    assert found["prefetch"] == found["dense"] == found["overhead"] == 0
    assert costs.buffer_bytes[0] == int(2 * (2 * unique + 4 + 2 * vectors))
    assert common(costs)["ids"] == pytest.approx(1e3 * 600 / memory.ids_per_s)
    assert common(costs)["pool"] == pytest.approx(
        1e3 * 128 * (2 * 600 + 200 + unique) / memory.stream_bytes_per_s)


def test_pooled_exchange_between_two_ranks() -> None:
    topology = read_topology("2xcpu")
    _, _, costs = priced(table_of("table_wise", "pooled"), topology)
    link, memory = topology.intra_host.bytes_per_s, topology.hbm
    found = phases(costs, 0)
    assert found["ids"] == pytest.approx(1e3 * 2 * (2 * 300 + 100 + 4) / link)
    assert found["rows"] == found["grads"] == pytest.approx(1e3 * 2 * 4 * 100 * 32 / link)
    assert common(costs)["pool"] == pytest.approx(1e3 * 8 * 2 * 32 * 100
                                                  / memory.stream_bytes_per_s)


def test_pooled_exchange_of_row_blocks_sends_every_bag_from_each() -> None:
    topology = read_topology("4xcpu")
    _, _, costs = priced(table_of("row_wise", "pooled"), topology)
    whole = 2 * 4 * 100 * 32 * 3 * 1e3 / topology.intra_host.bytes_per_s
    np.testing.assert_allclose(costs.phase_ms[-1, :, PHASES.index("rows")], [whole, whole])


def test_bags_of_one_id_need_no_lengths() -> None:
    topology = read_topology("2xcpu")
    _, _, costs = priced(table_of("table_wise", "pooled", pooling=1.0, features=("f",)), topology)
    assert phases(costs, 0)["ids"] == pytest.approx(1e3 * (2 * 100 + 4) / 2.0e9)


@pytest.mark.parametrize("exchange", ["rows", "pooled"])
def test_row_blocks_share_the_work_of_the_whole(exchange: str) -> None:
    options, work, costs = priced(table_of("row_wise", exchange, rows=100_000),
                                  read_topology("4xcpu"))
    for option in range(len(options)):
        parts = int(options.row_parts[option])
        first, other = (phases(costs, option, which) for which in range(2))
        share = [phase["update"] for phase in (first, other)]
        assert share[0] > share[1]  # the fullest block
        if exchange == "rows":
            total = share[0] + (parts - 1) * share[1]
            whole = phases(priced(table_of("table_wise", rows=100_000),
                                  read_topology("4xcpu"))[2], 0)["update"]
            assert total == pytest.approx(whole)
        else:
            hot = float(work.access.fullest_block(np.array([0]), np.array([parts]))[0])
            assert hot > 1 / parts


def test_copies_send_gradients_only() -> None:
    topology = read_topology("2xcpu")
    _, work, costs = priced(table_of("data_parallel"), topology)
    unique = float(work.unique[0])
    found = phases(costs, 0)
    assert found["rows"] == 0
    assert found["grads"] == pytest.approx(1e3 * 4 * unique * 32 / 2.0e9)


def test_one_rank_sends_nothing() -> None:
    options, _, costs = priced(table_of(None, "auto"), read_topology("h100"))
    assert options.pooled.all()
    assert [phases(costs, 0)[name] for name in ("ids", "rows", "grads")] == [0, 0, 0]
    assert common(costs)["pool"] == 0


def test_messages_take_their_latency() -> None:
    topology = read_topology("3x2xcpu")
    pricer = pricer_for([table_of(None)], topology)
    fixed = dict(zip(PHASES, pricer.fixed_phase_ms.tolist(), strict=True))
    assert [fixed[name] for name in ("ids", "rows", "grads")] == pytest.approx(
        [2 * 5 * 0.165, 5 * 0.165, 5 * 0.165])
    assert fixed["overhead"] == 1e3 * topology.step_overhead_s
    assert fixed["dense"] == fixed["read"] == 0


def test_slower_of_two_links_counts() -> None:
    table = table_of("table_wise", rows=10**7, columns=256)
    base = read_topology("h100")
    plain = replace(base, intra_host=Link(((1.0, 345e9),), 0), inter_host=Link(((1.0, 38e9),), 0))
    for hosts, per_host, seconds_per_byte in ((2, 4, 4 / 38e9), (2, 1, 1 / 38e9),
                                              (1, 8, 7 / 345e9)):
        _, work, costs = priced(table, replace(plain, hosts=hosts, ranks_per_host=per_host))
        assert phases(costs, 0)["rows"] == pytest.approx(
            1e3 * 4 * work.unique[0] * 256 * seconds_per_byte)


def test_small_messages_travel_slower() -> None:
    small, large = (priced(table_of("table_wise", columns=columns), read_topology("8xh100"))
                    for columns in (4, 4096))
    rates = [phases(costs, 0)["rows"] / (4 * work.unique[0] * columns)
             for (_, work, costs), columns in ((small, 4), (large, 4096))]
    assert rates[0] > 1.2 * rates[1]


def test_large_shards_send_wide_ids() -> None:
    small, large = (phases(priced(table_of("table_wise", rows=rows, columns=1),
                                  read_topology("2xcpu"))[2], 0)["ids"]
                    for rows in (2**32, 2**32 + 1))
    assert large == pytest.approx(5 / 4 * small, rel=0.02)


def test_narrow_wires_carry_less_and_are_coded() -> None:
    topology = read_topology("2xcpu")
    wide = priced(table_of("table_wise"), topology)[2]
    narrow = priced(table_of("table_wise"), topology,
                    PlanSettings(wire=WireDtypes("bf16", "int8")))[2]
    _, work, _ = priced(table_of("table_wise"), topology)
    vectors, link = float(work.unique[0]), topology.intra_host.bytes_per_s
    encode, decode = (2 * vectors * 128 / speed for speed in (topology.encode_bytes_per_s,
                                                              topology.decode_bytes_per_s))
    assert phases(narrow, 0)["rows"] == pytest.approx(1e3 * (vectors * 64 / link + encode))
    assert phases(narrow, 0)["grads"] == pytest.approx(1e3 * (vectors * 33 / link + decode))
    assert common(narrow)["rows"] == pytest.approx(1e3 * decode / 2)
    assert common(narrow)["grads"] == pytest.approx(1e3 * encode / 2)
    assert phases(wide, 0)["rows"] > phases(narrow, 0)["rows"] / 2


def test_dense_part_takes_products_and_a_sum() -> None:
    topology = read_topology("4xh100")
    dense = DenseModel(bytes=1 << 30, parameters=10**7, flops_per_sample=1e6, dtype="bf16")
    pricer = pricer_for([table_of(None)], topology, PlanSettings(dense=dense))
    products = BATCH * 1e6 / topology.bf16_flops_per_s
    reduce = float(topology.intra_host.seconds(4e7 / 4, 2 * 3))
    copies = 4 * 4e7 / topology.hbm.stream_bytes_per_s
    assert pricer.dense_ms == pytest.approx(1e3 * (products / 3 + reduce + copies))
    assert pricer.window_ms == pricer.dense_ms
    many = pricer_for([table_of(None)], replace(topology, hosts=5), PlanSettings(dense=dense))
    between = float(topology.inter_host.seconds(1e7 / 5, 2 * 4))
    assert many.dense_ms == pytest.approx(pricer.dense_ms + 1e3 * between)
    cpu = read_topology("4xcpu")
    slow = pricer_for([table_of(None)], cpu, PlanSettings(dense=dense))
    assert slow.dense_ms == pytest.approx(1e3 * (
        BATCH * 1e6 / cpu.bf16_flops_per_s + float(cpu.intra_host.seconds(1e7, 6))
        + 4 * 4e7 / cpu.hbm.stream_bytes_per_s))
    assert slow.window_ms == 0


def test_a_codec_of_dense_gradients_shortens_their_sum() -> None:
    size = 4e7
    for name in ("4xcpu", "4xh100"):
        topology = read_topology(name)
        plain, coded = (pricer_for([table_of(None)], topology, PlanSettings(dense=DenseModel(
            parameters=10**7, wire=wire))).dense_ms for wire in ("fp32", "int8"))
        link = topology.intra_host
        saved = float(link.seconds(size / 4, 6)) - float(link.seconds(size * 258 / 1024 / 4, 6))
        work = size / topology.encode_bytes_per_s + 1.75 * size / topology.decode_bytes_per_s
        assert coded == pytest.approx(plain + 1e3 * (work - saved))
    # Of several ranks on several hosts, only what crosses is encoded.
    hosts = replace(read_topology("4xcpu"), hosts=2)
    plain, coded = (pricer_for([table_of(None)], hosts, PlanSettings(dense=DenseModel(
        parameters=10**7, wire=wire))).dense_ms for wire in ("fp32", "int8"))
    link, part = hosts.inter_host, size / 4 / 2
    saved = float(link.seconds(part, 2)) - float(link.seconds(part * 258 / 1024, 2))
    work = size / hosts.encode_bytes_per_s + 1.875 * size / hosts.decode_bytes_per_s
    assert coded == pytest.approx(plain + 1e3 * (work - saved))


@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4), ("bf16", 2)])
def test_thin_layers_and_the_optimiser_move_bytes(dtype: str, size: int) -> None:
    topology = read_topology("1xcpu")
    dense = DenseModel(parameters=100, activations_per_sample=3000.0, update_bytes=10**6,
                       dtype=dtype)
    found = pricer_for([table_of(None)], topology, PlanSettings(dense=dense)).dense_ms
    assert found == pytest.approx(
        1e3 * (BATCH * size * 3000 + 10**6) / topology.hbm.stream_bytes_per_s)


@pytest.mark.parametrize("exchange", ["rows", "pooled"])
def test_row_wise_optimisers_gather_squares_of_columns_apart(exchange: str) -> None:
    """Each of C column blocks sends 4 bytes of every touched row to the C - 1 others."""
    topology, table = read_topology("4xcpu"), table_of("column_wise", exchange)
    options = enumerate_options([table], topology)
    found = {}
    for optimizer in ("adagrad", "row_wise_adagrad"):
        pricer = pricer_for([table], topology, optimizer=optimizer)
        work, costs = pricer.work, pricer.price(options, np.arange(len(options)))
        assert (options.col_parts > 1).any()
        found[optimizer] = costs.phase_ms[:, 0, PHASES.index("update")]
    memory, touched = topology.hbm, float(work.step_unique[0])
    for option, (parts, width) in enumerate(zip(options.col_parts, options.columns, strict=True)):
        answers = 2 * 400 if exchange == "pooled" else float(work.unique[0])
        squares = 4 * width * (4 * answers + 4 * touched) / memory.stream_bytes_per_s + \
            (parts - 1) * 4 * touched / topology.intra_host.bytes_per_s
        # State of whole rows is one number, and state of elements one each.
        rows = touched * memory.rewrite_factor * (
            float(memory.row_seconds(8 * width)) - float(memory.row_seconds(4 * width + 4)))
        assert found["row_wise_adagrad"][option] - found["adagrad"][option] == pytest.approx(
            1e3 * ((squares if parts > 1 else 0.0) - rows))


def test_caches_are_filled_for_what_they_miss() -> None:
    topology = read_topology("8xh100")
    levels = [{"dtype": "fp32", "tier": "hbm", "fraction": 0.1}, {"dtype": "fp32", "tier": "ddr"}]
    cached = table_of("table_wise", rows=10**6, storage={"levels": levels})
    near, far = (table_of("table_wise", rows=10**6, storage={"dtype": "fp32", "tier": tier})
                 for tier in ("hbm", "ddr"))
    (_, work, costs), plain, deep = (priced(table, topology) for table in (cached, near, far))
    found = phases(costs, 0)
    missed = min(float(work.step_unique[0]), 8 * 600 * float(
        work.access.miss_ratio(np.array([0]), np.array([1e5]))[0]))
    assert topology.device_host is not None
    row = 2 * float(topology.hbm.row_seconds(128)) + 2 * float(topology.ddr.row_seconds(128)) + \
        128 / topology.device_host.bytes_per_s
    assert found["prefetch"] == pytest.approx(1e3 * missed * row)
    assert found["read"] == pytest.approx(phases(plain[2], 0)["read"])
    assert phases(deep[2], 0)["read"] > found["read"]
    assert phases(deep[2], 0)["prefetch"] == 0


def test_bytes_of_buffers_are_part_of_a_piece() -> None:
    topology = read_topology("2xcpu")
    pricer = pricer_for([table_of("table_wise")], topology)
    options = enumerate_options([table_of("table_wise")], topology)
    costs, detail = pricer.costs(options), pricer.price(options, np.array([0]))
    assert costs.piece_bytes[0].tolist() == [1000 * 128 + detail.buffer_bytes[0], 0, 0]
    assert costs.busy_ms[0, 0] == pytest.approx(detail.phase_ms[0, 0].sum())
    assert costs.common_ms[0] == pytest.approx(detail.common_phase_ms[0].sum())
    assert costs.fixed_ms == pytest.approx(pricer.fixed_phase_ms.sum())
