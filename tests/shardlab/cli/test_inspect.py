"""``shardlab inspect``, ``export``, ``import`` and ``compact`` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from shardlab.cli.main import _run
from shardlab.train import CheckpointReader
from tests.shardlab.inspection.test_scan import ROWS, write

WEIGHTS = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "step-12").mkdir()
    return write(tmp_path / "step-12", WEIGHTS, {"sum": torch.ones(ROWS)}).path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = _run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.mark.parametrize(("arguments", "texts"), [
    ((), ["step 12, row_wise_adagrad, saved by 2 ranks", "user", "101"]),
    (("--verify",), ["every file is whole"]),
    (("user",), ["101 rows x 6", "without a gradient 0", "p50", "###"]),
    (("user", "--rows", "5,9"), ["row 5  norm", "row 9  norm", "sum: 1"]),
    (("user", "--top-norm", "3"), ["norm"]),
    (("user", "--dead"), ["0 of 101 rows of user never got a gradient; the first: none"]),
    (("user", "--neighbors", "5", "--count", "2"), ["cosine"]),
])
def test_people_read_tables(checkpoint: Path, capsys: pytest.CaptureFixture[str],
                            arguments: tuple[str, ...], texts: list[str]) -> None:
    code, out = run(capsys, "inspect", checkpoint, *arguments)
    assert code == 0
    for text in texts:
        assert text in out


def test_programs_read_json(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, length in (((), 8), (("user",), 13), (("user", "--rows", "5,9"), 2),
                              (("user", "--top-norm", "3"), 3), (("user", "--dead"), 4),
                              (("user", "--neighbors", "5", "--count", "2"), 2)):
        code, out = run(capsys, "inspect", checkpoint, *arguments, "--json", "--verify")
        assert code == 0
        assert len(json.loads(out)) == length


def test_picture_is_drawn(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = checkpoint.parent / "norms.png"
    assert run(capsys, "inspect", checkpoint, "user", "--plot", picture)[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, out = run(capsys, "inspect", checkpoint, "user", "--plot", "norms.abc")
    assert code == 2
    assert "--plot norms.abc: Format 'abc' is not supported" in out


@pytest.mark.parametrize(("arguments", "text"), [
    (("--dead",), "name a TABLE: user"),
    (("usr",), "has no table 'usr' (did you mean 'user'?); it has: user"),
    (("user", "--dead", "--stats"), "one of --rows, --top-norm, --dead"),
    (("user", "--rows", "a"), "'a' is not a list of rows such as 5,9"),
])
def test_mistakes_end_in_a_message(checkpoint: Path, capsys: pytest.CaptureFixture[str],
                                   arguments: tuple[str, ...], text: str) -> None:
    code, out = run(capsys, "inspect", checkpoint, *arguments)
    assert code == 2
    assert text in out


def test_export_and_import(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint.parent
    (checkpoint / "manifest.json").unlink()
    code, out = run(capsys, "export", checkpoint, folder / "out", "--format", "npy")
    assert (code, "manifest.json is missing" in out) == (2, True)
    torch.save({"ebc.embedding_bags.user.weight": WEIGHTS}, folder / "model.pt")
    torch.save({"state": {"ebc.embedding_bags.user.weight": {"user.momentum1": torch.ones(ROWS)}}},
               folder / "optimizer.pt")
    code, out = run(capsys, "import", folder / "model.pt", folder / "in", "--optimizer",
                    folder / "optimizer.pt")
    assert (code, "1 tables" in out, "state of row_wise_adagrad" in out) == (0, True, True)
    code, out = run(capsys, "export", folder / "in", folder / "out", "--format", "torchrec",
                    "--tables", "user")
    assert (code, "model.pt" in out) == (0, True)
    state = torch.load(folder / "out" / "model.pt", weights_only=True)
    assert torch.equal(state["ebc.embedding_bags.user.weight"], WEIGHTS)
    code, out = run(capsys, "compact", folder / "in")
    assert (code, "is a full checkpoint" in out) == (0, True)
    assert CheckpointReader(folder / "in").base is None
