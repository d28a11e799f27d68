"""Lost ranks are started again, fewer of them where that is allowed; other failures are not."""

from __future__ import annotations

import pytest

from shardlab.config import load_job
from shardlab.errors import DOES_NOT_FIT, STALLED, LaunchError
from shardlab.launch import elastic
from shardlab.launch.elastic import supervise

JOB = load_job(None, ["tables={preset: criteo_kaggle}", "ranks=4", "train.run_dir=r"])


@pytest.fixture
def starts(monkeypatch):
    """What every start was given; ``codes`` are their outcomes."""
    seen: list[tuple[int, list[str]]] = []
    codes: list[int] = []

    def start(ranks: int, command: list[str]) -> int:
        seen.append((ranks, command))
        code = codes.pop(0)
        if code not in (0, 75, 143):
            raise LaunchError(f"rank 1 ended with {code}", code)
        return code

    monkeypatch.setattr(elastic, "start_local_ranks", start)
    return seen, codes


def test_a_killed_rank_is_started_again(starts):
    seen, codes = starts
    codes += [137, STALLED, 0]
    said: list[str] = []
    assert supervise(JOB, 4, 3, said.append) == 0
    assert [ranks for ranks, _ in seen] == [4, 4, 4]
    assert said[0] == ("rank 1 ended with 137; goes on with 4 ranks from the last checkpoint, "
                       "2 restarts left")


def test_fewer_ranks_go_on_planned_anew(starts):
    seen, codes = starts
    codes += [137, 137, 137, 0]
    assert supervise(JOB, 2, 3, lambda _: None) == 0
    assert [ranks for ranks, _ in seen] == [4, 3, 2, 2]
    assert "train.elastic=true" in seen[0][1]


def test_replica_groups_lose_a_rank_each(starts):
    job = load_job(None, ["tables={preset: criteo_kaggle}", "ranks=6", "train.run_dir=r",
                          "parallel.replicas=2"])
    seen, codes = starts
    codes += [137, 137, 137, 0]
    assert supervise(job, 3, 3, lambda _: None) == 0
    assert [ranks for ranks, _ in seen] == [6, 4, 4, 4]


@pytest.mark.parametrize("code", [1, 2, DOES_NOT_FIT, 4])
def test_what_would_fail_again_is_not_repeated(starts, code):
    seen, codes = starts
    codes.append(code)
    with pytest.raises(LaunchError) as caught:
        supervise(JOB, 4, 3, lambda _: None)
    assert caught.value.exit_code == code
    assert len(seen) == 1


def test_the_last_loss_is_the_job_s(starts):
    codes = starts[1]
    codes += [137, 137]
    with pytest.raises(LaunchError, match="ended with 137"):
        supervise(JOB, 4, 1, lambda _: None)


@pytest.mark.parametrize(("code", "name"), [(75, "SIGUSR1"), (143, "SIGTERM")])
def test_a_stop_signal_ends_the_job(starts, code, name):
    starts[1].append(code)
    said: list[str] = []
    assert supervise(JOB, 4, 3, said.append) == code
    assert said == [f"stopped by {name}"]


def test_checkpoints_must_be_found_again():
    job = load_job(None, ["tables={preset: criteo_kaggle}", "ranks=2"])
    with pytest.raises(LaunchError, match=r"train\.run_dir: absent; .* or --restarts 0"):
        supervise(job, 2, 1, lambda _: None)
