"""Sources and readers from plain arguments."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shardlab.data import (
    CriteoTsvSource,
    ParquetSource,
    SourceSpec,
    SyntheticCriteoSource,
    build_reader,
    build_source,
)
from shardlab.errors import DataError
from tests.shardlab.data.criteo_rows import FEATURES, flat, make_rows, write_parquet, write_tsv


def test_every_kind(tmp_path: Path) -> None:
    rows = make_rows(20)
    tsv, parquet = write_tsv(tmp_path / "t", rows), write_parquet(tmp_path / "p", rows)
    dense = tuple(f"I{i}" for i in range(1, 14))
    specs = {
        CriteoTsvSource: SourceSpec("criteo_tsv", FEATURES, tsv),
        ParquetSource: SourceSpec("criteo_parquet", FEATURES, parquet, on_bad_row="skip"),
        SyntheticCriteoSource: SourceSpec("synthetic_criteo", FEATURES, seed=4),
    }
    for kind, spec in specs.items():
        assert isinstance(build_source(spec), kind)
    found = [flat(list(build_reader(spec, 4, stop=20))) for spec in specs.values()]
    for left, right in zip(found[0], found[1], strict=True):
        assert torch.equal(left, right)
    spec = SourceSpec("parquet", FEATURES, parquet, dense=dense, log_dense=True)
    general = flat(list(build_reader(spec, 4)))
    assert torch.equal(general[1], found[0][1])
    assert not torch.equal(general[2], found[0][2])  # strings by their bytes


def test_renamed_columns_for_every_criteo_kind(tmp_path: Path) -> None:
    rows = make_rows(6)
    paths = {"criteo_tsv": write_tsv(tmp_path / "t", rows),
             "criteo_parquet": write_parquet(tmp_path / "p", rows), "synthetic_criteo": ()}
    for kind, path in paths.items():
        spec = SourceSpec(kind, {"user": 30}, path, columns={"user": "C5"})
        (batch,) = build_reader(spec, 6, stop=6)
        assert batch.sparse.keys() == ["user"]


def test_reader_arguments_reach_the_reader() -> None:
    spec = SourceSpec("synthetic_criteo", FEATURES)
    reader = build_reader(spec, 4, rank=1, world_size=2, start=3, stop=20, drop_last=True)
    assert [batch.position for batch in reader] == [11, 19]
    expected = build_reader(spec, 4, start=7, stop=11)
    assert torch.equal(next(iter(reader)).labels, next(iter(expected)).labels)


@pytest.mark.parametrize(("spec", "text"), [
    (SourceSpec("criteo", FEATURES), r"data kind 'criteo' is unknown \(did you mean 'criteo_"),
    (SourceSpec("criteo_tsv", FEATURES, "nowhere.tsv"), r"'nowhere.tsv': no such file"),
    (SourceSpec("criteo_tsv", FEATURES), "data path: none given"),
    (SourceSpec("criteo_tsv", FEATURES, "a", seed=3), "'criteo_tsv' does not read 'seed', found 3"),
    (SourceSpec("synthetic_criteo", FEATURES, "a.tsv"), "does not read 'path', found 'a.tsv'"),
    (SourceSpec("criteo_parquet", FEATURES, "a", label="y"), "does not read 'label'"),
    (SourceSpec("criteo_tsv", FEATURES, "a", on_bad_row="ignore"), "expected error or skip, found"),
    (SourceSpec("synthetic_criteo", {"C1": 0}), "feature 'C1': its table must have 1 row or more"),
    (SourceSpec("synthetic_criteo", {"user": 5}, columns={"usr": "C1"}),
     r"columns: no feature 'usr' \(did you mean 'user'"),
], ids=["kind", "path", "no path", "seed", "synthetic path", "label", "on_bad_row", "rows",
        "columns"])
def test_refuses(spec: SourceSpec, text: str) -> None:
    with pytest.raises(DataError, match=text):
        build_source(spec)
