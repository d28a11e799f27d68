"""A manifest tells every way in which a checkpoint does not fit, by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from shardlab.errors import CheckpointError
from shardlab.train.manifest import (
    CHANGED,
    MANIFEST,
    BaseEntry,
    ChunkEntry,
    Manifest,
    TableEntry,
    read_manifest,
)
from shardlab.train.tensor_file import FileEntry

CHUNKS = tuple(ChunkEntry("rows-0", str(i), "ebc", "user", top, 0, 5, 4, ("sum",))
               for i, top in enumerate((0, 5)))
GOOD = Manifest(world_size=2, tables=(TableEntry("ebc", "user", 10, 4),),
                files=(FileEntry("rows-0", 3, "99"),), chunks=CHUNKS)


DATA = json.loads(GOOD.to_bytes())


def write(folder: Path, data: object) -> None:
    (folder / MANIFEST).write_text(json.dumps(data))


def test_manifest_round_trip(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(GOOD.to_bytes())
    assert read_manifest(tmp_path) == GOOD
    GOOD.check_coverage()
    GOOD.check_tables(GOOD.tables)
    assert GOOD.file("rows-0", tmp_path) == GOOD.files[0]


@pytest.mark.parametrize(("data", "text"), [
    ([1], "is not the manifest of a ShardLab checkpoint"),
    ({"weight_map": {}}, "is not the manifest of a ShardLab checkpoint"),
    ({**DATA, "version": 99}, "has version 99, this ShardLab reads version 2"),
    ({**DATA, "xxh3": "1"}, "its checksum does not fit its content"),
    ({**DATA, "content": None}, "its checksum does not fit its content"),
], ids=["list", "foreign", "version", "checksum", "content"])
def test_foreign_or_changed_manifest_is_refused(tmp_path: Path, data: object, text: str) -> None:
    write(tmp_path, data)
    with pytest.raises(CheckpointError, match=text):
        read_manifest(tmp_path)


def test_malformed_content_with_a_right_checksum_is_refused(tmp_path: Path) -> None:
    odd = replace(GOOD, files=({"name": "only"},))  # type: ignore[arg-type]
    (tmp_path / MANIFEST).write_bytes(odd.to_bytes())
    with pytest.raises(CheckpointError, match="is malformed: TypeError"):
        read_manifest(tmp_path)


def test_any_flipped_bit_is_refused(tmp_path: Path) -> None:
    raw = GOOD.to_bytes()
    for place in range(len(raw)):
        changed = bytearray(raw)
        changed[place] ^= 1 << place % 8
        (tmp_path / MANIFEST).write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            read_manifest(tmp_path)


def test_folder_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        read_manifest(tmp_path)
    with pytest.raises(CheckpointError, match="absent is not a checkpoint folder"):
        read_manifest(tmp_path / "absent")


def test_missing_chunk_is_refused() -> None:
    with pytest.raises(CheckpointError, match="table 'user': 20 of 10 x 4 elements are stored"):
        replace(GOOD, chunks=CHUNKS[:1]).check_coverage()


def test_incremental_may_hold_changed_rows_or_none() -> None:
    base = BaseEntry("step-1", "0")
    changed = tuple(replace(chunk, holds=CHANGED) for chunk in CHUNKS)
    for chunks in ((), changed[:1], changed, CHUNKS):
        replace(GOOD, chunks=chunks, base=base).check_coverage()
    with pytest.raises(CheckpointError, match="table 'user': 20 of 10 x 4 elements are stored"):
        replace(GOOD, chunks=CHUNKS[:1], base=base).check_coverage()


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
