"""``hot_rows`` of a job: which rows it takes, that a run keeps them, and that nothing changes."""

from __future__ import annotations

import contextlib
import io
import json

import pytest

from shardlab.config import load_job
from shardlab.errors import ConfigError
from shardlab.launch.hot_rows import wishes
from shardlab.launch.statistics import job_work, measure
from shardlab.launch.train import run_job
from shardlab.plan import ShardingPlan
from tests.harness import run_ranks

JOB = """
batch_size: 64
tables:
  - {name: a, num_embeddings: 500, embedding_dim: 16, feature_names: C1, sharding: row_wise,
     exchange: rows, hot_rows: 20}
  - {name: b, num_embeddings: 500, embedding_dim: 16, feature_names: C2, sharding: table_wise,
     exchange: rows, hot_rows: 30}
  - {name: c, num_embeddings: 50, embedding_dim: 16, feature_names: C3, sharding: data_parallel,
     hot_rows: auto}
  - {name: d, num_embeddings: 300, embedding_dim: 16, feature_names: C4, sharding: row_wise,
     exchange: rows, hot_rows: auto}
model: {kind: dlrm, bottom_mlp: [8], top_mlp: [8]}
data: {kind: synthetic_criteo, train_rows: [0, 8192], validation_rows: [8192, 8448]}
train: {log_every: 4, max_steps: 4, checkpoint_every: 2}
"""


@pytest.fixture
def path(tmp_path):
    written = tmp_path / "job.yaml"
    written.write_text(JOB)
    return written


def _run(groups, path, folder, sets=()):
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        assert run_job(load_job(path, [f"train.run_dir={folder}", *sets])) == 0
    return shown.getvalue()


def _hot(folder):
    plan = ShardingPlan.from_json((folder / "plan.json").read_text())
    return {entry.table: entry.hot_rows for entry in plan.tables}


def _validation(folder):
    return json.loads((folder / "summary.json").read_text())["validation"]


def test_a_run_finds_its_hot_rows_and_a_resumed_one_keeps_them(path, tmp_path):
    shown = run_ranks(2, _run, path, tmp_path / "hot")[0]
    hot = _hot(tmp_path / "hot")
    assert len(hot["a"]) == 20
    assert len(hot["b"]) == 30
    assert hot["c"] == hot["d"] == ()  # auto: with two ranks a copy relieves nobody
    assert "hot rows: 50 on every rank" in shown
    assert "d: 0, which 0% of its ids take" in shown
    assert "none of c: it is data_parallel, every rank has all rows already" in shown
    cold = [f"tables[{table}].hot_rows=" for table in range(4)]
    run_ranks(2, _run, path, tmp_path / "cold", cold)
    assert not any(_hot(tmp_path / "cold").values())
    assert _validation(tmp_path / "hot") == _validation(tmp_path / "cold")
    again = run_ranks(2, _run, path, tmp_path / "hot", ["train.max_steps=6"])[0]
    assert "hot rows" not in again
    assert _hot(tmp_path / "hot") == hot
    run_ranks(2, _run, path, tmp_path / "cold", ["train.max_steps=6", *cold])
    assert _validation(tmp_path / "hot") == _validation(tmp_path / "cold")


def test_statistics_say_which_rows_are_hot(path, tmp_path):
    work = job_work(load_job(path), path.name, None)
    found = measure(work, 1024, lambda _: None)
    record = next(record for record in found.records if record.features == ("C1",))
    (tmp_path / "stats.json").write_text(found.to_json())
    run_ranks(2, _run, path, tmp_path / "run", [f"statistics={tmp_path / 'stats.json'}"])
    assert set(_hot(tmp_path / "run")["a"]) == {row for row, _ in record.hottest[:20]}


def test_a_world_of_one_has_no_copies(path, tmp_path):
    (shown,) = run_ranks(1, _run, path, tmp_path / "one")
    assert "hot rows" not in shown
    assert not any(_hot(tmp_path / "one").values())


def test_preset_wants_them_of_all_tables(tmp_path):
    written = tmp_path / "job.yaml"
    written.write_text("tables: {preset: criteo_kaggle, hot_rows: auto}\n")
    assert set(wishes(load_job(written)).values()) == {"auto"}
    assert len(wishes(load_job(written))) == 26
    assert not wishes(load_job(written, ["tables.hot_rows="]))


@pytest.mark.parametrize("value", ["0", "-3", "some", "true"])
def test_other_values_are_refused(path, value):
    with pytest.raises(ConfigError, match=r"tables\[0\].hot_rows"):
        load_job(path, [f"tables[0].hot_rows={value}"])
