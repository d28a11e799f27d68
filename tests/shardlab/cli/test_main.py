"""The command line as a whole: help, misspelt commands, exit codes, and no traceback for users."""

from __future__ import annotations

import pytest

import shardlab
from shardlab.cli import main as main_module
from shardlab.cli.main import main
from shardlab.errors import DataError

#: In the order of their use.
COMMANDS = ["train", "launch", "plan", "probe", "stats", "inspect", "export", "import", "compact",
            "doctor", "bench"]


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_the_commands(capsys, flag):
    code, out, _ = run(capsys, flag)
    assert code == 0
    listed = out[out.index("Commands:"):]
    assert [line.split()[0] for line in listed.splitlines()[1:12]] == COMMANDS
    assert "..." not in listed  # what each does fits its line


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"Usage: shardlab {command}" in out


def test_version_is_the_package_s(capsys):
    code, out, _ = run(capsys, "--version")
    assert (code, out) == (0, f"shardlab, version {shardlab.__version__}\n")


def test_misspelt_command_gets_a_suggestion(capsys):
    code, _, err = run(capsys, "trian")
    assert code == 2
    assert "no command 'trian' (did you mean 'train'?); known: train, launch, plan, probe, " in err


def test_misspelt_option_gets_a_suggestion(capsys):
    code, _, err = run(capsys, "train", "--dmo")
    assert code == 2
    assert "--demo" in err


@pytest.mark.parametrize(("error", "code", "message"), [
    (DataError("train.tsv, line 7: 3 columns, expected 40"), 2,
     "error: train.tsv, line 7: 3 columns, expected 40\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
], ids=["user error", "ctrl-c"])
def test_expected_ends_are_one_line(capsys, monkeypatch, error, code, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(main_module.app, "main", fail)
    assert run(capsys, "train") == (code, "", message)


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(*_, **__):
        raise KeyError("boom")

    monkeypatch.setattr(main_module.app, "main", fail)
    with pytest.raises(KeyError, match="boom"):
        main(["train"])
