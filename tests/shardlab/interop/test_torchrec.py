"""TorchRec's tables in and out: DCP folders, state dicts, both spellings of optimiser state."""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import shardlab as sl
from shardlab.comm import Groups
from shardlab.errors import CheckpointError
from shardlab.interop import export, import_torchrec
from shardlab.train import CheckpointReader, load, save

ROOT = Path(__file__).resolve().parents[3]
TABLES = (("user", 10, 8), ("item", 6, 4))
OPTIMIZERS = {"row_wise_adagrad": sl.optim.RowWiseAdagrad(lr=0.1),
              "adagrad": sl.optim.Adagrad(lr=0.1), "adam": sl.optim.Adam(lr=0.1),
              "row_wise_adam": sl.optim.RowWiseAdam(lr=0.1), "sgd": sl.optim.SGD(lr=0.1)}


class Net(nn.Module):
    """The model of `torchrec_job`, over ShardLab's tables."""

    def __init__(self) -> None:
        super().__init__()
        self.sparse = nn.Module()
        self.sparse.ebc = sl.EmbeddingBagCollection([
            sl.EmbeddingBagConfig(rows, dim, name, feature_names=(name,))
            for name, rows, dim in TABLES])
        self.top = nn.Linear(12, 1)

    def forward(self, features: object) -> Tensor:
        return self.top(self.sparse.ebc(features).values())


def build(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(2)
    return sl.shard(Net(), optimizer=OPTIMIZERS[kind], seed=8)


def outputs(model: nn.Module) -> Tensor:
    return model(sl.KeyedJaggedTensor(["user", "item"], torch.tensor([9, 2, 2, 5]),
                                      lengths=torch.ones(4, dtype=torch.int64)))


def whole(path: Path) -> dict[str, Tensor]:
    """Tables and their state: each is one chunk here."""
    reader = CheckpointReader(path)
    return {f"{table.name}.{name}": value for table in reader.tables
            for chunk in reader.table_chunks(table)
            for name, value in {"weights": chunk.weights, **chunk.state}.items()}


@pytest.mark.skipif(importlib.util.find_spec("torchrec") is None
                    or importlib.util.find_spec("fbgemm_gpu") is None,
                    reason="TorchRec and fbgemm-gpu are not installed")
@pytest.mark.parametrize(("theirs", "ours"), [
    ("exact_row_wise_adagrad", "row_wise_adagrad"),
    pytest.param("exact_adagrad", "adagrad", marks=[pytest.mark.slow, pytest.mark.skipif(
        not os.environ.get("SHARDLAB_SLOW"), reason="set SHARDLAB_SLOW=1")])])
def test_round_trip_through_torchrec(tmp_path: Path, theirs: str, ours: str) -> None:
    def run(mode: str, folder: Path) -> dict[str, Tensor]:
        subprocess.run([sys.executable, "-m", "tests.shardlab.interop.torchrec_job", mode, theirs,
                        str(folder)], cwd=ROOT, check=True, timeout=300, env=dict(os.environ))
        return torch.load(folder / "seen.pt", weights_only=True)

    seen = run("save", tmp_path)
    for source, optimizer in ((tmp_path / "dcp", None),
                              (tmp_path / "model.pt", tmp_path / "optimizer.pt")):
        path = import_torchrec(source, tmp_path / f"from-{source.name}", optimizer)
        model, mine = build(ours)
        assert load(path, model, mine, Groups()) == {}
        torch.testing.assert_close(outputs(model), seen["outputs"])
        found = whole(path)
        for name, _, _ in TABLES:
            stored = f"sparse.ebc.embedding_bags.{name}.weight"
            assert torch.equal(found[f"{name}.weights"], seen[stored])
            assert torch.equal(found[f"{name}.sum"], seen[f"{stored}.{name}.momentum1"])
    model, mine = build(ours)
    outputs(model).sum().backward()
    mine.step()
    save(tmp_path / "ours", model, mine, Groups())
    export(tmp_path / "ours", tmp_path / "back", "torchrec")
    back = run("load", tmp_path / "back")
    torch.testing.assert_close(back["outputs"], outputs(model).detach())
    expected = whole(tmp_path / "ours")
    for name, _, _ in TABLES:
        stored = f"sparse.ebc.embedding_bags.{name}.weight"
        assert torch.equal(back[stored], expected[f"{name}.weights"])
        assert torch.equal(back[f"{stored}.{name}.momentum1"], expected[f"{name}.sum"])


@pytest.mark.parametrize("spelling", ["fused", "torch.optim"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_dict_of_every_optimiser_comes_in(tmp_path: Path, kind: str, spelling: str) -> None:
    shapes = {"row_wise_adagrad": [1], "adagrad": [2], "adam": [2, 2], "row_wise_adam": [2, 1],
              "sgd": []}[kind]
    names = [f"momentum{i + 1}" for i in range(len(shapes))] if spelling == "fused" else \
        {0: [], 1: ["sum"], 2: ["exp_avg", "exp_avg_sq"]}[len(shapes)]
    model, state = {"top.weight": torch.randn(1, 12), "top.bias": torch.randn(1)}, {}
    for table, rows, dim in TABLES:
        key = f"sparse.ebc.embedding_bags.{table}.weight"
        model[key] = torch.randn(rows, dim)
        prefix = f"{table}." if spelling == "fused" else ""
        state[key] = {f"{prefix}{name}": torch.rand(rows, *[dim] * (dims - 1))
                      for name, dims in zip(names, shapes, strict=True)}
        state[key]["step"] = torch.tensor(3.0)
    torch.save({"model": model, "optimizer": {"state": state}}, tmp_path / "both.pt")
    path = import_torchrec(tmp_path / "both.pt", tmp_path / "in")
    ours, optimizer = build(kind)
    load(path, ours, optimizer, Groups())
    assert torch.equal(ours.state_dict()["top.weight"], model["top.weight"])
    for chunk in ours.collections()["sparse.ebc"].chunks():
        key = f"sparse.ebc.embedding_bags.{chunk.table}.weight"
        assert torch.equal(chunk.weights, model[key])
        stored = [value for name, value in state[key].items() if name != "step"]
        assert len(chunk.state) == len(stored)
        for mine, theirs in zip(chunk.state.values(), stored, strict=True):
            assert torch.equal(mine, theirs)


class Evil:
    """Would run a command when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch evil",)


def test_code_in_a_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"\.metadata is not the index .* for \w+\.system"):
        import_torchrec(tmp_path / "dcp", tmp_path / "out")
    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"evil\.pt is neither a DCP folder nor a file of"):
        import_torchrec(tmp_path / "evil.pt", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dcp", "evil.pt"]


@pytest.mark.parametrize(("state", "text"), [
    ({}, "holds no `embedding_bags.<table>.weight`; it has: no tensors"),
    ({"w": torch.zeros(1)}, "holds no `embedding_bags.<table>.weight`; it has: w"),
    ({"embedding_bags.t.weight": torch.zeros(2, 2), "optimizer.state.embedding_bags.t.weight.t.z":
      torch.zeros(2)}, "table 't' has optimiser state 'z'; ShardLab knows exp_avg, exp_avg_sq"),
], ids=["empty", "no_tables", "unknown_state"])
def test_what_does_not_fit_is_refused(tmp_path: Path, state: dict[str, Tensor], text: str) -> None:
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=text):
        import_torchrec(tmp_path / "a.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="out exists; import to a new folder"):
        import_torchrec(tmp_path / "a.pt", tmp_path / "out")
