"""``shardlab bench`` on a tiny shape: every row of the table, and what is refused."""

from __future__ import annotations

import pytest

from shardlab.cli import bench
from shardlab.cli.main import main
from shardlab.launch import speed
from shardlab.launch.building import ROW_OPTIMIZERS
from shardlab.storage_bytes import OPTIMIZER_STATE

TINY = ("--tables", "2", "--rows", "50", "--dim", "4", "--batch-size", "8", "--seconds", "0")


@pytest.fixture(autouse=True)
def _small_arrays(monkeypatch):
    monkeypatch.setattr(speed, "_STREAM_BYTES", 1 << 10)
    monkeypatch.setattr(speed, "_RANDOM_ROWS", 64)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


@pytest.mark.parametrize("optimizer", list(OPTIMIZER_STATE))
def test_bench_measures_streams_rows_and_steps(capsys, optimizer):
    code, out, _ = run(capsys, *TINY, "--optimizer", optimizer)
    assert code == 0
    assert "tables 2, rows 50, dim 4" in out
    for name in ("torch's copy", "torch's gather", "step, "):
        assert name in out


def test_the_reference_stands_beside_the_native_face(capsys, monkeypatch):
    monkeypatch.setattr(speed, "describe_faces", lambda: [("x", "native", "")])
    _, out, _ = run(capsys, *TINY)
    assert "step, native" in out
    assert "step, reference" in out


def test_tables_beyond_the_memory_are_refused(capsys):
    code, _, err = run(capsys, "--rows", "1000000000000")
    assert code == 2
    assert "more than half of the machine's" in err
    assert "lower --rows or --tables" in err


def test_every_optimizer_can_be_chosen():
    assert set(bench._OPTIMIZERS) == set(OPTIMIZER_STATE)
    assert set(ROW_OPTIMIZERS) == set(OPTIMIZER_STATE)
