"""A manifest tells every way in which a checkpoint does not fit, by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from shardlab.errors import CheckpointError
from shardlab.train.manifest import (
    MANIFEST,
    ChunkEntry,
    Manifest,
    TableEntry,
    read_manifest,
)
from shardlab.train.tensor_file import FileEntry

CHUNKS = tuple(ChunkEntry("rows-0", str(i), "ebc", "user", top, 0, 5, 4, ("sum",))
               for i, top in enumerate((0, 5)))
GOOD = Manifest(world_size=2, tables=(TableEntry("ebc", "user", 10, 4),),
                files=(FileEntry("rows-0", 3, 99),), chunks=CHUNKS)


def write(folder: Path, data: object) -> None:
    (folder / MANIFEST).write_text(json.dumps(data))


def test_manifest_round_trip(tmp_path: Path) -> None:
    write(tmp_path, GOOD.to_dict())
    assert read_manifest(tmp_path) == GOOD
    GOOD.check_coverage()
    GOOD.check_tables(GOOD.tables)
    assert GOOD.file("rows-0", tmp_path) == GOOD.files[0]


@pytest.mark.parametrize(("data", "text"), [
    ([1], "is not the manifest of a ShardLab checkpoint"),
    ({"weight_map": {}}, "is not the manifest of a ShardLab checkpoint"),
    ({**GOOD.to_dict(), "version": 99}, "has version 99, this ShardLab reads version 1"),
    ({**GOOD.to_dict(), "crc32": 1}, "its checksum does not fit its content"),
    ({**GOOD.to_dict(), "content": None}, "its checksum does not fit its content"),
], ids=["list", "foreign", "version", "checksum", "content"])
def test_foreign_or_changed_manifest_is_refused(tmp_path: Path, data: object, text: str) -> None:
    write(tmp_path, data)
    with pytest.raises(CheckpointError, match=text):
        read_manifest(tmp_path)


def test_malformed_content_with_a_right_checksum_is_refused(tmp_path: Path) -> None:
    odd = replace(GOOD, files=({"name": "only"},))  # type: ignore[arg-type]
    write(tmp_path, odd.to_dict())
    with pytest.raises(CheckpointError, match="is malformed: TypeError"):
        read_manifest(tmp_path)


def test_folder_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        read_manifest(tmp_path)
    with pytest.raises(CheckpointError, match="absent is not a checkpoint folder"):
        read_manifest(tmp_path / "absent")


def test_missing_chunk_is_refused() -> None:
    with pytest.raises(CheckpointError, match="table 'user': 20 of 10 x 4 elements are stored"):
        replace(GOOD, chunks=CHUNKS[:1]).check_coverage()


def test_chunk_of_an_unlisted_table_is_refused() -> None:
    stray = replace(CHUNKS[0], table="item")
    with pytest.raises(CheckpointError, match=r"not listed: \[\('ebc', 'item'\)\]"):
        replace(GOOD, chunks=(*CHUNKS, stray)).check_coverage()


def test_other_tables_are_all_listed() -> None:
    wanted = [TableEntry("ebc", "user", 10, 8), TableEntry("ebc", "item", 3, 4)]
    stored = replace(GOOD, tables=(*GOOD.tables, TableEntry("ebc", "ad", 1, 1)))
    with pytest.raises(CheckpointError) as caught:
        stored.check_tables(wanted)
    assert str(caught.value).splitlines() == [
        "the checkpoint does not fit the model:",
        "table 'item' of collection 'ebc' is not in the checkpoint",
        "table 'user' is 10 x 8 in the model, 10 x 4 in the checkpoint",
        "the checkpoint has table 'ad' of collection 'ebc', which the model does not",
    ]


def test_unlisted_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not list 'dense\.safetensors'"):
        GOOD.file("dense.safetensors", tmp_path)
