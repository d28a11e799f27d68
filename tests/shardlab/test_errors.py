"""The tree of errors and the hint at a misspelt name."""

from __future__ import annotations

import pytest

from shardlab import errors


def test_config_error_lists_every_problem():
    error = errors.ConfigError(["tables[0]: no name", "model: unknown key 'knid'"])
    assert str(error) == "tables[0]: no name\nmodel: unknown key 'knid'"
    assert errors.ConfigError("one").problems == ["one"]


@pytest.mark.parametrize("kind", [
    errors.ConfigError, errors.InputError, errors.BoundsError, errors.PlanError, errors.DataError])
def test_errors_of_the_user_are_value_errors(kind):
    assert issubclass(kind, errors.ShardLabError)
    assert issubclass(kind, ValueError)


def test_who_is_to_mend_it_decides_the_exit_code():
    codes = {kind: kind("x").exit_code for kind in (
        errors.ConfigError, errors.ForecastError, errors.NotFiniteError, errors.StallError,
        errors.ExchangeError)}
    assert list(codes.values()) == [2, 3, 4, 5, 1]


def test_bounds_error_is_an_input_error():
    assert issubclass(errors.BoundsError, errors.InputError)


@pytest.mark.parametrize(("wrong", "hint"), [
    ("row_wize", " (did you mean 'row_wise'?)"), ("zebra", ""), ("", "")], ids=repr)
def test_nearest_name(wrong, hint):
    assert errors.nearest_name(wrong, ["row_wise", "table_wise"]) == hint
