"""The user's order of storages decides; memory alone makes tables step down."""

from __future__ import annotations

import pytest

from shardlab.planner import plan
from shardlab.planner.preferences import preferred
from shardlab.specs import EmbeddingBagConfig
from shardlab.storage_specs import describe_storage
from tests.planner.fleets import machine, problem_for, tiered

CHOICE = {"choose": ["fp32", "bf16", "int8"]}
ROWS = (1_000_000, 500_000, 250_000, 125_000)


def fleet(storage: object = None) -> list[EmbeddingBagConfig]:
    return [EmbeddingBagConfig(rows, 64, f"t{rows}", storage=storage or CHOICE)  # type: ignore
            for rows in ROWS]


def chosen(hbm: float) -> list[int]:
    result = plan(fleet(), machine("2xcpu", hbm / 2 / 0.9), 64, "sgd")
    assert all(entry.preferences == 3 for entry in result.tables)
    return [entry.preference for entry in result.tables]


WHOLE = sum(ROWS) * 256


def test_the_first_storage_is_kept_where_it_fits() -> None:
    assert chosen(1.2 * WHOLE) == [0, 0, 0, 0]


@pytest.mark.parametrize(("share", "levels"), [
    (0.95, [0, 0, 1, 0]),  # the smallest step that suffices
    (0.85, [0, 1, 0, 0]), (0.75, [1, 0, 0, 0]), (0.6, [1, 1, 0, 1]), (0.3, [2, 2, 2, 2])])
def test_as_few_and_small_steps_as_memory_asks_for(share: float, levels: list[int]) -> None:
    found = chosen(share * WHOLE + 3e6)
    kept = sum(rows * (256, 128, 65)[level] for rows, level in zip(ROWS, found, strict=True))
    wanted = sum(rows * (256, 128, 65)[level] for rows, level in zip(ROWS, levels, strict=True))
    assert kept <= share * WHOLE + 3e6
    # Where the order of steps leaves a choice, as many bytes are kept within a table's step.
    assert kept >= wanted * 0.8
    assert sum(found) <= sum(levels) + 1


def test_a_farther_tier_comes_before_a_worse_storage() -> None:
    result = plan(fleet(), tiered("2xh100", 0.3 * WHOLE, 4 * WHOLE), 64, "sgd")
    assert [entry.preference for entry in result.tables] == [0, 0, 0, 0]
    assert any("ddr" in describe_storage(entry.storage) for entry in result.tables)


def test_a_named_tier_asks_for_the_worse_storage_instead() -> None:
    choice = {"choose": [{"dtype": "fp32", "tier": "hbm"}, {"dtype": "int8", "tier": "hbm"}]}
    result = plan(fleet(choice), tiered("2xh100", 0.3 * WHOLE, 4 * WHOLE), 64, "sgd")
    assert [entry.preference for entry in result.tables].count(1) >= 2
    assert all("ddr" not in describe_storage(entry.storage) for entry in result.tables)


def test_nothing_is_left_where_even_the_last_does_not_fit() -> None:
    assert preferred(problem_for(fleet(), machine("2xcpu", 0.1 * WHOLE))) is None


def test_without_choices_nothing_changes() -> None:
    problem = problem_for(fleet("fp32"), machine("2xcpu"))
    assert preferred(problem) is problem
