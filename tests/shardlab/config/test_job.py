"""Jobs: defaults, round trip, and every problem listed at once with its YAML path."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from shardlab.config import JobConfig, load_job
from shardlab.errors import ConfigError
from shardlab.presets import CRITEO_KAGGLE_CARDINALITIES
from shardlab.specs import BoundsMode, ExchangeKind, PoolingType, ShardingType
from shardlab.storage_specs import Tier

TABLE = {"name": "t", "num_embeddings": 10, "embedding_dim": 4, "feature_names": ["C1"]}


def job_file(folder: Path, **sections: Any) -> Path:
    """A small valid job with these top-level keys replaced."""
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump({"tables": [TABLE], **sections}))
    return path


def problems_of(path: Path | None, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_job(path, list(overrides))
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def models_in(model: type[BaseModel]) -> list[type[BaseModel]]:
    found = [model]
    for field in model.model_fields.values():
        stack = [field.annotation]
        while stack:
            part = stack.pop()
            stack += get_args(part)
            if isinstance(part, type) and issubclass(part, BaseModel):
                found += models_in(part)
    return found


def test_demo_job_is_the_default_and_small_enough_for_a_laptop():
    job = load_job(None)
    tables = job.table_configs()
    assert job.ranks == 2
    assert job.data.kind == "synthetic_criteo"
    assert [table.feature_names for table in tables] == [(f"C{i}",) for i in range(1, 27)]
    assert sum(table.num_embeddings * table.embedding_dim * 4 for table in tables) < 256 << 20


def test_a_job_of_tables_alone_is_complete(tmp_path):
    job = load_job(job_file(tmp_path))
    assert job.model.kind == "dlrm"
    assert job.optimizer.sparse.kind == "row_wise_adagrad"
    assert job.data.train_rows == (0, 2_000_000)
    assert job.table_configs()[0].name == "t"


def test_table_fields_reach_the_spec(tmp_path):
    table = {**TABLE, "pooling": "mean", "pooling_factor": 2.5, "sharding": "row_wise",
             "exchange": "rows", "bounds": "ignore", "storage": {"dtype": "fp32", "tier": "ddr"},
             "weight_init_min": -0.5, "weight_init_max": 0.5}
    spec, = load_job(job_file(tmp_path, tables=[table])).table_configs()
    assert spec.pooling is PoolingType.MEAN
    assert spec.pooling_factor == 2.5
    assert spec.sharding is ShardingType.ROW_WISE
    assert spec.exchange is ExchangeKind.ROWS
    assert spec.bounds is BoundsMode.IGNORE
    assert spec.storage.home.tier.value == "ddr"
    assert spec.init_range == (-0.5, 0.5)


@pytest.mark.parametrize(("written", "names"), [([], ("t",)), ("C3", ("C3",)),
                                                (["C3", "C4"], ("C3", "C4"))])
def test_feature_names_may_be_absent_one_or_many(tmp_path, written, names):
    table = {**TABLE, "feature_names": written}
    columns = {"columns": {"dense": []}, "kind": "parquet", "path": str(job_file(tmp_path))}
    spec, = load_job(job_file(tmp_path, tables=[table], data=columns)).table_configs()
    assert spec.feature_names == names


def test_preset_keeps_full_cardinalities_unless_capped():
    full = load_job(None, ["tables={preset: criteo_kaggle, embedding_dim: 8}"]).table_configs()
    assert tuple(table.num_embeddings for table in full) == CRITEO_KAGGLE_CARDINALITIES
    capped = load_job(None, ["tables.max_rows=100", "tables.sharding=table_wise"]).table_configs()
    assert max(table.num_embeddings for table in capped) == 100
    assert min(table.num_embeddings for table in capped) == 3
    assert {table.sharding for table in capped} == {ShardingType.TABLE_WISE}


@pytest.mark.parametrize("overrides", [
    [],
    ["tables.storage={dtype: fp32, tier: ddr}", "tables.sharding=row_wise", "train.max_steps=3"],
    ["model={kind: dcn, cross_rank: 8}", "optimizer.dense={kind: sgd, momentum: 0.9}",
     "optimizer.sparse={kind: adam, betas: [0.8, 0.9], eps: 1e-6}",
     "optimizer.schedule={kind: cosine, warmup_steps: 5, steps: 50}"],
    ["data.train_rows=[5, 17]", "train.run_dir='runs/ö: x'", "topology=8xh100"],
], ids=["demo", "preset", "kinds", "strings"])
def test_resolved_yaml_reads_back_to_an_equal_job(tmp_path, overrides):
    job = load_job(None, overrides)
    path = tmp_path / "resolved.yaml"
    path.write_text(job.resolved_yaml(), encoding="utf-8")
    assert load_job(path) == job


def test_open_ended_rows_survive_the_round_trip(tmp_path):
    data = {"kind": "criteo_tsv", "path": str(job_file(tmp_path)), "train_rows": [10, None]}
    job = load_job(job_file(tmp_path, data=data))
    path = tmp_path / "resolved.yaml"
    path.write_text(job.resolved_yaml())
    assert load_job(path).data.train_rows == (10, None)


def test_numbers_in_scientific_notation_are_numbers():
    assert load_job(None, ["optimizer.dense.lr=1e-3"]).optimizer.dense.lr == 0.001


def test_overrides_win_over_the_file(tmp_path):
    job = load_job(job_file(tmp_path, batch_size=5), ["batch_size=7", "tables[0].name=u"])
    assert job.batch_size == 7
    assert job.tables[0].name == "u"


def test_an_override_of_an_aliased_section_changes_only_that_one(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("tables: [{name: a, num_embeddings: 9, embedding_dim: 2, feature_names: C1, "
                    "storage: &s {dtype: fp32}},\n {name: b, num_embeddings: 9, embedding_dim: 2, "
                    "feature_names: C2, storage: *s}]\n")
    job = load_job(path, ["tables[1].storage.tier=ssd"])
    assert job.table_configs()[0].storage.home.tier is None
    assert job.table_configs()[1].storage.home.tier is Tier.SSD


def test_every_field_has_a_description():
    for model in models_in(JobConfig):
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"


def test_a_job_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        load_job(None).batch_size = 3


def test_a_job_made_in_python_is_checked_too():
    with pytest.raises(ValidationError, match="kind adam does not take it"):
        JobConfig(tables={"preset": "criteo_kaggle"},
                  optimizer={"dense": {"kind": "adam", "momentum": 0.5}})


def test_every_problem_is_listed_at_once(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("""
batch_size: 0
tables:
  - {name: a, num_embeddings: 10, embeding_dim: 4, storage: fp31}
  - {name: b, num_embeddings: 1.5, embedding_dim: 4, storage: {levels: [{dtyp: 1}]}, pooling: sun}
  - {name: c, num_embeddings: 10, embedding_dim: 4, feature_names: [C3]}
  - {name: c, num_embeddings: 10, embedding_dim: 4, feature_names: [C3], weight_init_min: 4}
model: {kind: dcn, bottom_mlp: [3], cross_layers: true}
data: {kind: criteo_tsv, path: [job.yaml, absent.tsv], train_rows: [5, 2], columns: {dens: []}}
optimizer:
  sparse: {kind: sgd, lr: -1, eps: 0.1}
  schedule: {kind: cosine}
wire: {forward: fp17}
trian: {}
train: {resume: atuo}
batch_size: 4
""")
    problems = problems_of(path, "batch_size=no", "nothing")
    expected = [
        "batch_size: written twice, on lines 2 and 16",
        "--set nothing: expected key=value",
        "batch_size: must be a number, found False",
        "tables[0].embedding_dim: is required, but not given",
        "tables[0].embeding_dim: unknown key (did you mean 'embedding_dim'?); known: name, ",
        "tables[0].storage: unknown storage dtype 'fp31' (did you mean 'fp32'?); known: "
        "fp32, fp16, bf16, fp8, int8, int4",
        "tables[1].num_embeddings: must be a whole number",
        "tables[1].storage.levels[0]: unknown key 'dtyp' (did you mean 'dtype'?)",
        "tables[1].pooling: must be 'sum' or 'mean', found 'sun' (did you mean 'sum'?)",
        "tables[3].weight_init_min: 4.0 lies above weight_init_max",
        "tables: table 'c' is defined 2 times",
        "model.bottom_mlp: kind dcn does not take it; it takes cross_layers, cross_rank",
        "model.cross_layers: must be a number, found True",
        "data.path[1]: no file matches 'absent.tsv' (looked in ",
        "data.train_rows: [5, 2) holds no row",
        "data.columns.dens: unknown key (did you mean 'dense'?); known: label, dense, sparse",
        "optimizer.sparse.lr: must be greater than or equal to 0, found -1",
        "optimizer.sparse.eps: kind sgd does not take it; it takes weight_decay",
        "optimizer.schedule.steps: kind cosine needs the step at which it ends",
        "wire.forward: must be 'fp32', 'fp16', 'bf16', 'fp8', 'fp8_e5m2', 'int8', 'int4' or "
        "'auto', found 'fp17' (did you mean 'fp16'?)",
        "trian: unknown key (did you mean 'train'?); known: batch_size, ",
        "train.resume: no checkpoint at 'atuo' (did you mean 'auto'?)",
    ]
    for start in expected:
        assert [line for line in problems if line.startswith(start)], (start, problems)
    # tables[3] clashes with tables[2] by name only: they are the same table to the feature check
    assert len(problems) == len(expected) + 1  # job.yaml is found only from its own folder
    assert any(line.startswith("data.path[0]: ") for line in problems)


@pytest.mark.parametrize(("sections", "start"), [
    ({"tables": []}, "tables: no tables"),
    ({"tables": None}, "tables: must be a list, found None"),
    ({"tables": [3]}, "tables[0]: must be a mapping, found 3"),
    ({"tables": {"preset": "criteo"}}, "tables.preset: must be 'criteo_kaggle', found 'criteo' "
                                       "(did you mean 'criteo_kaggle'?)"),
    ({"tables": {"preset": "criteo_kaggle", "max_row": 3}},
     "tables.max_row: unknown key (did you mean 'max_rows'?); known: preset, "),
    ({"model": 3}, "model: must be a mapping, found 3"),
    ({"model": {"kind": "dlmr"}}, "model.kind: must be 'dlrm', 'deepfm' or 'dcn', found 'dlmr' "
                                  "(did you mean 'dlrm'?)"),
    ({"tables": [{**TABLE, "sharding": "rowwise"}]},
     "tables[0].sharding: must be 'data_parallel', "),
    ({"tables": [{**TABLE, "sharding": ["row_wise", "tablewise"]}]},
     "tables[0].sharding[1]: must be 'data_parallel', "),
    ({"tables": [{**TABLE, "hot_rows": "maybe"}]},
     "tables[0].hot_rows: must be a whole number above 0 or 'auto', found 'maybe'"),
    ({"tables": [{**TABLE, "hot_rows": -1}]},
     "tables[0].hot_rows: must be a whole number above 0 or 'auto', found -1"),
    ({"tables": [{**TABLE, "num_embeddings": "many"}]},
     "tables[0].num_embeddings: must be a whole number or 'unbounded', found 'many'"),
    ({"dense_dtype": "fp16"}, "dense_dtype: must be 'fp32' or 'bf16', found 'fp16'"),
    ({"data": {"kind": "criteo_parquet"}}, "data.path: kind criteo_parquet needs a file"),
    ({"data": {"train_rows": [0, 9], "columns": {"dense": ["x"]}}},
     "data.columns.dense: kind synthetic_criteo does not take it"),
    ({"data": {"train_rows": [0, 9], "on_bad_row": "skip"}},
     "data.on_bad_row: kind synthetic_criteo does not take it; it takes seed"),
    ({"data": {"seed": 1}}, "data.train_rows: the generated data has no end of its own"),
    ({"data": {"train_rows": [0, 9], "validation_rows": [9, None]}},
     "data.validation_rows: the generated data has no end of its own"),
    ({"data": {"train_rows": [0, 9], "validation_rows": [8, 10]}},
     "data.validation_rows: [8, 10] overlaps train_rows [0, 9]"),
    ({"data": {"train_rows": [0, 9], "validation_fraction": 0.1}},
     "data.validation_fraction: the generated data has no end"),
    ({"data": {"train_rows": [-1, 9]}}, "data.train_rows[0]: must be greater than or equal to 0"),
    ({"data": {"train_rows": [1]}}, "data.train_rows[1]: is required, but not given"),
    ({"data": {"train_rows": [0, 9], "path": "x.tsv"}},
     "data.path: kind synthetic_criteo does not take it; it takes seed"),
    ({"optimizer": {"schedule": {"kind": "linear_warmup"}}},
     "optimizer.schedule.warmup_steps: kind linear_warmup needs at least 1 step"),
    ({"optimizer": {"schedule": {"kind": "linear_decay", "warmup_steps": 9, "steps": 9}}},
     "optimizer.schedule.steps: 9 does not lie after the 9 warmup_steps"),
    ({"optimizer": {"schedule": {"warmup_steps": 9}}},
     "optimizer.schedule.warmup_steps: kind constant does not take it"),
    ({"optimizer": {"sparse": {"lr": float("nan")}}}, "optimizer.sparse.lr: must be "),
    ({"optimizer": {"sparse": {"lr": "fast"}}},
     "optimizer.sparse.lr: must be a number, found 'fast'"),
    ({"batch_size": 1.5}, "batch_size: must be a whole number, found 1.5"),
    ({"train": {"elastic": "perhaps"}}, "train.elastic: must be true or false, found 'perhaps'"),
    ({"optimizer": {"sparse": {"betas": [0.9, 1.0], "kind": "adam"}}},
     "optimizer.sparse.betas[1]: must be less than 1, found 1.0"),
    ({"plan": "absent.json"}, "plan: no file 'absent.json' (looked in "),
    ({"ranks": 0}, "ranks: must be greater than 0, found 0"),
    ({3: 4}, "[3]: Keys should be strings, found 3"),
], ids=lambda value: str(value)[:40] if isinstance(value, dict) else "")
def test_problem_names_its_place_and_the_way_out(tmp_path, sections, start):
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({"tables": [TABLE], **sections}))
    problems = problems_of(path)
    assert [line for line in problems if line.startswith(start)], problems


def test_ways_over_hosts_that_do_not_go_together_are_named():
    two_stage = "exchange.hierarchy=two_stage"
    assert problems_of(None, two_stage, "parallel.replicas=2") == [
        "exchange.hierarchy: two_stage was asked for, but replica groups of the tables exchange "
        "flat; leave exchange.hierarchy or parallel.replicas out"]
    for other, name in ((two_stage, two_stage.replace("=", ": ")),
                        ("parallel.replicas=2", "parallel.replicas")):
        assert problems_of(None, other, "tables.hot_rows=100") == [
            f"tables.hot_rows: copies of hot rows are not made beside {name}; leave one of them "
            "out"]


def test_tables_of_several_widths_need_dcn(tmp_path):
    tables = [TABLE, {**TABLE, "name": "u", "embedding_dim": 8, "feature_names": ["C2"]}]
    line, = problems_of(job_file(tmp_path, tables=tables))
    assert line.startswith("model.kind: dlrm needs one embedding_dim for all tables, but "
                           "'t' has 4, 'u' has 8")
    load_job(job_file(tmp_path, tables=tables, model={"kind": "dcn"}))


def test_features_must_be_in_the_data_or_mapped_to_it(tmp_path):
    tables = [{**TABLE, "feature_names": ["user"]}]
    line, = problems_of(job_file(tmp_path, tables=tables))
    assert line == ("data.columns.sparse: feature 'user' reads column 'user', but kind "
                    "synthetic_criteo has C1 to C26; map it, such as {user: C1}")
    data = {"train_rows": [0, 9], "columns": {"sparse": {"user": "C7"}}}
    assert load_job(job_file(tmp_path, tables=tables, data=data)).data.columns.sparse == {
        "user": "C7"}


def test_mapped_columns_need_a_feature(tmp_path):
    data = {"kind": "parquet", "path": str(job_file(tmp_path)),
            "columns": {"sparse": {"C1": "user", "C11": "item"}}}
    line, = problems_of(job_file(tmp_path, data=data))
    assert line == "data.columns.sparse.C11: no table has this feature (did you mean 'C1'?)"


def test_features_claimed_by_two_tables_are_refused(tmp_path):
    line, = problems_of(job_file(tmp_path, tables=[TABLE, {**TABLE, "name": "u"}]))
    assert line == "tables: feature 'C1' is claimed by tables 't' and 'u'"


def test_path_is_one_or_many_files_or_patterns(tmp_path):
    for name in ("a.tsv", "b.tsv", "[c].tsv"):
        (tmp_path / name).write_text("")
    for path in (str(tmp_path / "a.tsv"), str(tmp_path / "?.tsv"), str(tmp_path / "[c].tsv")):
        data = {"kind": "criteo_tsv", "path": path}
        job = load_job(job_file(tmp_path, data=data))
        assert job.data.path == (path,)
        assert job.data.num_dense == 13


def test_a_folder_is_not_a_data_file(tmp_path):
    data = {"kind": "criteo_tsv", "path": str(tmp_path)}
    line, = problems_of(job_file(tmp_path, data=data))
    assert line.endswith("is not a file that can be read")
