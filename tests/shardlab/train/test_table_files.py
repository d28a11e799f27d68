"""Table chunks in files: streamed in pieces, and loaded under any world size and plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shardlab.errors import CheckpointError
from shardlab.specs import ShardingType
from shardlab.train import table_files
from shardlab.train.manifest import ChunkEntry, Manifest, TableEntry
from shardlab.train.table_files import load_tables, write_tables
from shardlab.train.tensor_file import FileEntry, write_tensors
from tests.shardlab.train.fakes import FakeCollection, plan_of, table

TABLES = [table("rows", 37, 6), table("columns", 5, 4), table("one", 11, 3), table("copy", 2, 2)]
KINDS = [ShardingType.ROW_WISE, ShardingType.COLUMN_WISE, ShardingType.TABLE_WISE,
         ShardingType.DATA_PARALLEL]


def collection(rank: int, world_size: int, kinds: list[ShardingType],
               zero: bool = False) -> FakeCollection:
    return FakeCollection(TABLES, plan_of(TABLES, kinds, world_size), rank, zero)


def write_world(folder: Path, world_size: int, kinds: list[ShardingType]) -> Manifest:
    files: list[FileEntry] = []
    chunks: list[ChunkEntry] = []
    for rank in range(world_size):
        written = write_tables(folder, {"ebc": collection(rank, world_size, kinds)}, rank)
        files += written[0]
        chunks += written[1]
    tables = tuple(TableEntry("ebc", entry.name, entry.num_embeddings, entry.embedding_dim)
                   for entry in TABLES)
    manifest = Manifest(world_size, tables, tuple(files), tuple(chunks))
    manifest.check_files(folder)
    manifest.check_coverage()
    return manifest


@pytest.mark.parametrize("limit", [1 << 20, 200], ids=["one_file", "many_files"])
@pytest.mark.parametrize(("saved", "loaded"), [(1, 1), (2, 2), (2, 3), (3, 1), (1, 2)])
def test_tables_load_under_another_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        saved: int, loaded: int, limit: int) -> None:
    monkeypatch.setattr(table_files, "FILE_BYTES", limit)
    monkeypatch.setattr(table_files, "_CHUNK_BYTES", limit // 2)
    manifest = write_world(tmp_path, saved, KINDS)
    assert (len(manifest.files) > 2 * saved) == (limit == 200)
    for rank in range(loaded):
        found = collection(rank, loaded, KINDS[::-1], zero=True)
        load_tables(tmp_path, manifest, {"ebc": found}, rank)
        expected = collection(rank, loaded, KINDS[::-1])
        for name, shards in expected.held.items():
            for want, have in zip(shards, found.held[name], strict=True):
                assert torch.equal(want.weights, have.weights)


def test_replicated_tables_are_written_once(tmp_path: Path) -> None:
    manifest = write_world(tmp_path, 2, [ShardingType.DATA_PARALLEL] * 4)
    assert {entry.name for entry in manifest.files} == {"rows-00000-00000.safetensors"}


def test_a_rank_opens_only_files_that_touch_its_shards(tmp_path: Path) -> None:
    manifest = write_world(tmp_path, 2, [ShardingType.ROW_WISE] * 4)
    (tmp_path / "rows-00001-00000.safetensors").unlink()
    load_tables(tmp_path, manifest,
                {"ebc": collection(0, 2, [ShardingType.ROW_WISE] * 4, zero=True)}, 0)
    with pytest.raises(CheckpointError, match=r"rows-00001-00000\.safetensors is missing"):
        load_tables(tmp_path, manifest,
                    {"ebc": collection(1, 2, [ShardingType.ROW_WISE] * 4, zero=True)}, 1)


def test_file_without_a_listed_tensor_is_refused(tmp_path: Path) -> None:
    manifest = write_world(tmp_path, 1, KINDS)
    entry = write_tensors(tmp_path / manifest.files[0].name, {"0/weights": torch.zeros(1)})
    foreign = Manifest(1, manifest.tables, (entry,), manifest.chunks)
    with pytest.raises(CheckpointError, match="lacks tensor '0/sum', which the manifest lists"):
        load_tables(tmp_path, foreign, {"ebc": collection(0, 1, KINDS)}, 0)
