"""The planner's face: properties of its plans, determinism, speed and weight."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from shardlab.errors import ConfigError, PlanError
from shardlab.planner import plan
from shardlab.planner.estimate import PHASES
from shardlab.planner.plan_file import plan_to_json
from shardlab.planner.result import PlanResult
from shardlab.planner.settings import DenseModel, PlanSettings
from shardlab.planner.topology_file import read_topology
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType
from shardlab.storage_bytes import OPTIMIZER_STATE, TierBytes, tier_bytes
from shardlab.storage_specs import RowsSpec
from shardlab.table_plan import TablePlan
from tests.planner.fleets import generated_fleet, machine, tiered

STORAGES = ["fp32", "fp32", "int8", {"dtype": "fp32", "tier": "ddr"}, {"choose": ["fp32", "bf16"]},
            {"levels": [{"dtype": "fp32", "fraction": 0.1}, {"dtype": "fp16"}]},
            {"kind": "pruned", "budget": {"ratio": 0.2}}, {"kind": "tensor_train", "rank": 4}]
tables_of_any_kind = st.lists(st.tuples(
    st.integers(1, 200_000), st.integers(1, 80), st.sampled_from([0.3, 1.0, 7.0, 60.0]),
    st.integers(1, 3),
    st.sampled_from([None, None, None, *ShardingType, ("table_wise", "column_wise")]),
    st.sampled_from(list(ExchangeKind)), st.sampled_from(STORAGES),
    st.sampled_from([None, None, 1, 2])), min_size=1, max_size=12)


def build(drawn: list[tuple], ranks: dict[int, tuple[int, ...]]) -> list[EmbeddingBagConfig]:
    return [EmbeddingBagConfig(rows, columns, f"t{i}", pooling_factor=pooling, sharding=sharding,
                               feature_names=tuple(f"f{i}_{j}" for j in range(features)),
                               exchange=exchange, storage=storage, max_column_splits=splits,
                               ranks=ranks.get(i, ()) if sharding != "data_parallel" else ())
            for i, (rows, columns, pooling, features, sharding, exchange, storage, splits)
            in enumerate(drawn)]


def check(result: PlanResult, tables: list[EmbeddingBagConfig], optimizer: str) -> None:
    world = result.topology.world_size
    result.plan.check(tables, world)
    held = [TierBytes()] * world
    for table, entry, told in zip(tables, result.plan.tables, result.tables, strict=True):
        check_wishes(table, entry)
        assert told.preferences > told.preference
        for shard in entry.shards:
            assert shard.bytes == tier_bytes(entry.storage, shard.rows, shard.columns, optimizer)
            held[shard.rank] = held[shard.rank] + shard.bytes
        if entry.sharding in (ShardingType.TABLE_ROW_WISE, ShardingType.TABLE_COLUMN_WISE):
            assert len({shard.rank // result.topology.ranks_per_host
                        for shard in entry.shards}) == 1
    for rank, size in zip(result.ranks, held, strict=True):
        assert rank.held.total == size
        assert rank.bytes == size + TierBytes(hbm=rank.buffer_bytes + rank.dense_bytes)
        assert size.hbm + rank.buffer_bytes <= result.capacity
        assert rank.ms <= result.step_ms
    for host in result.hosts:
        assert host.ddr <= result.host_capacity.ddr
        assert host.ssd <= result.host_capacity.ssd
    work = sum(entry.work_ms for entry in result.tables)
    fixed = sum(rank.ms + rank.hidden_ms for rank in result.ranks) - work
    assert fixed >= -1e-6 * work
    assert result.lower_bound_ms <= result.step_ms * (1 + 1e-9)
    assert result.step_ms <= result.barrier_ms * (1 + 1e-9)


def check_wishes(table: EmbeddingBagConfig, entry: TablePlan) -> None:
    assert not table.allowed_sharding or entry.sharding in table.allowed_sharding
    assert entry.exchange is not ExchangeKind.AUTO
    if table.exchange is not ExchangeKind.AUTO and not entry.replicated:
        assert entry.exchange is table.exchange
    if table.ranks:
        assert {shard.rank for shard in entry.shards} <= set(table.ranks)
    if table.max_column_splits:
        assert len({shard.col_start for shard in entry.shards}) <= table.max_column_splits
    asked = table.storage
    if isinstance(asked, RowsSpec) and asked.home.tier:
        assert entry.storage == asked
    if isinstance(asked, RowsSpec):
        assert isinstance(entry.storage, RowsSpec)
        assert entry.storage.home.dtype == asked.home.dtype


@hypothesis.given(drawn=tables_of_any_kind, optimizer=st.sampled_from(list(OPTIMIZER_STATE)),
                  name=st.sampled_from(["cpu", "3xcpu", "2x2xcpu", "2x4xh100"]),
                  limited=st.sampled_from([0, 1, 3]))
@hypothesis.settings(max_examples=60)
def test_plans_cover_fit_and_obey(drawn: list[tuple], optimizer: str, name: str,
                                  limited: int) -> None:
    topology = read_topology(name)
    ranks = {0: tuple(range(min(limited, topology.world_size)))}
    tables = build(drawn, ranks)
    first = plan(tables, topology, 128, optimizer)
    check(first, tables, optimizer)
    second = plan(tables, topology, 128, optimizer)
    assert first == second
    assert plan_to_json(first) == plan_to_json(second)


@hypothesis.given(drawn=tables_of_any_kind, hbm_mib=st.floats(0.3, 60.0),
                  ddr_mib=st.sampled_from([1.0, 20.0]), ssd_mib=st.sampled_from([0.0, 30.0]))
@hypothesis.settings(max_examples=60)
def test_tight_memory_fits_or_explains(drawn: list[tuple], hbm_mib: float, ddr_mib: float,
                                       ssd_mib: float) -> None:
    tables = build(drawn, {})
    topology = tiered("2x2xcpu", hbm_mib * 2**20, ddr_mib * 2**20, ssd_mib * 2**20)
    try:
        result = plan(tables, topology, 16)
    except PlanError as error:
        text = str(error)
    else:
        check(result, tables, "row_wise_adagrad")
        return
    assert "short by" in text or "found no room" in text
    assert "smallest change" in text or "no single change" in text


def test_plan_takes_names_paths_and_topologies(tmp_path: Path) -> None:
    tables = generated_fleet(4, largest_rows=1e5)
    path = tmp_path / "ours.yaml"
    path.write_text("profile: 2xcpu\n")
    plans = [plan(tables, where, 64).plan
             for where in ("2xcpu", path, str(path), read_topology("2xcpu"))]
    assert all(found == plans[0] for found in plans)


def test_plan_refuses_unknown_names() -> None:
    with pytest.raises(ConfigError, match="unknown topology '8xb300'"):
        plan(generated_fleet(2), "8xb300", 64)
    with pytest.raises(ConfigError, match="optimizer: unknown 'adamw'"):
        plan(generated_fleet(2), "cpu", 64, "adamw")


def test_one_rank_holds_everything() -> None:
    tables = generated_fleet(5, largest_rows=1e5)
    result = plan(tables, "cpu", 64)
    assert {entry.sharding for entry in result.plan.tables} == {ShardingType.TABLE_WISE}
    assert {entry.exchange for entry in result.plan.tables} == {ExchangeKind.POOLED}
    assert result.imbalance == 1
    assert result.gap == pytest.approx(0)


def test_a_table_too_large_for_a_rank_is_cut() -> None:
    result = plan([EmbeddingBagConfig(10**8, 64, "big"), EmbeddingBagConfig(10, 64, "small")],
                  machine("4xcpu"), 256)
    big = result.plan.tables[0]
    assert big.sharding is not ShardingType.TABLE_WISE
    assert "does not fit" in result.tables[0].why or "balance" in result.tables[0].why


def test_one_hot_table_is_cut_for_balance() -> None:
    result = plan([EmbeddingBagConfig(10**6, 128, "hot", pooling_factor=50.0)], "8xh100", 4096)
    assert len(result.plan.tables[0].shards) == 8
    assert result.tables[0].why.startswith("balance")


def test_tables_are_copied_only_where_that_is_faster() -> None:
    # One row of 16 columns is not cut: a copy saves sending it to the other rank.
    lone = plan([EmbeddingBagConfig(1, 16, "tiny")], "2xcpu", 1024)
    assert lone.plan.tables[0].replicated
    assert "balance" in lone.tables[0].why
    # A hundred of them balance without: copies would send every gradient to every rank.
    many = plan([EmbeddingBagConfig(1, 16, f"tiny{i}") for i in range(100)], "8xh100", 1024)
    assert not any(entry.replicated for entry in many.plan.tables)


def test_a_thousand_tables_on_128_ranks_in_three_cpu_seconds() -> None:
    tables = generated_fleet(1000, largest_rows=5e8)
    topology = machine("16x8xh200", 220 << 30)
    start = time.process_time()
    result = plan(tables, topology, 1024)
    assert time.process_time() - start < 3.0
    assert result.cpu_seconds < 3.0
    assert result.gap < 0.05
    check(result, tables, "row_wise_adagrad")


def test_a_fleet_beyond_hbm_uses_ddr_and_says_so() -> None:
    tables = generated_fleet(200, largest_rows=5e8)
    size = sum(table.num_embeddings * (4 * table.embedding_dim + 4) for table in tables)
    topology = tiered("4x8xh100", 0.6 * size / 32, 0.3 * size)
    start = time.process_time()
    result = plan(tables, topology, 1024)
    assert time.process_time() - start < 3.0
    assert result.gap < 0.05
    assert result.binding == ("hbm",)
    assert max(host.ddr for host in result.hosts) > 0
    check(result, tables, "row_wise_adagrad")


def test_options_are_told() -> None:
    tables = [EmbeddingBagConfig(10**6, 64, "t", storage={"choose": ["fp32", "int8"]}),
              EmbeddingBagConfig(10, 4, "u")]
    result = plan(tables, tiered("2xh100", 400e6, 1e9), 64)
    found = result.options("t")
    assert [entry.work_ms for entry in found] == sorted(entry.work_ms for entry in found)
    assert sum(entry.chosen for entry in found) == 1
    best = next(entry for entry in found if entry.chosen)
    assert best.allowed
    assert best.fits
    assert best.storage == result.tables[0].storage
    assert {entry.preference for entry in found} == {0, 1}
    assert not any(entry.allowed for entry in found if entry.preference == 1)
    with pytest.raises(ConfigError, match=r"no table 'v'.*known: t, u"):
        result.options("v")


def test_a_dense_part_is_part_of_the_step() -> None:
    tables = generated_fleet(5, largest_rows=1e5)
    dense = DenseModel(bytes=1 << 20, parameters=10**5, flops_per_sample=1e8)
    bare, whole = (plan(tables, "8xh100", 512, settings=PlanSettings(model))
                   for model in (DenseModel(), dense))
    phases = dict(zip(PHASES, whole.ranks[0].phase_ms, strict=True))
    assert phases["dense"] > 0
    assert whole.step_ms == pytest.approx(bare.step_ms + phases["dense"], rel=0.02)
    assert whole.ranks[0].dense_bytes == 1 << 20
    assert whole.capacity == bare.capacity - (1 << 20)
    assert whole.samples_per_s == pytest.approx(8 * 512e3 / whole.step_ms)


def test_prefetching_hides_behind_the_dense_part() -> None:
    storage = {"levels": [{"dtype": "fp32", "tier": "hbm", "fraction": 0.01},
                          {"dtype": "fp32", "tier": "ddr"}]}
    tables = [EmbeddingBagConfig(10**6, 64, f"t{i}", storage=storage, pooling_factor=20.0)
              for i in range(4)]
    dense = PlanSettings(DenseModel(flops_per_sample=1e9))
    result = plan(tables, "4xh100", 1024, settings=dense)
    index = PHASES.index("prefetch")
    for rank in result.ranks:
        assert rank.hidden_ms == pytest.approx(min(rank.phase_ms[index],
                                                   rank.phase_ms[PHASES.index("dense")]))
        assert rank.ms == pytest.approx(sum(rank.phase_ms) - rank.hidden_ms)


def test_a_time_limit_is_kept() -> None:
    tables = generated_fleet(300, largest_rows=5e8)
    topology = machine("8x8xh200", 220 << 30)
    hasty = plan(tables, topology, 1024, settings=PlanSettings(time_limit=0.05))
    check(hasty, tables, "row_wise_adagrad")
    assert hasty.cpu_seconds < plan(tables, topology, 1024).cpu_seconds + 0.05


IMPORT = """
import sys, time
start = time.perf_counter()
import shardlab.planner
took = time.perf_counter() - start
assert "torch" not in sys.modules and "numpy" not in sys.modules, "heavy import"
print(took)
"""
PLAN = """
import sys
from shardlab.planner import plan
from shardlab.planner.estimate import PHASES
from shardlab.planner.report import print_report
from shardlab.specs import EmbeddingBagConfig
print_report(plan([EmbeddingBagConfig(10, 4, "t")], "2xcpu", 8))
assert "torch" not in sys.modules
"""


def test_importing_the_planner_is_cheap() -> None:
    times = [float(subprocess.run([sys.executable, "-c", IMPORT], check=True, text=True,
                                  capture_output=True).stdout) for _ in range(3)]
    assert min(times) < 0.2


def test_planning_imports_no_torch() -> None:
    subprocess.run([sys.executable, "-c", PLAN], check=True, capture_output=True)
