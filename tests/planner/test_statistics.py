"""Statistics as files: round trip, curves between and beyond their points, every problem listed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shardlab.errors import ConfigError
from shardlab.planner import PlanSettings, plan
from shardlab.planner.statistics import IdStatistics, Statistics, read_statistics
from shardlab.specs import EmbeddingBagConfig

RECORD = IdStatistics(
    features=("f",), rows=1000, samples=400, ids=800, max_pooling=5, distinct=100.0, followed=1.0,
    unique=((64.0, 40.0), (256.0, 80.0), (400.0, 100.0)), hot=((1.0, 0.3), (100.0, 1.0)),
    miss=((1.0, 0.9), (100.0, 0.125)), blocks=((1.0, 1.0, 1.0), (2.0, 0.8, 0.6)),
    hottest=((17, 240), (0, 20)))
FOUND = Statistics("clicks", 400, (RECORD,))


def written(folder: Path, **changes: object) -> Path:
    """A file whose only record is changed; None removes a field."""
    data = json.loads(FOUND.to_json())
    record = {**data["records"][0], **changes}
    data["records"] = [{key: value for key, value in record.items() if value is not None}]
    path = folder / "ids.json"
    path.write_text(json.dumps(data))
    return path


def test_files_are_read_as_written(tmp_path: Path) -> None:
    assert read_statistics(written(tmp_path)) == FOUND
    older = read_statistics(written(tmp_path, hottest=None))
    assert older.records == (replace(RECORD, hottest=()),)


def test_different_ids_between_and_beyond_what_was_counted() -> None:
    assert RECORD.pooling_factor == 2
    assert RECORD.unique_ids([64, 256, 400]).tolist() == pytest.approx([40, 80, 100])
    assert float(RECORD.unique_ids(128)) == pytest.approx(np.sqrt(40 * 80))
    assert float(RECORD.unique_ids(6.4)) == pytest.approx(4)  # hardly any repetition
    beyond = RECORD.unique_ids([800, 10**9])
    assert 100 < beyond[0] < 200
    assert beyond[1] == 1000  # the table ends


def test_curves_of_caches_hot_rows_and_blocks() -> None:
    assert RECORD.miss_ratio([0, 1, 100, 500, 1000]).tolist() == pytest.approx(
        [1, 0.9, 0.125, 0.125, 0])
    assert RECORD.hot_share([0, 1, 10, 100]).tolist() == pytest.approx([0, 0.3, 0.65, 1.0])
    assert RECORD.fullest_block([1, 2]).tolist() == pytest.approx([1, 0.8])
    assert RECORD.fullest_unique_block(2) == pytest.approx(0.6)


def test_tables_take_the_record_of_their_features() -> None:
    both = replace(RECORD, features=("f", "g"))
    found = Statistics("clicks", 400, (RECORD, replace(RECORD, features=("g",)), both))
    assert found.of(["g", "f"]) == [both]
    assert found.of(["f"]) == [RECORD]
    with pytest.raises(ConfigError, match=r"statistics of clicks: no feature 'ff'.*'f'.*run "
                                          "`shardlab stats` on data that has it"):
        found.of(["ff"])


def test_plans_take_pooling_and_repetition_from_them() -> None:
    table = EmbeddingBagConfig(1000, 64, "t", feature_names=["f"], pooling_factor=50.0)
    assumed = plan([table], "2xcpu", 256)
    measured = plan([table], "2xcpu", 256, settings=PlanSettings(statistics=FOUND))
    assert measured.step_ms < assumed.step_ms
    assert "clicks" in measured.assumption


@pytest.mark.parametrize(("changes", "text"), [
    ({"rows": None}, "records[0].rows: missing"),
    ({"hottest": "17:240 x:3"}, "records[0].hottest: expected text such as '17:900 3:85', found"),
    ({"hottest": [[1, 2]]}, "records[0].hottest: expected text"),
    ({"rows": -1}, "records[0].rows: expected a number of at least 0, found -1"),
    ({"ids": float("nan")}, "records[0].ids: expected a number"),
    ({"row": 3}, "records[0].row: unknown (did you mean 'rows'?)"),
    ({"features": []}, "records[0].features: expected names, found []"),
    ({"miss": [[1, 0.5, 3]]}, "records[0].miss: expected points of 2 numbers"),
    ({"unique": []}, "records[0].unique: expected points of 2 numbers"),
    ({"hot": [[2, 0.5], [1, 0.4]]}, "records[0].hot: expected ascending points"),
])
def test_every_problem_of_a_file_is_named(tmp_path: Path, changes: dict, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_statistics(written(tmp_path, **changes))
    assert text in str(caught.value)


@pytest.mark.parametrize(("content", "text"), [
    (None, "cannot be read: No such file"), ("{", "not JSON"), ("[]", "not a file of `shardlab "),
    ('{"schema": "shardlab-statistics", "version": 9}', "version 9; this release reads version 1"),
    ('{"schema": "shardlab-statistics", "version": 1}', "records: expected a list"),
    ('{"schema": "shardlab-statistics", "version": 1, "samples": 1, "records": [7]}',
     "records[0]: expected a mapping, found 7"),
])
def test_what_is_no_such_file(tmp_path: Path, content: str | None, text: str) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_statistics(path)
    assert text in str(caught.value)
