"""Table chunks in files: streamed in pieces, and loaded under any world size and plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shardlab.errors import CheckpointError
from shardlab.specs import ShardingType
from shardlab.train import table_files
from shardlab.train.checkpoint_reader import CheckpointReader
from shardlab.train.manifest import MANIFEST, ChunkEntry, Manifest, TableEntry
from shardlab.train.table_files import TableFiles, load_tables, other_chunks
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
        written = TableFiles(folder, rank, file_bytes=table_files.file_bytes(0))
        written.write(other_chunks("ebc", collection(rank, world_size, kinds)))
        files += written.files
        chunks += written.chunks
    tables = tuple(TableEntry("ebc", entry.name, entry.num_embeddings, entry.embedding_dim)
                   for entry in TABLES)
    manifest = Manifest(world_size, tables, tuple(files), tuple(chunks))
    (folder / MANIFEST).write_bytes(manifest.to_bytes())
    return manifest


def load(folder: Path, found: FakeCollection, rank: int) -> None:
    load_tables(CheckpointReader(folder), rank, {"ebc": found})


@pytest.mark.parametrize("limit", [1 << 20, 200], ids=["one_file", "many_files"])
@pytest.mark.parametrize(("saved", "loaded"), [(1, 1), (2, 2), (2, 3), (3, 1), (1, 2)])
def test_tables_load_under_another_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        saved: int, loaded: int, limit: int) -> None:
    monkeypatch.setattr(table_files, "_LEAST_FILE_BYTES", limit)
    manifest = write_world(tmp_path, saved, KINDS)
    assert (len(manifest.files) > 2 * saved) == (limit == 200)
    for rank in range(loaded):
        found = collection(rank, loaded, KINDS[::-1], zero=True)
        load(tmp_path, found, rank)
        expected = collection(rank, loaded, KINDS[::-1])
        for name, shards in expected.held.items():
            for want, have in zip(shards, found.held[name], strict=True):
                assert torch.equal(want.weights, have.weights)


def test_files_grow_with_the_tables_between_bounds() -> None:
    sizes = [table_files.file_bytes(total) >> 20 for total in (0, 1 << 30, 16 << 30, 1 << 40)]
    assert sizes == [8, 8, 64, 256]


def test_replicated_tables_are_written_once(tmp_path: Path) -> None:
    manifest = write_world(tmp_path, 2, [ShardingType.DATA_PARALLEL] * 4)
    assert {entry.name for entry in manifest.files} == {"rows-00000-00000.safetensors"}


def test_a_rank_opens_only_files_that_touch_its_shards(tmp_path: Path) -> None:
    write_world(tmp_path, 2, [ShardingType.ROW_WISE] * 4)
    file = tmp_path / "rows-00001-00000.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    load(tmp_path, collection(0, 2, [ShardingType.ROW_WISE] * 4, zero=True), 0)
    with pytest.raises(CheckpointError, match=r"rows-00001-00000\.safetensors is corrupted"):
        load(tmp_path, collection(1, 2, [ShardingType.ROW_WISE] * 4, zero=True), 1)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"rows-00001-00000\.safetensors is missing"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize(("tensors", "text"), [
    ({"0/weights": torch.zeros(37, 6)}, "lacks tensor '0/sum', which the manifest lists"),
    ({"0/weights": torch.zeros(1, 6), "0/sum": torch.zeros(37)},
     r"is \(1, 6\), the manifest says 37 x 6"),
], ids=["missing", "other_size"])
def test_file_that_is_not_what_the_manifest_says_is_refused(
        tmp_path: Path, tensors: dict[str, torch.Tensor], text: str) -> None:
    manifest = write_world(tmp_path, 1, KINDS)
    entry = write_tensors(tmp_path / manifest.files[0].name, tensors)
    foreign = Manifest(1, manifest.tables, (entry,), manifest.chunks)
    (tmp_path / MANIFEST).write_bytes(foreign.to_bytes())
    with pytest.raises(CheckpointError, match=text):
        load(tmp_path, collection(0, 1, KINDS), 0)
