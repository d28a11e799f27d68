"""Whole jobs: in this process, on two ranks through the command line, interrupted and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shardlab.cli.main import main
from shardlab.config import load_job
from shardlab.errors import ConfigError
from shardlab.launch.train import run_job
from shardlab.phases import MEASURED_PHASES
from shardlab.plan import ShardingPlan
from shardlab.planner.compare import read_run
from shardlab.planner.plan_file import read_plan_file
from tests.job_runs import train_on_pool

SMALL = ["tables={preset: criteo_kaggle, embedding_dim: 4, max_rows: 500}", "batch_size=16",
         "model={kind: dlrm, bottom_mlp: [16], top_mlp: [16]}", "train.log_every=10"]
#: 40 steps of two ranks, then 4 of validation.
ROWS = ["data.train_rows=[0, 1280]", "data.validation_rows=[1280, 1408]"]


@pytest.fixture(autouse=True)
def _torch_as_before() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def command(run_dir: Path, *overrides: str) -> list[str]:
    sets = [f"train.run_dir={run_dir}", *SMALL, *ROWS, *overrides]
    return [sys.executable, "-m", "shardlab.cli", "train", "--demo",
            *(word for override in sets for word in ("--set", override))]


def run(run_dir: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(run_dir, *overrides), capture_output=True, text=True,
                          timeout=120, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})


def weights(run_dir: Path, step: int) -> dict[str, bytes]:
    """The tensors of a checkpoint, as bytes by file."""
    folder = run_dir / "checkpoints" / f"step-{step}"
    found = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    assert any(name.startswith("rows-") for name in found)
    return found


def records(run_dir: Path) -> list[dict[str, object]]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_job_on_one_rank_fills_its_run_folder(tmp_path, capsys):
    job = load_job(None, [*SMALL, *ROWS, f"train.run_dir={tmp_path / 'run'}", "ranks=1"])
    assert run_job(job) == 0
    assert load_job(tmp_path / "run" / "job.yaml") == job
    plan = ShardingPlan.from_json((tmp_path / "run" / "plan.json").read_text())
    plan.check(job.table_configs(), 1)
    steps = [record["step"] for record in records(tmp_path / "run") if record["kind"] == "train"]
    assert steps == [10, 20, 30, 40, 50, 60, 70, 80]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["validation"]["rows"] == 128
    assert "validation AUC" in capsys.readouterr().out


@pytest.mark.parametrize("overrides", [
    ["model={kind: deepfm, top_mlp: [8]}", "optimizer.dense={kind: sgd, lr: 0.1}"],
    ["model={kind: dcn, top_mlp: [8], cross_layers: 1}", "dense_dtype=bf16",
     "optimizer.schedule={kind: cosine, warmup_steps: 2, steps: 8}"],
    ["tables=[{name: t, num_embeddings: unbounded, embedding_dim: 8, feature_names: [C3, C12], "
     "storage: {kind: pruned, budget: {bytes: 200kB}, chunks: 1, start: empty}}]",
     "model={kind: deepfm, top_mlp: [8]}"],
], ids=["deepfm", "dcn, bf16, cosine", "ids without a bound"])
def test_every_kind_of_job_runs(tmp_path, overrides):
    job = load_job(None, [*SMALL, *ROWS, *overrides, f"train.run_dir={tmp_path}", "ranks=1",
                          "train.max_steps=8"])
    assert run_job(job) == 0


def test_a_run_can_go_on_from_another_run_s_checkpoint(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    common = [*SMALL, *ROWS, "ranks=1"]
    assert run_job(load_job(None, [*common, f"train.run_dir={first}", "train.max_steps=8"])) == 0
    plan = json.loads((first / "plan.json").read_text())
    plan["tables"][2]["exchange"] = "rows"  # another plan than the planner's would be kept
    (first / "plan.json").write_text(json.dumps(plan))
    for resume in (first / "checkpoints" / "step-8", tmp_path / "copy"):
        if not resume.exists():  # nothing but the checkpoint: it is planned anew
            shutil.copytree(first / "checkpoints" / "step-8", resume)
        job = load_job(None, [*common, f"train.run_dir={second / resume.name}",
                              f"train.resume={resume}", "train.max_steps=12"])
        assert run_job(job) == 0
        assert (second / resume.name / "checkpoints" / "step-12").is_dir()
    assert json.loads((second / "step-8" / "plan.json").read_text()) == plan


def check_phases(run_dir: Path, ranks: int, every: set[str]) -> None:
    """Every phase of this plan took its time, on every rank and in every interval; no other did."""
    summary = json.loads((run_dir / "summary.json").read_text())
    assert len(summary["phase_ms"]) == ranks
    trained = [record["phase_ms"] for record in records(run_dir) if record["kind"] == "train"]
    for phase_ms in (*summary["phase_ms"], *trained):
        assert list(phase_ms) == list(MEASURED_PHASES)
        assert {phase for phase, ms in phase_ms.items() if ms > 0} == every
    step = summary["pace"]["step_ms_p50"]
    assert 0.5 * step < sum(summary["phase_ms"][0].values()) < 1.5 * step


def test_the_time_of_a_step_is_booked_on_its_phases(tmp_path, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_job(load_job(None, [*SMALL, *ROWS, f"train.run_dir={one}", "ranks=1"])) == 0
    check_phases(one, 1, {"ids", "read", "update", "grads", "dense", "overhead", "wait"})
    train_on_pool(None, 2, two, [*SMALL, *ROWS, "tables.sharding=row_wise"])
    check_phases(two, 2, {*MEASURED_PHASES} - {"prefetch"})
    capsys.readouterr()
    compare_runs(two, capsys)


def compare_runs(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Predicted bytes are the measured ones, to the byte."""
    measured, (_, predicted) = read_run(run_dir), read_plan_file(run_dir / "plan.json")
    assert predicted is not None
    assert predicted.tables == measured.tables
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--compare", str(run_dir)])
    assert not stop.value.code
    assert "Predicted and measured" in capsys.readouterr().out


def test_rows_beyond_the_data_are_refused(tmp_path):
    path = tmp_path / "clicks.tsv"
    path.write_text("\t".join(["1", *["1"] * 13, *["0000000a"] * 26]) + "\n")
    job = load_job(None, [*SMALL, f"data={{kind: criteo_tsv, path: {path}, train_rows: [5, 9]}}",
                          f"train.run_dir={tmp_path / 'run'}", "ranks=1"])
    with pytest.raises(ConfigError, match=r"data\.train_rows: rows \[5, 9\) hold no row"):
        run_job(job)


def test_two_ranks_show_one_summary(whole_run):
    assert (whole_run.parent / "stdout").read_text().count("validation AUC") == 1
    assert len(json.loads((whole_run / "summary.json").read_text())["tables"]) == 2


def test_a_bad_row_ends_all_ranks_with_one_message(tmp_path):
    path = tmp_path / "clicks.tsv"
    good = "\t".join(["1", *["1"] * 13, *["0000000a"] * 26])
    path.write_text("\n".join([*[good] * 50, "1\t2\t3", *[good] * 50]) + "\n")
    done = run(tmp_path / "run", f"data={{kind: criteo_tsv, path: {path}}}")
    assert done.returncode == 2
    assert "clicks.tsv, line 51: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("number", "code"), [
    (signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130),
], ids=["killed", "ctrl-c"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(tmp_path, number, code, whole_run):
    run_dir = tmp_path / "run"
    with subprocess.Popen(command(run_dir, *LONG), stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        end = time.monotonic() + 60
        while not list(run_dir.glob("checkpoints/step-*/manifest.json")):
            assert time.monotonic() < end
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert not (run_dir / "checkpoints" / f"step-{LAST}").exists()
    train_on_pool(None, 2, run_dir, [*SMALL, *ROWS, *LONG])
    assert weights(run_dir, LAST) == weights(whole_run, LAST)
    for found, wanted in zip(records(run_dir), records(whole_run), strict=True):
        for key in ("kind", "step", "loss", "auc"):
            assert found.get(key) == wanted.get(key)


#: Long enough to be interrupted: 240 steps.
LONG = ["data.train_rows=[0, 7680]", "data.validation_rows=[7680, 7808]",
        "optimizer.schedule={kind: cosine, warmup_steps: 5, steps: 240}",
        "train.checkpoint_every=40"]
LAST = 240


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    """The folder of a run that nobody interrupted; what it printed lies beside."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = run(folder, *LONG)
    assert done.returncode == 0, done.stderr
    (folder.parent / "stdout").write_text(done.stdout)
    return folder
