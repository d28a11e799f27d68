"""TorchRec's formulas: numbers that its own estimators gave, and plans under them."""

from __future__ import annotations

import pytest

from shardlab.planner.enumerate import SHARDING_TYPES
from shardlab.planner.solve import solve_model
from shardlab.planner.torchrec_model import KERNELS, TorchRecMachine, TorchRecModel
from shardlab.specs import EmbeddingBagConfig
from tests.planner.fleets import assert_sums

GIB = 1 << 30
MACHINE = TorchRecMachine(16, 8, 80 * GIB, 128 * GIB, 897 * GIB / 1e3, 32 * GIB / 1e3,
                          600 * GIB / 1e3, 12.5 * GIB / 1e3)
# (type, kernel) -> (ms of a shard, hbm, ddr), by EmbeddingPerfEstimator and
# EmbeddingStorageEstimator of TorchRec 1.8 for 684,773 x 96 rows, 1.32 ids a bag, 1,024 bags a
# device, on 16 devices of two hosts.
ESTIMATED = {
    ("data_parallel", "dense"): (8.713544365454677, 263356862, 0),
    ("table_wise", "fused"): (0.9904033988714218, 269417304, 0),
    ("table_wise", "fused_uvm"): (15.766983996145424, 6464472, 262952832),
    ("table_wise", "fused_uvm_caching"): (3.2523462823251394, 63985404, 262952832),
    ("row_wise", "fused"): (0.9747835004509093, 22737086, 0),
    ("row_wise", "fused_uvm"): (11.388531220145524, 6302270, 16434816),
    ("row_wise", "fused_uvm_caching"): (2.568880483144667, 9897387, 16434816),
    ("table_row_wise", "fused"): (0.1756526478706395, 39182331, 0),
    ("table_row_wise", "fused_uvm"): (11.050376996863633, 6313083, 32869248),
    ("table_row_wise", "fused_uvm_caching"): (1.8403141836567622, 13503232, 32869248)}


def model_of(tables: list[EmbeddingBagConfig]) -> TorchRecModel:
    return TorchRecModel(tables, MACHINE, 1024)


def test_options_cost_what_torchrec_says() -> None:
    model = model_of([EmbeddingBagConfig(684_773, 96, "t", pooling_factor=1.32)])
    problem = model.problem(model.tiers)
    options, costs = problem.options, problem.costs
    found = {}
    for option in range(len(options)):
        kind = SHARDING_TYPES[int(options.sharding[option])].value
        kernel = "dense" if kind == "data_parallel" else KERNELS[int(options.variant[option])]
        found[kind, kernel] = (costs.busy_ms[option, 0], *costs.piece_bytes[option, :2])
    assert found.keys() == ESTIMATED.keys()
    for key, (ms, hbm, ddr) in ESTIMATED.items():
        assert found[key] == (pytest.approx(ms, rel=1e-6), pytest.approx(hbm, abs=2),
                              pytest.approx(ddr, abs=2)), key


def test_wide_tables_are_cut_by_columns() -> None:
    model = model_of([EmbeddingBagConfig(1000, 256, "t")])
    problem = model.problem(model.tiers[:1])
    cuts = {(cut.sharding.value, cut.row_parts, cut.col_parts, cut.group)
            for cut in map(problem.options.cut, range(len(problem.options)))}
    assert cuts == {("data_parallel", 1, 1, 0), ("table_wise", 1, 1, 0), ("row_wise", 16, 1, 0),
                    ("table_row_wise", 8, 1, 8), ("column_wise", 1, 2, 0),
                    ("table_column_wise", 1, 2, 2)}


def test_reserve_is_torchrecs() -> None:
    pooling = (1.32, 4.15, 1.35, 30.36)
    tables = [EmbeddingBagConfig(10, 4, f"t{i}", pooling_factor=p) for i, p in enumerate(pooling)]
    assert model_of(tables).capacity == 73_008_352_452  # its planner's reserved topology


def test_what_exceeds_hbm_goes_to_each_devices_own_ddr() -> None:
    tables = [EmbeddingBagConfig(40_000_000, 128, f"t{i}", pooling_factor=2.0) for i in range(70)]
    model = model_of(tables)
    solved = solve_model(model)
    assert solved is not None
    placement = solved.solution.placement
    assert_sums(placement)
    assert placement.fits
    assert placement.pools.shape == (16, 2)
    assert placement.pools[:, 0].max() > 0
    assert placement.pools[:, 0].max() <= 128 * GIB
