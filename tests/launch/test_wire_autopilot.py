"""`wire: auto`: what it takes, that it repeats, that the run keeps it, and that nothing trains."""

from __future__ import annotations

import contextlib
import io
import json

import pytest

from shardlab.config import load_job
from shardlab.errors import ConfigError
from shardlab.launch.train import run_job
from shardlab.launch.wire_autopilot import _cheapest
from tests.harness import run_ranks

JOB = """
batch_size: 64
tables:
  - {name: a, num_embeddings: 500, embedding_dim: 16, feature_names: C1, sharding: row_wise,
     exchange: rows}
  - {name: b, num_embeddings: 500, embedding_dim: 16, feature_names: C2, sharding: table_wise,
     exchange: pooled}
  - {name: c, num_embeddings: 50, embedding_dim: 16, feature_names: C3, sharding: data_parallel}
model: {kind: dlrm, bottom_mlp: [8], top_mlp: [8]}
data: {kind: synthetic_criteo, train_rows: [0, 2048], validation_rows: [2048, 2176]}
wire: auto
train: {log_every: 4, max_steps: 4}
"""


@pytest.mark.parametrize(("errors", "bound", "found"), [
    ({"fp32": 0.0, "fp16": 1e-4, "bf16": 1e-3, "int8": 5e-3, "fp8": 2e-2, "int4": 0.1}, 1e-2,
     "int8"),
    ({"fp32": 0.0, "int8": 5e-3, "fp8": 6e-3, "int4": 0.1}, 1e-2, "int8"),
    ({"fp32": 0.0, "fp16": 1e-4, "bf16": 1e-3, "int8": 5e-3}, 1e-3, "fp16"),
    ({"fp32": 0.0, "fp16": 1e-4}, 1e-9, "fp32"), ({}, 1.0, "fp32")])
def test_the_cheapest_below_the_bound_is_taken(errors, bound, found):
    assert _cheapest(errors, bound) == found


def _run(groups, path, folder, sets):
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        assert run_job(load_job(path, [f"train.run_dir={folder}", *sets])) == 0
    return shown.getvalue()


def _auto(bound):
    return f"wire={{forward: auto, backward: auto, bound: {bound:.9f}}}"


def _codecs(folder):
    plan = json.loads((folder / "plan.json").read_text())
    return {entry["table"]: (entry["wire"]["forward"], entry["wire"]["backward"])
            for entry in plan["tables"]}


def test_a_run_chooses_repeats_and_keeps_its_codecs(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    folders = [tmp_path / name for name in ("one", "two", "exact")]
    for folder, bound in zip(folders, (0.02, 0.02, 1e-9), strict=True):
        shown = run_ranks(2, _run, path, folder, [_auto(bound)])
        assert "wire: auto, 8 batches" in shown[0]
    choices = [json.loads((folder / "wire.json").read_text()) for folder in folders]
    assert choices[0] == choices[1]
    assert _codecs(folders[0])["a"] == ("int8", "int8")
    assert set(_codecs(folders[2]).values()) == {("fp32", "fp32")}
    for direction in ("forward", "backward"):
        errors = choices[0]["errors"][direction]["a"]
        assert errors["fp32"] == 0 < errors["fp16"] < errors["bf16"] < errors["int4"]
    # Codecs that a table's own rounding needs are those of the run that it continues.
    run_ranks(2, _run, path, folders[0], ["train.max_steps=6", _auto(0.02)])
    assert _codecs(folders[0])["a"] == ("int8", "int8")
    lines = [json.loads(line) for line in (folders[0] / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    assert trained[-1]["step"] == 6
    sent = trained[0]["wire_by_table"]["a"]
    assert sent["rows"] > 0
    assert 0 < sent["rows_error"] <= 0.02
    assert sum(table[kind] for table in trained[0]["wire_by_table"].values()
               for kind in ("ids", "rows", "gradients")) < trained[0]["wire_bytes_per_step"]


def test_a_job_names_the_codec_of_its_dense_gradients(tmp_path):
    path, found = tmp_path / "job.yaml", {}
    path.write_text(JOB)
    for codec in ("fp32", "int8"):
        folder = tmp_path / codec
        shown = run_ranks(2, _run, path, folder, [f"wire={{forward: fp16, dense: {codec}}}"])[0]
        found[codec] = json.loads((folder / "summary.json").read_text())
        assert found[codec]["dense_wire"] == codec
        assert (" (int8)" in shown) == (codec == "int8")
        assert json.loads((folder / "plan.json").read_text())["dense_wire"]["codec"] == codec
        line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
        assert line["dense_bytes_per_step"] == found[codec]["wire_per_step"]["dense_all_reduce"]
    plain, coded = (found[codec]["wire_per_step"]["dense_all_reduce"] for codec in found)
    assert plain == 2 * 4 * 449
    # Eight parameters, each filled up to a span of 258 bytes, and a mark each; two ranks send as
    # many bytes together as there are, there and back.
    assert coded == 2 * (8 * 258 + 8 * 4)


def test_a_codec_that_is_none_is_refused(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    for wire in ("{dense: auto}", "{dense: int9}"):
        with pytest.raises(ConfigError, match=r"wire\.dense: .*fp32.*int4"):
            load_job(path, [f"wire={wire}"])


def test_measuring_trains_nothing(tmp_path):
    """With a bound that leaves fp32, a run that measured first equals one that did not."""
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    for name, sets in (("auto", [_auto(1e-9)]), ("plain", ["wire=fp32"])):
        run_ranks(2, _run, path, tmp_path / name, sets)
    losses = [json.loads((tmp_path / name / "summary.json").read_text())["validation"]
              for name in ("auto", "plain")]
    assert losses[0] == losses[1]


def test_unknown_tables_are_refused(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    with pytest.raises(ConfigError, match=r"wire.tables.aa: no table has this name"):
        load_job(path, ["wire={tables: {aa: {forward: int8}}}"])
