"""Why a table lies where it lies."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from shardlab.errors import ConfigError
from shardlab.planner import PlanSettings, plan
from shardlab.planner.explain import changes, print_explanation
from shardlab.planner.request import Request, build_request
from shardlab.planner.result import PlanResult
from shardlab.specs import EmbeddingBagConfig, ShardingType
from tests.planner.fleets import GIB, generated_fleet, tiered

TABLES = [*generated_fleet(6, largest_rows=1e6),
          EmbeddingBagConfig(10**7, 128, "large", storage={"choose": [
              {"dtype": "fp32", "tier": "hbm"}, {"dtype": "int8", "tier": "hbm"}]}),
          EmbeddingBagConfig(10**5, 64, "asked", sharding=ShardingType.ROW_WISE)]


@pytest.fixture(scope="module")
def request_() -> Request:
    return build_request(TABLES, tiered("4xh100", 1 * GIB, 0), 256, "row_wise_adagrad",
                         PlanSettings())


@pytest.fixture(scope="module")
def result(request_: Request) -> PlanResult:
    return plan(request_.tables, request_.topology, request_.batch_size)


def explained(request_: Request, result: PlanResult, table: str, width: int = 100) -> str:
    stream = io.StringIO()
    print_explanation(Console(file=stream, width=width, markup=False, highlight=False), request_,
                      result, table)
    return stream.getvalue()


def test_choice_options_and_changes_are_shown(request_: Request, result: PlanResult) -> None:
    text = explained(request_, result, "large")
    assert text.startswith("Table large: row_wise x")
    assert "int8 on hbm" in text.splitlines()[0]
    assert "10,000,000 x 128, 1 feature, 1 ids per bag" in text
    assert "Its work, all ranks together" in text
    assert "does not fit" in text
    assert ">" in text
    assert "What would change it (everything planned again)" in text
    assert "twice the hosts: " in text
    assert "Without row_wise for this table" in text


@pytest.mark.parametrize("width", [80, 160])
def test_every_table_can_be_explained(request_: Request, result: PlanResult, width: int) -> None:
    for table in ("asked", "table_0"):
        text = explained(request_, result, table, width)
        assert f"Table {table}: " in text
        assert max(len(line.rstrip()) for line in text.splitlines()) <= width


def test_what_was_asked_for_may_be_what_binds(request_: Request, result: PlanResult) -> None:
    tried, left = changes(request_, result, "asked")
    assert not left
    assert "no sharding type asked for" in [change.what for change in tried]
    assert "this table alone on the machine" in [change.what for change in tried]


def test_patience_ends(request_: Request, result: PlanResult) -> None:
    tried, left = changes(request_, result, "asked", patience_s=-1.0)
    assert tried == []
    assert len(left) > 5


def test_an_unknown_table_is_refused(request_: Request, result: PlanResult) -> None:
    with pytest.raises(ConfigError, match=r"no table 'larg' \(did you mean 'large'\?\)"):
        explained(request_, result, "larg")
