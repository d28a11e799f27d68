"""The arguments that name a job: file or demo, overrides, options folded into the job."""

from __future__ import annotations

import pytest

from shardlab.cli.job import read_job
from shardlab.errors import ConfigError


def test_options_become_values_of_the_job():
    job = read_job(None, True, ("train.epochs=2",), ranks=3, topology="8xh100", train__resume=None)
    assert (job.ranks, job.topology, job.train.epochs) == (3, "8xh100", 2)
    assert job.train.resume == "auto"


def test_options_win_over_set():
    assert read_job(None, True, ("ranks=5",), ranks=3).ranks == 3


def test_texts_need_no_quotes(tmp_path):
    folder = tmp_path / "a: b, {c}"
    folder.mkdir()
    assert read_job(None, True, (), train__resume=str(folder)).train.resume == str(folder)


@pytest.mark.parametrize(("job", "demo", "message"), [
    (None, False, "give a job file, JOB.yaml, or --demo"),
    ("x.yaml", True, r"both x\.yaml and --demo are given; keep one of them"),
])
def test_exactly_one_of_file_and_demo(job, demo, message):
    with pytest.raises(ConfigError, match=message):
        read_job(job, demo, ())


def test_problems_are_counted_and_indented():
    with pytest.raises(ConfigError) as caught:
        read_job(None, True, ("modle=3", "ranks=0"))
    title, *lines = str(caught.value).split("\n")
    assert title == "the demo job has 2 problems:"
    assert all(line.startswith("  ") for line in lines)
    assert any(line.startswith("  modle: unknown key (did you mean 'model'?)") for line in lines)
