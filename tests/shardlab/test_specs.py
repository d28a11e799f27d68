"""Tables as data: names, defaults, texts of the errors, and the byte arithmetic."""

from __future__ import annotations

import dataclasses
import enum

import pytest

from shardlab.errors import ConfigError
from shardlab.specs import (
    OPTIMIZER_STATE,
    BoundsMode,
    EmbeddingBagConfig,
    ExchangeKind,
    LevelSpec,
    PoolingType,
    RowsSpec,
    ShardingType,
    Tier,
    TierBytes,
    check_tables,
    parse_storage,
    record_layout,
    tier_bytes,
)


def _table(**changes):
    return EmbeddingBagConfig(**({"num_embeddings": 10, "embedding_dim": 4, "name": "user"}
                                 | changes))


def test_defaults_are_sum_pooling_fp32_rows_and_a_feature_of_the_table_name():
    table = _table()
    assert table.feature_names == ("user",)
    assert (table.pooling, table.bounds, table.exchange, table.sharding) == (
        PoolingType.SUM, BoundsMode.ERROR, ExchangeKind.AUTO, None)
    assert table.storage == RowsSpec((LevelSpec("fp32", None, 1.0),))


def test_strings_become_members():
    table = _table(pooling="mean", sharding="row_wise", exchange="pooled", bounds="ignore",
                   feature_names=["a", "b"])
    assert (table.pooling, table.sharding, table.exchange, table.bounds) == (
        PoolingType.MEAN, ShardingType.ROW_WISE, ExchangeKind.POOLED, BoundsMode.IGNORE)
    assert table.feature_names == ("a", "b")


def test_upper_case_enum_of_another_library_is_accepted_for_pooling():
    other = enum.Enum("PoolingType", {"MEAN": "MEAN"})
    assert _table(pooling=other.MEAN).pooling is PoolingType.MEAN


def test_auto_sharding_is_no_choice():
    assert _table(sharding="auto").sharding is None


def test_one_feature_name_may_be_a_plain_string():
    assert _table(feature_names="clicks").feature_names == ("clicks",)


@pytest.mark.parametrize(("changes", "text"), [
    ({"num_embeddings": 0}, "table 'user': num_embeddings must be a positive integer, found 0"),
    ({"num_embeddings": 2.5}, "num_embeddings must be a positive integer, found 2.5"),
    ({"embedding_dim": -4}, "table 'user': embedding_dim must be a positive integer, found -4"),
    ({"feature_names": ["a", "a"]}, r"feature_names repeats a name: \['a', 'a'\]"),
    ({"pooling": "mena"}, r"table 'user': pooling: unknown PoolingType 'mena' \(did you mean "
                          r"'mean'\?\); known: sum, mean"),
    ({"sharding": "rowwise"}, r"table 'user': sharding: unknown ShardingType 'rowwise' \(did you "
                              r"mean 'row_wise'\?\)"),
    ({"exchange": "row"}, r"exchange: unknown ExchangeKind 'row' \(did you mean 'rows'\?\)"),
    ({"bounds": "wrap"}, "bounds: unknown BoundsMode 'wrap'; known: error, clamp_to_zero, ignore"),
    ({"storage": "fp23"}, "table 'user': storage: unknown storage dtype 'fp23'; known: fp32"),
    ({"storage": 7}, "storage: expected a dtype name or a mapping, found 7"),
    ({"storage": {"dtpye": "fp32"}}, r"unknown key 'dtpye' \(did you mean 'dtype'\?\)"),
    ({"storage": {"tier": "hmb"}}, r"unknown Tier 'hmb' \(did you mean 'hbm'\?\)"),
    ({"storage": {"levels": []}}, r"storage.levels: expected a list of one level, found \[\]"),
    ({"storage": {"levels": ["fp32"]}}, r"levels\[0\]: expected a mapping, found 'fp32'"),
], ids=lambda value: str(next(iter(value.items()))) if isinstance(value, dict) else "")
def test_wrong_field_is_an_error_that_names_table_field_and_value(changes, text):
    with pytest.raises(ConfigError, match=text):
        _table(**changes)


@pytest.mark.parametrize("value", [
    None, "fp32", {"dtype": "fp32"}, {"levels": [{"dtype": "fp32"}]}, RowsSpec()], ids=str)
def test_spellings_of_plain_storage_are_equal(value):
    assert parse_storage(value, "here") == RowsSpec()


def test_tier_of_the_home_is_read():
    assert parse_storage({"tier": "ddr"}, "here").home.tier is Tier.DDR


def test_table_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        _table().name = "other"


def test_initial_range_follows_the_number_of_rows_unless_given():
    assert _table(num_embeddings=4).init_range == (-0.5, 0.5)
    assert _table(weight_init_min=0.0, weight_init_max=2.0).init_range == (0.0, 2.0)


@pytest.mark.parametrize(("optimizer", "state"), [
    ("sgd", 0), ("adagrad", 5 * 4), ("row_wise_adagrad", 4), ("adam", 10 * 4),
    ("row_wise_adam", 6 * 4)])
def test_record_is_payload_and_state(optimizer, state):
    layout = record_layout(LevelSpec(), 5, optimizer)
    assert (layout.payload_bytes, layout.state_bytes) == (20, state)
    assert tier_bytes(RowsSpec(), Tier.DDR, 7, 5, optimizer) == TierBytes(ddr=7 * (20 + state))


def test_every_optimizer_has_a_layout():
    assert list(OPTIMIZER_STATE) == ["sgd", "adagrad", "row_wise_adagrad", "adam",
                                     "row_wise_adam"]


def test_tier_bytes_do_not_wrap_for_a_table_beyond_32_bits():
    assert tier_bytes(RowsSpec(), Tier.HBM, 2 ** 40, 128, "adam").hbm == 2 ** 40 * 128 * 12


def test_tier_bytes_add_up():
    assert TierBytes(1, 2, 3) + TierBytes(10, 20, 30) == TierBytes(11, 22, 33)
    assert TierBytes(1, 2, 3).total == 6


def test_tables_that_clash_are_all_listed():
    with pytest.raises(ConfigError) as caught:
        check_tables([_table(), _table(), _table(name="a", feature_names=("f", "g")),
                      _table(name="b", feature_names=("g",))])
    assert caught.value.problems == [
        "table 'user' is defined 2 times",
        "feature 'g' is claimed by tables 'a' and 'b'"]


def test_no_tables_is_an_error():
    with pytest.raises(ConfigError, match="no tables: an EmbeddingBagCollection needs at least"):
        check_tables([])
