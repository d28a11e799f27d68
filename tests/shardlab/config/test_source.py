"""Reading YAML and overrides: repeated keys, paths into lists, and every way to get them wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardlab.config.source import apply_overrides, read_source
from shardlab.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text)
    return path


def test_read_source_returns_the_mapping(tmp_path):
    data, problems = read_source(write(tmp_path, "a: {b: [1, 2]}\nc: x\n"))
    assert data == {"a": {"b": [1, 2]}, "c": "x"}
    assert problems == []


def test_repeated_keys_are_listed_with_place_and_lines(tmp_path):
    text = "a: 1\nb:\n  c: 1\n  c: 2\nd:\n- {e: 1, e: 2, e: 3}\na: 2\n"
    _, problems = read_source(write(tmp_path, text))
    assert problems == [
        "b.c: written twice, on lines 3 and 4",
        "d[0].e: written twice, on lines 6 and 6",
        "d[0].e: written twice, on lines 6 and 6",
        "a: written twice, on lines 1 and 7",
    ]


def test_aliases_are_copies_and_no_repetition(tmp_path):
    data, problems = read_source(write(tmp_path, "a: &x {b: 1}\nc: *x\n"))
    assert data["c"] == {"b": 1}
    assert data["c"] is not data["a"]
    assert problems == []


@pytest.mark.parametrize(("text", "message"), [
    ("a: [1", r"not YAML: expected ',' or '\]'.*\(line 1, column 6\)"),
    ("- 1\n", "expected a mapping of keys such as tables and model, found list"),
    ("", "expected a mapping of keys such as tables and model, found NoneType"),
    ("a: !!python/object/apply:os.system [echo]", "not YAML: could not determine a constructor"),
    ("\x00", "not YAML: .*special characters"),
    ("[" * 3000, "nested too deep"),
    ("a: &x [*x]", "an alias contains itself"),
], ids=["unclosed", "list", "empty", "python object", "control character", "deep", "recursive"])
def test_read_source_refuses(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_source(write(tmp_path, text))


def test_read_source_names_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot read the job file: .*No such"):
        read_source(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot read the job file"):
        read_source(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read the job file"):
        read_source(binary)


@pytest.mark.parametrize(("override", "expected"), [
    ("a.b=2", {"a": {"b": 2}, "l": [{"x": 1}, {"x": 2}]}),
    ("a=text", {"a": "text", "l": [{"x": 1}, {"x": 2}]}),
    ("l[1].x=[1, {y: 2}]", {"a": {"b": 1}, "l": [{"x": 1}, {"x": [1, {"y": 2}]}]}),
    ("l.0.x=true", {"a": {"b": 1}, "l": [{"x": True}, {"x": 2}]}),
    ("l[0]=3", {"a": {"b": 1}, "l": [3, {"x": 2}]}),
    ("new.deep.key=1=2", {"a": {"b": 1}, "l": [{"x": 1}, {"x": 2}],
                          "new": {"deep": {"key": "1=2"}}}),
    ("a.b=", {"a": {"b": None}, "l": [{"x": 1}, {"x": 2}]}),
])
def test_override_writes_the_value_at_its_path(override, expected):
    data = {"a": {"b": 1}, "l": [{"x": 1}, {"x": 2}]}
    assert apply_overrides(data, [override]) == []
    assert data == expected


def test_later_overrides_win_over_earlier_ones():
    data: dict[str, object] = {}
    assert apply_overrides(data, ["a.b=1", "a.b=2"]) == []
    assert data == {"a": {"b": 2}}


@pytest.mark.parametrize(("override", "message"), [
    ("a.b", "--set a.b: expected key=value"),
    ("=1", "expected key=value"),
    ("a..b=1", "expected key=value"),
    ("a[x]=1", "expected key=value"),
    ("a.b=[1", "the value is not YAML: expected"),
    ("a.b.c=1", "a.b is 1, which has no 'c'"),
    ("l[2]=1", "l is a list of 1 entries, 2 is not one of them"),
    ("l.name=1", "l is a list of 1 entries, 'name' is not one of them"),
])
def test_override_that_cannot_be_applied_is_listed(override, message):
    problems = apply_overrides({"a": {"b": 1}, "l": [1]}, [override, "fine=1"])
    assert len(problems) == 1
    assert message in problems[0]
