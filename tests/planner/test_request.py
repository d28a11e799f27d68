"""What a request refuses, all at once."""

from __future__ import annotations

import pytest

from shardlab.errors import ConfigError, PlanError
from shardlab.planner.request import build_request
from shardlab.specs import EmbeddingBagConfig, LevelSpec, RowsSpec, Tier
from tests.planner.fleets import GIB, machine


def test_build_request_lists_every_problem() -> None:
    tables = [EmbeddingBagConfig(10, 4, "far", storage=RowsSpec((LevelSpec(tier=Tier.SSD),))),
              EmbeddingBagConfig(10, 4, "empty", pooling_factor=0.0)]
    with pytest.raises(ConfigError) as error:
        build_request(tables, machine("2xcpu"), 0, "row_wise_adam_", -1)
    assert error.value.problems == [
        "optimizer: unknown 'row_wise_adam_' (did you mean 'row_wise_adam'?); known: sgd, "
        "adagrad, row_wise_adagrad, adam, row_wise_adam",
        "batch_size: expected at least 1 sample per rank, found 0",
        "dense_bytes: expected at least 0, found -1",
        "table 'far': asks for tier 'ssd'; this planner places tables on 'hbm' only",
        "table 'empty': pooling_factor must be above 0, found 0.0"]


@pytest.mark.parametrize(("tables", "message"), [
    ([], "no tables"),
    ([EmbeddingBagConfig(1, 1, "a"), EmbeddingBagConfig(1, 1, "a")], "'a' is defined 2 times")])
def test_build_request_checks_the_tables(tables: list[EmbeddingBagConfig], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_request(tables, machine("cpu"), 1, "sgd", 0)


def test_dense_bytes_leave_nothing() -> None:
    with pytest.raises(PlanError, match=r"dense_bytes: 12 GiB per rank leave no room.*keep "
                                        r"dense_bytes below 10\.8 GiB"):
        build_request([EmbeddingBagConfig(1, 1, "a")], machine("cpu"), 1, "sgd", 12 * GIB)


def test_dense_bytes_come_off_the_capacity() -> None:
    tables = [EmbeddingBagConfig(1, 1, "a")]
    free = build_request(tables, machine("cpu"), 1, "sgd", 0).capacity
    assert build_request(tables, machine("cpu"), 1, "sgd", GIB).capacity == free - GIB
