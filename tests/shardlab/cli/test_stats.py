"""``shardlab stats``: the table, the file, and mistakes without a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardlab.cli.main import main
from shardlab.planner.statistics import read_statistics
from tests.shardlab.data.criteo_rows import make_rows, write_tsv

JOB = """\
tables: {preset: criteo_kaggle, embedding_dim: 4, max_rows: 100}
data: {kind: criteo_tsv, path: PATH}
"""


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["stats", *arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_data_are_described_and_written(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    path, target = write_tsv(tmp_path / "a.tsv", make_rows(60)), tmp_path / "ids.json"
    code, out, _ = run(capsys, str(path), "-o", str(target), "--samples", "50")
    assert code == 0
    assert "50 samples" in " ".join(out.split())
    assert "C26" in out
    assert f"statistics written to {target}" in " ".join(out.split())
    found = read_statistics(target)
    assert (found.samples, len(found.records)) == (50, 26)


def test_jobs_can_be_changed(tmp_path: Path, capsys) -> None:
    path, job = write_tsv(tmp_path / "a.tsv", make_rows(30)), tmp_path / "job.yaml"
    job.write_text(JOB.replace("PATH", str(path)))
    target = tmp_path / "ids.json"
    assert run(capsys, str(job), "-o", str(target), "--set", "tables.max_rows=7")[0] == 0
    assert max(record.rows for record in read_statistics(target).records) == 7


@pytest.mark.parametrize(("arguments", "text"), [
    (["none.yaml"], "job file none.yaml: not found"),
    (["none.tsv"], "none.tsv"),
    (["a.tsv", "--set", "batch_size=1"], "--set changes a job; a.tsv is none"),
    (["job.yaml", "--feature", "x"], "--feature names columns of a file; the job job.yaml names "),
    (["job.yaml", "--set", "tables.max_row=7"], "max_row"),
])
def test_mistakes_are_named(tmp_path: Path, capsys, monkeypatch, arguments: list[str],
                            text: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_tsv(tmp_path / "a.tsv", make_rows(3))
    (tmp_path / "job.yaml").write_text(JOB.replace("PATH", str(path)))
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert text in err
    assert "Traceback" not in err
