"""Every format gives back the checkpoint's rows, whatever the plan; served outputs match."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import shardlab as sl
from shardlab.comm import Groups
from shardlab.errors import CheckpointError, InputError
from shardlab.interop import FORMATS, export
from shardlab.plan import ShardingPlan
from shardlab.specs import PoolingType, ShardingType
from shardlab.table_plan import build_table_plan
from shardlab.train import CheckpointWriter, SaveOptions
from tests.harness import run_ranks

SIZES = {"user": (37, 5), "item": (6, 4)}


class Bare(nn.Module):
    """Two tables, one pooled by mean; ``user`` has two features."""

    def __init__(self) -> None:
        super().__init__()
        self.ebc = sl.EmbeddingBagCollection([
            sl.EmbeddingBagConfig(37, 5, "user", feature_names=("user", "friend")),
            sl.EmbeddingBagConfig(6, 4, "item", feature_names=("item",),
                                  pooling=PoolingType.MEAN)])
        self.top = nn.Linear(14, 1)

    def forward(self, features: object) -> Tensor:
        return self.ebc(features).values()


def batch() -> sl.KeyedJaggedTensor:
    """3 samples; an empty bag, a repeated id, the last rows."""
    return sl.KeyedJaggedTensor(["item", "user", "friend"], torch.tensor(
        [5, 0, 0, 36, 3, 3, 7, 36]), lengths=torch.tensor([2, 1, 0, 1, 0, 2, 0, 1, 1]))


def save_pair(groups: Groups, folder: str) -> tuple[dict[str, Tensor], Tensor]:
    """Saves by columns, then what changed; returns this rank's chunks and the outputs."""
    torch.manual_seed(1)
    model = Bare()
    plan = ShardingPlan(groups.world_size, tuple(
        build_table_plan(table, ShardingType.COLUMN_WISE, range(groups.world_size))
        for table in model.ebc.tables))
    model, optimizer = sl.shard(model, plan, groups=groups,
                                optimizer=sl.optim.RowWiseAdagrad(lr=0.1))
    writer = CheckpointWriter(model, optimizer, groups, SaveOptions(incremental=True))
    writer.save(f"{folder}/step-0")
    model(batch()).square().sum().backward()
    optimizer.step()
    writer.save(f"{folder}/step-1")
    with torch.no_grad():
        outputs = model(batch())
    return {f"{chunk.table}.{chunk.col_start}": chunk.weights.clone()
            for chunk in model.collections()["ebc"].chunks()}, outputs


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor], Tensor]:
    folder = tmp_path_factory.mktemp("saved")
    ranks = run_ranks(2, save_pair, str(folder))
    parts = ranks[0][0] | ranks[1][0]
    tables = {name: torch.cat([value for key, value in sorted(parts.items())
                               if key.startswith(f"{name}.")], 1) for name in SIZES}
    return folder / "step-1", tables, ranks[0][1]


def read_back(format: str, out: Path, table: str) -> Tensor:
    if format == "torch":
        return torch.load(out / "tables.pt", weights_only=True)[f"{table}.weight"]
    if format == "torchrec":
        return torch.load(out / "model.pt", weights_only=True)[f"ebc.embedding_bags.{table}.weight"]
    if format == "parquet":
        found = pq.read_table(out / f"{table}.parquet")
        assert found["id"].to_pylist() == list(range(SIZES[table][0]))
        return torch.tensor(found["embedding"].to_pylist())
    if format == "npy":
        return torch.from_numpy(np.load(out / f"{table}.npy"))
    return load_file(out / f"{table}.safetensors")["weight"]


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_the_rows_back(saved: tuple[Path, dict[str, Tensor], Tensor],
                                          tmp_path: Path, format: str) -> None:
    export(saved[0], tmp_path / "out", format)
    for name, rows in saved[1].items():
        assert torch.equal(read_back(format, tmp_path / "out", name), rows)
    with pytest.raises(CheckpointError, match="out exists; export to a new folder"):
        export(saved[0], tmp_path / "out", format)
    export(saved[0], tmp_path / "one", format, ("item",))
    assert not any("user" in path.name for path in (tmp_path / "one").iterdir())


def test_torch_state_dict_loads_into_plain_bags(saved: tuple[Path, dict[str, Tensor], Tensor],
                                                tmp_path: Path) -> None:
    export(saved[0], tmp_path / "out", "torch")
    bags = nn.ModuleDict({name: nn.EmbeddingBag(*size, mode="sum")
                          for name, size in SIZES.items()})
    bags.load_state_dict(torch.load(tmp_path / "out" / "tables.pt", weights_only=True))
    assert torch.equal(bags["item"].weight, saved[1]["item"])


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_served_outputs_match(saved: tuple[Path, dict[str, Tensor], Tensor], tmp_path: Path,
                              quantize: str | None) -> None:
    export(saved[0], tmp_path / "out", "safetensors", quantize=quantize)
    served = sl.inference.load(tmp_path / "out")
    ids, offsets = served.split(batch())
    pooled = served(ids, offsets)
    found = torch.cat([pooled[name] for name in ("user", "friend", "item")], 1)
    spread = max(float(rows.max() - rows.min()) for rows in saved[1].values())
    # two ids a bag at most, each off by half a step of its row's range
    bound = 1e-6 if quantize is None else spread / (2 ** {"int8": 8, "int4": 4}[quantize] - 1)
    assert float((found - saved[2]).abs().max()) <= bound
    assert not pooled["user"][1].any()
    exported = torch.export.export(served, (ids, offsets))
    for name, value in exported.module()(ids, offsets).items():
        assert torch.equal(value, pooled[name])
    with pytest.raises(InputError, match="feature 'friend' is missing"):
        served.split(sl.KeyedJaggedTensor(["user"], torch.tensor([1]), lengths=torch.tensor([1])))


def test_served_tables_compile(saved: tuple[Path, dict[str, Tensor], Tensor],
                               tmp_path: Path) -> None:
    export(saved[0], tmp_path / "out", "safetensors", quantize="int8")
    served = sl.inference.load(tmp_path / "out")
    compiled = torch.compile(served, backend="aot_eager", fullgraph=True)
    arguments = served.split(batch())
    for name, value in compiled(*arguments).items():
        torch.testing.assert_close(value, served(*arguments)[name])


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantised_arrays_are_written_by_other_formats(
        saved: tuple[Path, dict[str, Tensor], Tensor], tmp_path: Path, quantize: str) -> None:
    export(saved[0], tmp_path / "npy", "npy", quantize=quantize)
    export(saved[0], tmp_path / "pt", "torch", quantize=quantize)
    state = torch.load(tmp_path / "pt" / "tables.pt", weights_only=True)
    for name in ("weight", "scale", "bias"):
        suffix = "" if name == "weight" else f".{name}"
        assert torch.equal(torch.from_numpy(np.load(tmp_path / "npy" / f"user{suffix}.npy")),
                           state[f"user.{name}"])
    assert state["user.weight"].shape == (37, {"int8": 5, "int4": 3}[quantize])


def test_constant_rows_quantise_exactly() -> None:
    rows = np.array([[0.5, 0.5, 0.5], [0, 0, 0], [-1, 0, 1]], np.float32)
    for bits in (8, 4):
        parts = {key: torch.from_numpy(value)
                 for key, value in sl.inference.quantize_rows(rows, bits).items()}
        table = sl.inference.ServedTable(parts["weight"], 3, False, parts["scale"], parts["bias"],
                                         bits)
        found = table.rows(torch.tensor([0, 1, 2]))
        assert torch.equal(found[:2], torch.from_numpy(rows[:2]))
        assert float(found[2, 0]) == -1.0
        assert float(found[2, 2]) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("arguments", "text"), [
    (("csv",), "no export format 'csv'; known: torch, torchrec"),
    (("npy", ("usr",)), r"has no table 'usr' \(did you mean 'user'\?\); it has: user, item"),
    (("parquet", (), "int8"), "--quantize int8 with parquet: quantised rows are int8 or int4, in"),
    (("npy", (), "int2"), "--quantize int2 with npy"),
])
def test_what_cannot_be_written_is_refused(saved: tuple[Path, dict[str, Tensor], Tensor],
                                           tmp_path: Path, arguments: tuple[object, ...],
                                           text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        export(saved[0], tmp_path / "out", *arguments)
    assert not any(tmp_path.iterdir())


def test_folder_that_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not an export for inference"):
        sl.inference.load(tmp_path)
