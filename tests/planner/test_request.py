"""What a request refuses, all at once."""

from __future__ import annotations

import pytest

from shardlab.errors import ConfigError, PlanError
from shardlab.planner import plan
from shardlab.planner.request import build_request
from shardlab.planner.settings import DenseModel, PlanSettings
from shardlab.specs import UNBOUNDED, EmbeddingBagConfig
from shardlab.storage_specs import LevelSpec, RowsSpec, Tier, describe_storage
from shardlab.table_plan import WireDtypes
from tests.planner.fleets import GIB, machine, request_for


def test_build_request_lists_every_problem() -> None:
    tables = [EmbeddingBagConfig(10, 4, "far", storage=RowsSpec((LevelSpec(tier=Tier.SSD),))),
              EmbeddingBagConfig(10, 4, "chosen", storage={"choose": [
                  "fp32", {"dtype": "int8", "tier": "ddr"}]}),
              EmbeddingBagConfig(10, 4, "empty", pooling_factor=0.0),
              EmbeddingBagConfig(10, 4, "outside", ranks=(1, 2, 7)),
              EmbeddingBagConfig(10, 4, "torn", ranks=(1,), sharding="data_parallel")]
    settings = PlanSettings(DenseModel(bytes=-1, dtype="fp8"), WireDtypes("fp64", "fp32"),
                            time_limit=0.0)
    with pytest.raises(ConfigError) as error:
        build_request(tables, machine("2xcpu"), 0, "row_wise_adam_", settings)
    assert error.value.problems == [
        "optimizer: unknown 'row_wise_adam_' (did you mean 'row_wise_adam'?); known: sgd, "
        "adagrad, row_wise_adagrad, adam, row_wise_adam",
        "batch_size: expected at least 1 sample per rank, found 0",
        "dense.bytes: expected at least 0, found -1",
        "dense.dtype: expected fp32 or bf16, found 'fp8'",
        "wire.forward: unknown dtype 'fp64' (did you mean 'fp16'?); known: fp32, fp16, bf16, fp8, "
        "int8, int4, fp8_e5m2",
        "time_limit: expected a number of seconds above 0, found 0.0",
        "table 'far': asks for tier 'ssd'; a host of 2xcpu has none",
        "table 'chosen': asks for tier 'ddr'; a host of 2xcpu has none",
        "table 'empty': pooling_factor must be above 0, found 0.0",
        "table 'outside': asks for ranks [2, 7]; 2xcpu has ranks 0 to 1",
        "table 'torn': asks for data_parallel, which copies it to every rank, and for ranks [1] "
        "only; leave out one of them"]


@pytest.mark.parametrize(("tables", "message"), [
    ([], "no tables"),
    ([EmbeddingBagConfig(1, 1, "a"), EmbeddingBagConfig(1, 1, "a")], "'a' is defined 2 times")])
def test_build_request_checks_the_tables(tables: list[EmbeddingBagConfig], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        request_for(tables, machine("cpu"))


def test_dense_bytes_leave_nothing() -> None:
    with pytest.raises(PlanError, match=r"dense model: 12 GiB per rank leave no room.*keep the "
                                        r"dense model below 10\.8 GiB"):
        request_for([EmbeddingBagConfig(1, 1, "a")], machine("cpu"),
                    settings=PlanSettings(DenseModel(bytes=12 * GIB)))


def test_dense_bytes_come_off_the_capacity() -> None:
    tables = [EmbeddingBagConfig(1, 1, "a")]
    free = request_for(tables, machine("cpu")).capacity
    settings = PlanSettings(DenseModel(bytes=GIB))
    assert request_for(tables, machine("cpu"), settings=settings).capacity == free - GIB


def test_a_table_without_a_bound_is_planned_by_its_bytes() -> None:
    table = EmbeddingBagConfig("unbounded", 16, "users", storage={  # type: ignore[arg-type]
        "kind": "pruned", "budget": {"bytes": 2_000_000}, "chunks": 1, "start": "empty"})
    items = EmbeddingBagConfig(1000, 16, "items")
    result = plan([table, items], machine("2xcpu"), 64, "sgd")
    entry = next(entry for entry in result.plan.tables if entry.table == "users")
    assert describe_storage(entry.storage) == "pruned to its bytes"
    assert sum(shard.rows for shard in entry.shards) == UNBOUNDED
    held = sum(rank.held.total.hbm for rank in result.ranks)
    assert 2_000_000 * 0.9 < held < 2_000_000 * 1.1 + 1000 * 16 * 4 * 1.1
