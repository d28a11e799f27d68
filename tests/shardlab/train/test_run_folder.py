"""The run folder: chosen once for all ranks, never overwritten, cut back on resume."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from shardlab.comm import Groups
from shardlab.errors import CheckpointError, ConfigError
from shardlab.train.run_folder import RunFolder, finite, open_run_folder
from tests.harness import run_ranks

ALONE = Groups()


def fake_checkpoint(folder: Path, step: int) -> Path:
    path = folder / "checkpoints" / f"step-{step}"
    path.mkdir(parents=True)
    (path / "manifest.json").touch()
    return path


def test_new_folders_are_named_by_the_time_and_differ(tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [open_run_folder(None, "auto", ALONE) for _ in range(3)]
    assert len({run.path for run in runs}) == 3
    assert all(run.path.parent == Path("runs") and run.resume_from is None for run in runs)
    assert all(run.checkpoints.is_dir() for run in runs)


def test_auto_starts_anew_then_continues_from_the_newest(tmp_path: Path) -> None:
    assert open_run_folder(tmp_path / "a", "auto", ALONE).resume_from is None
    assert open_run_folder(tmp_path / "a", "auto", ALONE).resume_from is None
    fake_checkpoint(tmp_path / "a", 9)
    newest = fake_checkpoint(tmp_path / "a", 10)
    assert open_run_folder(str(tmp_path / "a"), "auto", ALONE).resume_from == newest


def test_never_refuses_a_folder_with_a_run(tmp_path: Path) -> None:
    run = open_run_folder(tmp_path / "a", "never", ALONE)
    run.append_metrics({"step": 1})
    with pytest.raises(ConfigError, match=r"train\.run_dir: .*/a already holds a run; set "
                                          r"train\.resume=auto"):
        open_run_folder(tmp_path / "a", "never", ALONE)


def test_named_checkpoint_is_continued_in_another_folder(tmp_path: Path) -> None:
    older, newer = (fake_checkpoint(tmp_path / "a", step) for step in (1, 2))
    assert open_run_folder(tmp_path / "b", str(older), ALONE).resume_from == older
    assert open_run_folder(tmp_path / "a", str(newer), ALONE).resume_from == newer
    with pytest.raises(ConfigError, match="/a already has checkpoint step-2; remove it"):
        open_run_folder(tmp_path / "a", str(older), ALONE)
    with pytest.raises(CheckpointError, match=r"train\.resume: .*gone is not a checkpoint folder"):
        open_run_folder(tmp_path / "b", str(tmp_path / "gone"), ALONE)


def open_on_ranks(groups: Groups, folder: str) -> tuple[str, str, str]:
    new = open_run_folder(None if groups.rank else f"{folder}/new", "auto", groups)
    resumed = open_run_folder(f"{folder}/old", "auto", groups)
    with pytest.raises(ConfigError) as caught:
        open_run_folder(f"{folder}/old", "never", groups)
    return str(new.path), str(resumed.resume_from), str(caught.value)


def test_all_ranks_get_rank_0s_answer(tmp_path: Path) -> None:
    newest = fake_checkpoint(tmp_path / "old", 5)
    first, second = run_ranks(2, open_on_ranks, str(tmp_path))
    assert first == second
    assert first[0] == str(tmp_path / "new")
    assert first[1] == str(newest)
    assert "already holds a run" in first[2]


def test_metrics_are_json_lines_cut_back_to_a_checkpoint(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.keep_metrics(0)
    for step in range(4):
        run.append_metrics({"step": step, "auc": math.nan, "loss": 0.1 + step})
    run.sync_metrics()
    with open(run.metrics, "a") as file:
        file.write('{"step": 4, "au')  # a crash while writing
    run.keep_metrics(3)
    run.append_metrics({"step": 9})
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2, 9]
    assert records[1] == {"step": 1, "auc": None, "loss": 1.1}
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl has 4 records, .* after 7"):
        run.keep_metrics(7)


def test_texts_are_written_whole(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_job("batch_size: 8\n")
    run.write_plan("{}")
    run.write_summary({"auc": math.inf, "ranks": (1, 2)})
    assert (tmp_path / "job.yaml").read_text() == "batch_size: 8\n"
    assert (tmp_path / "plan.json").read_text() == "{}"
    assert json.loads((tmp_path / "summary.json").read_text()) == {"auc": None, "ranks": [1, 2]}
    assert len(list(tmp_path.iterdir())) == 3


def test_finite_keeps_everything_but_nan_and_infinity() -> None:
    assert finite({"a": [1.0, math.nan, {"b": -math.inf}], "c": "nan", "d": True}) == \
        {"a": [1.0, None, {"b": None}], "c": "nan", "d": True}
