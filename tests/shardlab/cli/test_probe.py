"""``shardlab probe``: the file, the table, what is refused before anything is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardlab.cli.main import main
from shardlab.launch.probe import machine
from shardlab.planner.topology_file import read_topology
from tests.launch.probe.test_machine import figures


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["probe", *arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_a_topology_is_written_and_shown(tmp_path: Path, capsys, monkeypatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(machine, "measure", lambda ranks, options: asked.append(
        (ranks, options.ssd)) or figures(core_share=[0.4, 1.0]))
    target = tmp_path / "here.yaml"
    code, out, err = run(capsys, "-o", str(target), "--ranks", "2", "--quick", "--ssd", "x")
    assert code == 0
    assert asked == [(2, "x")]
    assert "here: 2 ranks" in out
    assert "each dense layer 0.1 ms" in out
    assert "warning: The machine was busy: a rank got 40% of its core" in err
    assert read_topology(target).name == "here"


@pytest.mark.parametrize(("target", "text"), [
    ("here.json", "a topology file's name ends in .yaml or .yml"),
    ("none/here.yaml", "no such directory: none")])
def test_bad_targets_are_refused_first(capsys, monkeypatch, tmp_path: Path, target: str,
                                       text: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "measure", lambda ranks, options: pytest.fail("measured"))
    code, _, err = run(capsys, "-o", target)
    assert code == 2
    assert text in err
