"""TorchRec's plans become ours where they can, and say by table where they cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shardlab.errors import PlanError
from shardlab.planner.torchrec_plan import import_plan, read_torchrec_plan
from shardlab.specs import EmbeddingBagConfig, ExchangeKind, ShardingType
from shardlab.storage_specs import Choice, LevelSpec, RowsSpec, Tier
from shardlab.table_plan import Shard

USER = EmbeddingBagConfig(1000, 8, "user", storage="int8")


def shards(*spans: tuple[int, int, int, int, int]) -> dict[str, Any]:
    """(rank, row, rows, column, columns) of every shard."""
    return {"shards": [{"shard_offsets": [row, column], "shard_sizes": [rows, columns],
                        "placement": f"rank:{rank}/cuda:{rank}"}
                       for rank, row, rows, column, columns in spans]}


def entry(kind: str = "table_wise", kernel: str = "fused", **fields: Any) -> dict[str, Any]:
    return {"sharding_type": kind, "compute_kernel": kernel,
            "sharding_spec": shards((0, 0, 1000, 0, 8)), **fields}


def imported(data: Any, *tables: EmbeddingBagConfig, world: int = 4) -> Any:
    return import_plan(data, tables or [USER], world)


def test_rectangles_and_ranks_are_taken_as_they_are() -> None:
    spec = shards((3, 0, 600, 0, 8), (1, 600, 400, 0, 8), (2, 1000, 0, 0, 8))
    plan = imported({"user": entry("row_wise", sharding_spec=spec)})
    found = plan.tables[0]
    assert found.sharding is ShardingType.ROW_WISE
    assert found.exchange is ExchangeKind.AUTO
    assert found.shards == (Shard(3, 0, 600, 0, 8), Shard(1, 600, 1000, 0, 8))  # no empty shard
    assert found.storage == RowsSpec((LevelSpec("int8", Tier.HBM),))


def test_a_grid_of_any_cut() -> None:
    spec = shards((0, 0, 500, 0, 4), (1, 500, 500, 0, 4), (2, 0, 500, 4, 4), (3, 500, 500, 4, 4))
    plan = imported({"user": entry("grid_shard", sharding_spec=spec)})
    assert [shard.rank for shard in plan.tables[0].shards] == [0, 1, 2, 3]


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: {"ebc": data},
                                  lambda data: {"plan": {"model.ebc": data}}])
def test_modules_around_the_tables_do_not_matter(wrap: Any) -> None:
    assert imported(wrap({"user": entry()})).tables[0].table == "user"


def test_data_parallel_needs_no_spec() -> None:
    plan = imported({"user": {"sharding_type": "data_parallel", "compute_kernel": "dense"}})
    assert [shard.rank for shard in plan.tables[0].shards] == [0, 1, 2, 3]


@pytest.mark.parametrize(("kind", "ranks", "found"), [
    ("table_wise", [2], [2]), ("row_wise", None, [0, 1, 2, 3]), ("row_wise", [1, 3], [1, 3]),
    ("column_wise", [3, 0], [3, 0])])
def test_ranks_alone_mean_even_cuts(kind: str, ranks: list[int] | None, found: list[int]) -> None:
    plan = imported({"user": entry(kind, ranks=ranks, sharding_spec=None)})
    assert [shard.rank for shard in plan.tables[0].shards] == found


@pytest.mark.parametrize(("kernel", "params", "levels"), [
    ("fused_uvm", None, (LevelSpec("int8", Tier.DDR),)),
    ("FUSED_UVM_CACHING", {"load_factor": 0.1, "algorithm": "LFU"},
     (LevelSpec("int8", Tier.HBM, 0.1, "lfu"), LevelSpec("int8", Tier.DDR))),
    ("fused_uvm_caching", {"load_factor": None},
     (LevelSpec("int8", Tier.HBM, 0.2, "lru"), LevelSpec("int8", Tier.DDR))),
    ("key_value", None, (LevelSpec("int8", Tier.HBM, 0.2, "lru"), LevelSpec("int8", Tier.SSD))),
])
def test_kernels_say_where_rows_lie(kernel: str, params: Any, levels: Any) -> None:
    plan = imported({"user": entry(kernel=kernel, cache_params=params)})
    assert plan.tables[0].storage == RowsSpec(levels)


def test_the_job_s_own_levels_stay_where_the_kernel_agrees() -> None:
    chain = {"levels": [{"dtype": "fp32", "fraction": 0.05}, {"dtype": "int8"}]}
    table = EmbeddingBagConfig(1000, 8, "user", storage=chain)
    plan = imported({"user": entry(kernel="fused_uvm_caching")}, table)
    assert plan.tables[0].storage == RowsSpec((LevelSpec("fp32", Tier.HBM, 0.05),
                                               LevelSpec("int8", Tier.DDR)))
    with pytest.raises(PlanError, match="'fused_uvm' holds rows on ddr, the job's storage asks"):
        imported({"user": entry(kernel="fused_uvm")}, table)


@pytest.mark.parametrize(("data", "message"), [
    ([1], r"expected a mapping of tables, found \[1\]"),
    ({"ebc": 3}, "expected a mapping of tables under 'ebc', found 3"),
    ({}, "holds no ParameterSharding"),
    ({"a": {"user": entry()}, "b": {"user": entry()}}, "table 'user': placed by two modules"),
    ({"usr": entry()}, r"'usr': the job has no such table \(did you mean 'user'\?\)"),
    ({"usr": entry()}, "table 'user': not in the plan"),
    ({"user": entry("row_wize")}, r"unknown sharding_type 'row_wize' \(did you mean 'row_wise'"),
    ({"user": entry(kernel="quant")}, "compute_kernel 'quant' has no counterpart"),
    ({"user": entry(cache_params={"load_factor": 2}, kernel="fused_uvm_caching")},
     r"load_factor: expected a share of the rows in \(0, 1\], found 2"),
    ({"user": entry(cache_params={"algorithm": "mru"}, kernel="fused_uvm_caching")},
     "algorithm: expected lru or lfu, found 'mru'"),
    ({"user": entry(sharding_spec=[])}, "sharding_spec: expected {shards:"),
    ({"user": entry(sharding_spec={"shards": [{"shard_offsets": [0]}]})},
     r"sharding_spec\.shards\[0\]: expected shard_offsets \[row, column\]"),
    ({"user": entry(sharding_spec={"shards": [{**shards((0, 0, 9, 0, 8))["shards"][0],
                                               "placement": "cuda:0"}]})},
     r"placement: expected rank:R/device, found 'cuda:0'"),
    ({"user": entry("table_row_wise", sharding_spec=None, ranks=[0])},
     "table_row_wise without a sharding_spec does not say"),
    ({"user": entry(sharding_spec=None)}, "ranks: expected a list of ranks, found None"),
    ({"user": entry(sharding_spec=shards((0, 0, 999, 0, 8)))},
     "table 'user': shards do not tile 1000 rows x 8 columns"),
    ({"user": entry(sharding_spec=shards((7, 0, 1000, 0, 8)))}, "lies outside 1000 x 8 on 4 ranks"),
])
def test_what_cannot_be_said_is_named_by_table(data: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        imported(data)


@pytest.mark.parametrize("storage", [Choice((RowsSpec(), RowsSpec((LevelSpec("int8"),)))),
                                     {"kind": "pruned", "budget": {"ratio": 0.5}}])
def test_storages_that_a_kernel_cannot_hold(storage: Any) -> None:
    table = EmbeddingBagConfig(1000, 8, "user", storage=storage)
    with pytest.raises(PlanError, match="table 'user': compute_kernel 'fused_uvm' holds plain"):
        imported({"user": entry(kernel="fused_uvm")}, table)


def test_every_problem_is_listed() -> None:
    tables = [EmbeddingBagConfig(1000, 8, name) for name in ("a", "b")]
    with pytest.raises(PlanError) as caught:
        imported({"a": entry("x"), "b": entry(kernel="y")}, *tables)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(("text", "message"), [
    (None, "cannot be read: No such file"), ("{", "not JSON: .*torchrec_plan_to_json"),
    ("{}", "plan.json:\nholds no")])
def test_files_are_named(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PlanError, match=message):
        read_torchrec_plan(path, [USER], 2)


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"user": entry()}))
    assert read_torchrec_plan(path, [USER], 2).world_size == 2
