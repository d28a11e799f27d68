"""What would fail in the queue is said before it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from shardlab import planner
from shardlab.config import load_job
from shardlab.errors import ConfigError, LaunchError
from shardlab.launch import preflight
from shardlab.launch.planning import job_request, plan_request
from shardlab.launch.preflight import (
    Nodes,
    absolute_paths,
    check,
    compare_versions,
    file_system,
)
from shardlab.planner import read_topology

GIB = 2**30
SMALL = "tables={preset: criteo_kaggle, embedding_dim: 4, max_rows: 500}"
TWO = Nodes(2, 2, gpus=False, assume_shared=True)


def test_what_was_checked_is_said(tmp_path):
    plan, paths, versions = check(load_job(None, [SMALL, f"train.run_dir={tmp_path}"]), TWO)
    assert plan.startswith("plan      fits 4 ranks of nodes like this machine")
    assert paths.startswith("paths     1 found")
    assert "torch " in versions


def test_every_problem_is_listed(tmp_path):
    job = load_job(None, [SMALL, f"train.run_dir={tmp_path}", "topology=8xh100"])
    with pytest.raises(LaunchError) as caught:
        check(job, Nodes(2, 2, gpus=True))
    text = str(caught.value)
    assert text.startswith("not submitted:\n  plan: topology 8xh100 has 8 ranks, the nodes asked "
                           "for have 2 x 2")
    assert f"train.run_dir: {tmp_path} lies on {file_system(tmp_path)}, which other nodes" in text


def test_one_node_needs_no_shared_path(tmp_path):
    check(load_job(None, [SMALL, f"train.run_dir={tmp_path}"]), Nodes(1, 2, gpus=False))


def test_a_run_folder_must_be_named():
    with pytest.raises(LaunchError, match=r"train\.run_dir: absent; a job that is started again"):
        check(load_job(None, [SMALL]), TWO)
    with pytest.raises(ConfigError, match=r"train\.run_dir: absent"):
        absolute_paths(load_job(None, [SMALL]))


def test_gpus_that_nobody_described_are_not_planned_for(tmp_path):
    job = load_job(None, [SMALL, f"train.run_dir={tmp_path}"])
    assert check(job, Nodes(1, 8, gpus=True))[0].startswith(
        "plan      not checked against memory: say what the GPUs are, such as --set topology=1x8x")


#: 516 GiB, more than two machines like this one have; less than 8 GPUs of 80 GB.
LARGE = "tables={preset: criteo_kaggle, embedding_dim: 4096, max_rows: 100000000}"


@pytest.fixture
def small_nodes(monkeypatch):
    """Nodes of 16 GiB and, where a job has a folder there, of a large disk."""
    cpu = replace(read_topology("cpu"), hbm_bytes=12 * GIB, ddr_bytes=4 * GIB)
    assert cpu.ssd is not None
    monkeypatch.setattr(planner, "local_cpu", lambda ranks: replace(
        cpu, ranks_per_host=ranks, ssd=replace(cpu.ssd, capacity_bytes=2000 * GIB)))


@pytest.mark.usefixtures("small_nodes")
def test_a_plan_that_does_not_fit_the_nodes_is_refused_with_what_would(tmp_path):
    job = load_job(None, [LARGE, f"train.run_dir={tmp_path}"])
    with pytest.raises(LaunchError) as caught:
        check(job, Nodes(2, 1, gpus=False, assume_shared=True))
    text = str(caught.value)
    assert text.startswith("not submitted:\n  plan: table 't_C3' (10,131,227 x 4096) does not fit")
    assert "the 26 tables need" in text
    changes = text.partition("smallest change, any one of:\n")[2]
    hosts = re.search(r"- (\d+) hosts of 1 rank instead of 2\n", changes)
    assert hosts is not None
    enough = Nodes(int(hosts[1]), 1, gpus=False, assume_shared=True)
    assert check(job, enough)[0].startswith(f"plan      fits {hosts[1]} ranks")


@pytest.mark.usefixtures("small_nodes")
def test_the_disk_counts_only_where_the_job_has_a_folder_on_it(tmp_path):
    wide = LARGE.replace("4096", "256")
    job = load_job(None, [wide, f"train.run_dir={tmp_path}"])
    with pytest.raises(LaunchError, match=r"the 26 tables need .* short by"):
        check(job, Nodes(1, 1, gpus=False))
    check(load_job(None, [wide, f"train.run_dir={tmp_path}", "train.ssd_dir=ssd"]),
          Nodes(1, 1, gpus=False))


def test_a_named_plan_that_does_not_fit_the_nodes_is_refused(tmp_path):
    wide = LARGE.replace("4096", "512")  # 65 GiB
    path = tmp_path / "plan.json"
    path.write_text(plan_request(job_request(load_job(None, [wide]), read_topology("2xh100")))
                    .plan.to_json())
    sets = [wide, f"train.run_dir={tmp_path}", f"plan={path}"]
    two = Nodes(1, 2, gpus=True)
    assert check(load_job(None, [*sets, "topology=2xh100"]), two)[0] == \
        f"plan      {path} fits 2 ranks of 2xh100"
    machine = tmp_path / "small.yaml"
    machine.write_text("profile: 2xh100\nhbm_bytes: 20000000000\nddr_bytes: 10000000000\n")
    with pytest.raises(LaunchError) as caught:
        check(load_job(None, [*sets, f"topology={machine}"]), two)
    text = str(caught.value)
    assert f"plan: {path} does not fit 2 ranks of" in text
    assert "rank 0: hbm needs" in text
    assert "smallest change" in text


def test_missing_data_is_named(tmp_path):
    path = tmp_path / "clicks.tsv"
    path.touch()
    job = load_job(None, [SMALL, f"train.run_dir={tmp_path}",
                          f"data={{kind: criteo_tsv, path: {path}}}"])
    path.unlink()
    with pytest.raises(LaunchError, match=r"clicks\.tsv': no such file"):
        check(job, TWO)


def test_the_file_system_is_that_of_the_nearest_mount(monkeypatch, tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(f"a / ext4 rw 0 0\nb {tmp_path}/data lustre rw 0 0\n"
                      f"c {tmp_path}/with\\040space nfs4 rw 0 0\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "with space").mkdir()
    monkeypatch.setattr(preflight, "_MOUNTS", mounts)
    assert file_system(tmp_path / "data" / "new" / "run") == "lustre"
    assert file_system(tmp_path / "with space") == "nfs4"
    assert file_system(tmp_path / "database") == "ext4"


def test_paths_become_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("clicks.tsv").touch()
    job = load_job(None, [SMALL, "train.run_dir=runs/a", "ranks=4",
                          "data={kind: criteo_tsv, path: clicks.tsv}"])
    moved = load_job(None, [SMALL, "data={kind: criteo_tsv, path: clicks.tsv}",
                            *absolute_paths(job)])
    assert moved.train.run_dir == str(tmp_path / "runs" / "a")
    assert moved.data.path == (str(tmp_path / "clicks.tsv"),)
    assert moved.ranks == 1


def test_a_rank_with_another_version_is_named():
    with pytest.raises(LaunchError, match=r"rank 1 has torch 2\.9, rank 0 has 2\.13; give all"):
        compare_versions([{"torch": "2.13"}, {"torch": "2.9"}])
