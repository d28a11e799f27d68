"""Readers: whatever the world size, and wherever they resume, the same rows in the same order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlab.data import (
    CRITEO_PARQUET,
    Batch,
    CriteoTsvSource,
    ParquetSource,
    Reader,
    RowSource,
    SyntheticCriteoSource,
)
from shardlab.errors import DataError
from tests.shardlab.data.criteo_rows import (
    FEATURES,
    check_batch,
    flat,
    make_rows,
    write_parquet,
    write_tsv,
)

ROWS = 53
KINDS = ["tsv", "parquet", "synthetic"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RowSource]:
    folder, rows = tmp_path_factory.mktemp("reader"), make_rows(ROWS)
    for i, part in enumerate((rows[:20], rows[20:21], rows[21:])):
        write_tsv(folder / f"{i}.tsv", part)
        write_parquet(folder / f"{i}.parquet", part, row_group_size=15)
    return {"tsv": CriteoTsvSource(f"{folder}/*.tsv", FEATURES),
            "parquet": ParquetSource(f"{folder}/*.parquet", FEATURES, CRITEO_PARQUET),
            "synthetic": SyntheticCriteoSource(FEATURES, seed=3)}


def same(left: list[Batch], right: list[Batch]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(flat(left), flat(right), strict=True))


def in_order(source: RowSource, batch_size: int, world: int, start: int, stop: int) -> list[Batch]:
    """All ranks' batches, step by step, rank by rank."""
    ranks = [list(Reader(source, batch_size, rank=rank, world_size=world, start=start, stop=stop))
             for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    for step in zip(*ranks, strict=True):
        assert len({batch.position for batch in step}) == 1
    return [batch for step in zip(*ranks, strict=True) for batch in step]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15)
@given(st.data())
def test_ranks_together_and_resumed_hold_the_same_stream(sources: dict[str, RowSource], kind: str,
                                                         data: st.DataObject) -> None:
    source = sources[kind]
    start = data.draw(st.integers(0, ROWS - 1), label="start")
    stop = data.draw(st.integers(start + 1, ROWS), label="stop")
    batch_size = data.draw(st.integers(1, 20), label="batch_size")
    whole = list(Reader(source, ROWS, start=start, stop=stop))
    assert len(whole) == 1
    for world in (1, 2, 3):
        batches = in_order(source, batch_size, world, start, stop)
        assert same(batches, whole)
        assert batches[-1].position == stop
        step = data.draw(st.integers(0, len(batches) // world - 1), label="resume behind step")
        position = batches[step * world].position
        rest = batches[(step + 1) * world:]
        resumed = in_order(source, batch_size, world, position, stop)
        assert [batch.position for batch in resumed] == [batch.position for batch in rest]
        assert [len(batch) for batch in resumed] == [len(batch) for batch in rest]
        assert not rest or same(resumed, rest)


@pytest.mark.parametrize("kind", KINDS)
def test_global_batch_does_not_depend_on_the_world_size(sources: dict[str, RowSource],
                                                        kind: str) -> None:
    """12 rows a step on 1, 2 and 3 ranks."""
    single = list(Reader(sources[kind], 12, stop=ROWS))
    for world in (2, 3):
        batches = in_order(sources[kind], 12 // world, world, 0, ROWS)
        for i, batch in enumerate(single):
            assert same(batches[i * world:(i + 1) * world], [batch])


@pytest.mark.parametrize(("rows", "world", "sizes"), [
    (8, 2, [[4], [4]]), (9, 2, [[4, 0], [4, 1]]), (11, 2, [[4, 1], [4, 2]]),
    (1, 3, [[0], [0], [1]]), (0, 2, [[], []]),
])
def test_last_batch_is_spread_evenly(sources: dict[str, RowSource], rows: int, world: int,
                                     sizes: list[list[int]]) -> None:
    readers = [Reader(sources["tsv"], 4, rank=rank, world_size=world, stop=rows)
               for rank in range(world)]
    batches = [list(reader) for reader in readers]
    assert [[len(batch) for batch in of_rank] for of_rank in batches] == sizes
    for reader, of_rank in zip(readers, batches, strict=True):
        assert len(reader) == len(of_rank)
        for batch in of_rank:
            assert batch.dense.shape == (len(batch), 13)
            assert batch.sparse.stride() == len(batch)


def test_drop_last(sources: dict[str, RowSource]) -> None:
    reader = Reader(sources["parquet"], 4, world_size=2, drop_last=True)
    assert len(reader) == ROWS // 8
    assert [batch.position for batch in reader] == list(range(8, 49, 8))


def test_iterating_twice_gives_the_same(sources: dict[str, RowSource]) -> None:
    reader = Reader(sources["tsv"], 10)
    assert same(list(reader), list(reader))


def test_range_beyond_the_rows(sources: dict[str, RowSource]) -> None:
    assert Reader(sources["tsv"], 4, stop=1000).stop == ROWS
    empty = Reader(sources["tsv"], 4, start=ROWS + 5)
    assert len(empty) == 0
    assert list(empty) == []


@pytest.mark.parametrize(("arguments", "text"), [
    ({"batch_size": 0}, "found batch_size 0, rank 0, world_size 1"),
    ({"rank": 2, "world_size": 2}, "found batch_size 4, rank 2, world_size 2"),
    ({"start": -1}, r"rows \[-1, None\) are no range"),
    ({"start": 5, "stop": 4}, r"rows \[5, 4\) are no range"),
], ids=["batch", "rank", "start", "stop"])
def test_refuses(sources: dict[str, RowSource], arguments: dict[str, int], text: str) -> None:
    with pytest.raises(DataError, match=text):
        Reader(sources["tsv"], **{"batch_size": 4, **arguments})


def test_endless_source_needs_stop(sources: dict[str, RowSource]) -> None:
    with pytest.raises(DataError, match="the source is endless; give stop"):
        len(Reader(sources["synthetic"], 4))


def test_real_sample_over_ranks(shared_data: Path) -> None:
    source = ParquetSource(shared_data / "criteo_kaggle_123k.parquet", FEATURES, CRITEO_PARQUET)
    whole = list(Reader(source, 3000, start=15_000, stop=45_000))
    for world in (2, 3):
        assert same(in_order(source, 1000, world, 15_000, 45_000), whole)


def test_real_head_over_ranks(shared_data: Path) -> None:
    path = shared_data / "criteo_kaggle_head_7k.tsv"
    source = CriteoTsvSource(path, FEATURES)
    rows = [line.split("\t") for line in path.read_text().split("\n") if line]
    batches = in_order(source, 700, 2, 100, 7200)
    for batch, first in zip(batches, (100, 800, 1500), strict=False):
        check_batch(batch, rows[first:first + 700])
