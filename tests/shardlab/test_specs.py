"""Tables as data: names, defaults, texts of the errors, and the byte arithmetic."""

from __future__ import annotations

import dataclasses
import enum

import pytest

from shardlab.cache_layout import cache_layout
from shardlab.errors import ConfigError
from shardlab.log_layout import log_layout
from shardlab.pages import file_bytes
from shardlab.specs import (
    BoundsMode,
    EmbeddingBagConfig,
    ExchangeKind,
    PoolingType,
    ShardingType,
    check_tables,
)
from shardlab.storage_bytes import (
    OPTIMIZER_STATE,
    TierBytes,
    payload_bytes,
    record_layout,
    tier_bytes,
)
from shardlab.storage_specs import LevelSpec, RowsSpec, Tier, describe_storage
from shardlab.storage_text import parse_storage, storage_to_data


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
    ({"storage": "fp23"}, "table 'user': storage: unknown storage dtype 'fp23' "
                          r"\(did you mean 'fp32'\?\); known: fp32, fp16, bf16, fp8, int8"),
    ({"storage": 7}, "storage: expected a dtype name or a mapping, found 7"),
    ({"storage": {"dtpye": "fp32"}}, r"unknown key 'dtpye' \(did you mean 'dtype'\?\)"),
    ({"storage": {"tier": "hmb"}}, r"unknown Tier 'hmb' \(did you mean 'hbm'\?\)"),
    ({"storage": {"levels": []}}, r"storage.levels: expected a list of levels from near to far, "
                                  r"the last one holding every row; found \[\]"),
    ({"storage": {"kind": "row"}}, r"unknown kind 'row' \(did you mean 'rows'\?\)"),
    ({"storage": {"levels": [{"dtype": "fp32"}, {"dtype": "int8"}]}},
     r"levels\[0\]: a cache needs a fraction of the rows"),
    ({"storage": {"fraction": 0.5}}, "the last level is the home and holds every row; found 0.5"),
    ({"storage": {"levels": [{"fraction": 0.5, "tier": "ddr"}, {"tier": "hbm"}]}},
     "tier ddr lies below hbm of the next level"),
    ({"storage": {"levels": [{"fraction": 0.5, "tier": "ssd"}, {"tier": "ssd"}]}},
     "tier ssd holds a home, not a cache"),
    ({"storage": {"levels": [{"fraction": 0.5}, {"fraction": 0.1}, {}]}},
     "fraction 0.5 is more than the next level's 0.1"),
    ({"storage": {"levels": [{"fraction": 1.5}, {}]}}, "a share above 0 and at most 1, found 1.5"),
    ({"storage": {"ways": 65}}, "ways: expected 1 to 64 slots a set, found 65"),
    ({"storage": {"policy": "lifo"}}, "unknown value 'lifo'"),
    ({"storage": {"policy": "lru", "admission": "frequency"}},
     "frequency compares counts of uses, which policy lru does not keep"),
    ({"storage": {"rounding": "up"}}, "unknown value 'up'; known: stochastic, nearest"),
    ({"storage": {"kind": "tensor_train"}}, "tensor_train needs a rank"),
    ({"storage": {"kind": "tensor_train", "rank": 0}}, "rank: expected a positive integer"),
    ({"storage": {"kind": "tensor_train", "rank": 8, "cores": 5}}, "expected 2, 3 or 4, found 5"),
    ({"storage": {"kind": "tensor_train", "rank": 8, "tier": "ssd"}}, "lives in memory"),
    ({"storage": {"kind": "pruned"}}, r"budget: expected \{ratio: 0.05\} or"),
    ({"storage": {"kind": "pruned", "budget": {"ratio": 0}}}, "share above 0 and at most 1"),
    ({"storage": {"kind": "pruned", "budget": {"bytes": 0}}}, "expected a positive integer"),
    ({"storage": {"choose": ["int8"]}}, "expected a list of two storages or more"),
    ({"storage": {"choose": ["int8", "int8"]}}, "names an option twice"),
    ({"storage": {"choose": ["int8", {"choose": ["fp32", "fp16"]}]}}, "cannot be a choice itself"),
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
    on_ddr = parse_storage({"tier": "ddr"}, "here")
    assert tier_bytes(on_ddr, 7, 5, optimizer) == TierBytes(ddr=7 * (20 + state))


def test_every_optimizer_has_a_layout():
    assert list(OPTIMIZER_STATE) == ["sgd", "adagrad", "row_wise_adagrad", "adam",
                                     "row_wise_adam"]


def test_tier_bytes_do_not_wrap_for_a_table_beyond_32_bits():
    assert tier_bytes(RowsSpec(), 2 ** 40, 128, "adam").hbm == 2 ** 40 * 128 * 12


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


@pytest.mark.parametrize("value", [
    "int4", {"dtype": "bf16", "tier": "ddr", "rounding": "nearest", "state_dtype": "fp16"},
    {"levels": [{"tier": "hbm", "fraction": 0.01, "policy": "lru", "ways": 8},
                {"tier": "ddr", "dtype": "int8", "fraction": 0.1, "admission": "frequency"},
                {"tier": "ssd", "dtype": "int8"}]},
    {"kind": "tensor_train", "rank": [8, 16], "row_factors": [4, 5, 6], "dtype": "bf16",
     "cache_fraction": 0.01, "tier": "ddr"},
    {"kind": "pruned", "budget": {"ratio": 0.05}, "chunks": 2, "dtype": "int8"},
    {"kind": "pruned", "budget": {"bytes": 1000}}], ids=str)
def test_storage_as_data_reads_back_equal(value):
    spec = parse_storage(value, "here")
    assert parse_storage(storage_to_data(spec), "here") == spec


@pytest.mark.parametrize(("columns", "chunks"), [
    (1, 1), (8, 1), (16, 1), (31, 1), (32, 2), (36, 2), (48, 3), (64, 4), (70, 2), (128, 4)])
def test_usual_chunks_have_sixteen_columns_or_more(columns, chunks):
    table = EmbeddingBagConfig(100, columns, "t", storage={"kind": "pruned", "budget": {
        "ratio": 0.5}})
    assert (table.storage.chunks, table.storage.width) == (chunks, columns // chunks)


def test_choice_keeps_the_order_of_preference():
    train = {"kind": "tensor_train", "rank": 4}
    choice = parse_storage({"choose": ["fp32", "int8", train]}, "here")
    assert [describe_storage(option) for option in choice.options] == [
        "fp32", "int8", "tensor_train rank 4"]


@pytest.mark.parametrize(("dtype", "payload"), [
    ("fp32", 64), ("fp16", 32), ("bf16", 32), ("fp8", 17), ("int8", 17), ("int4", 9)])
def test_payload_holds_elements_and_one_byte_of_scale(dtype, payload):
    assert payload_bytes(dtype, 16) == payload


def test_chain_counts_slots_tags_and_pages():
    spec = parse_storage({"levels": [{"tier": "hbm", "fraction": 0.1, "ways": 4},
                                     {"tier": "ssd", "dtype": "int8"}]}, "here")
    cache = cache_layout(1000, 0.1, 4)
    record = record_layout(spec.levels[0], 8, "adagrad").record_bytes
    assert record == 64
    log = log_layout(1000, 9 + 32)
    assert log.file_bytes == file_bytes(log.slots, 9 + 32 + 4)  # a row's number goes with it
    assert tier_bytes(spec, 1000, 8, "adagrad") == TierBytes(
        hbm=cache.slots * record + cache.metadata_bytes, ddr=log.memory_bytes, ssd=log.file_bytes)


def test_int4_needs_an_even_dimension():
    with pytest.raises(ConfigError, match="table 'user': storage int4 packs two columns in a byte "
                                          "and needs an even embedding_dim, found 5; take 6"):
        _table(embedding_dim=5, storage="int4")


def test_sharding_takes_one_type_or_several() -> None:
    one, several, any_kind = (EmbeddingBagConfig(4, 4, "t", sharding=value)
                              for value in (["row_wise"], ("row_wise", "table_wise"), "auto"))
    assert one.sharding is ShardingType.ROW_WISE
    assert one.allowed_sharding == (ShardingType.ROW_WISE,)
    assert several.allowed_sharding == (ShardingType.ROW_WISE, ShardingType.TABLE_WISE)
    assert any_kind.sharding is None
    assert any_kind.allowed_sharding == ()


@pytest.mark.parametrize(("field", "value", "message"), [
    ("sharding", ["row_wise", "rowwise"], "sharding: unknown ShardingType 'rowwise'.*row_wise"),
    ("sharding", [], "expected a sharding type or a list of them, found \\[\\]"),
    ("ranks", [0, -1], "ranks: expected a list of ranks, such as \\[0, 1\\], found"),
    ("ranks", 3, "ranks: expected a list of ranks"),
    ("ranks", [True], "ranks: expected a list of ranks"),
    ("max_column_splits", 0, "max_column_splits must be a positive integer, found 0")])
def test_constraints_that_cannot_be(field: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EmbeddingBagConfig(4, 4, "t", **{field: value})


def test_ranks_are_sorted_and_named_once() -> None:
    assert EmbeddingBagConfig(4, 4, "t", ranks=[3, 1, 3]).ranks == (1, 3)
