"""Ranks from torchrun's and Slurm's variables, and every way these can be incomplete."""

from __future__ import annotations

import os

import pytest

from shardlab.errors import LaunchError
from shardlab.launch import environment
from shardlab.launch.environment import available_cores, find_rank, first_host, tasks_on_node

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "node7", "MASTER_PORT": "29500"}
SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "7", "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "4,3", "SLURM_STEP_ID": "2",
        "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_JOB_ID": "1234"}


def test_a_process_on_its_own_is_no_rank():
    assert find_rank({}) is None


def test_torchrun_variables_are_read_and_written_back():
    place = find_rank(TORCHRUN)
    assert place is not None
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (3, 4, 1, 2)
    assert place.starter == "torchrun"
    assert place.variables() == TORCHRUN


def test_torchrun_wins_over_slurm():
    place = find_rank({**SRUN, **TORCHRUN})
    assert place is not None
    assert place.rank == 3


def test_srun_variables_are_read():
    place = find_rank(SRUN)
    assert place is not None
    assert place.variables() == {
        "RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "gpu03", "MASTER_PORT": str(12000 + (1234 * 16 + 2) % 20000)}


def test_srun_master_can_be_chosen():
    place = find_rank({**SRUN, "MASTER_ADDR": "head", "MASTER_PORT": "4000"})
    assert place is not None
    assert (place.master_addr, place.master_port) == ("head", 4000)


@pytest.mark.parametrize("environ", [
    {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"},
    {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
], ids=["batch script", "step of one task"])
def test_inside_slurm_but_not_as_one_of_several_tasks(environ):
    assert find_rank(environ) is None


@pytest.mark.parametrize(("environ", "message"), [
    ({"RANK": "0"}, "RANK is set, but WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, "
                    "MASTER_PORT not; start through torchrun"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set, but RANK, .* or unset WORLD_SIZE"),
    ({**TORCHRUN, "RANK": "x"}, "RANK is 'x', expected a number"),
    ({**TORCHRUN, "RANK": "4"}, "torchrun gave rank 4 of 4; expected 0 to 3"),
    ({**TORCHRUN, "LOCAL_RANK": "2"}, "torchrun gave local_rank 2 of 2; expected 0 to 1"),
    ({key: value for key, value in SRUN.items() if key != "SLURM_LOCALID"},
     "SLURM_LOCALID is not set, although the variables beside it are"),
    ({key: value for key, value in SRUN.items() if key != "SLURM_STEP_NODELIST"},
     "srun set neither SLURM_STEP_NODELIST nor SLURM_NODELIST; set MASTER_ADDR"),
    ({**SRUN, "SLURM_NODEID": "2"}, "SLURM_NODEID is 2, but SLURM_STEP_TASKS_PER_NODE, '4,3', "
                                    "names 2 nodes"),
    ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4x2"}, "is '4x2', expected a list such as"),
], ids=lambda value: "" if isinstance(value, dict) else value[:30])
def test_incomplete_variables_are_refused_by_name(environ, message):
    with pytest.raises(LaunchError, match=message):
        find_rank(environ)


@pytest.mark.parametrize(("nodes", "first"), [
    ("login", "login"), ("a,b", "a"), ("gpu[03-07,12],login", "gpu03"), ("gpu[7]", "gpu7"),
    ("gpu[9,12-14]", "gpu9"), ("rack[1-2]node[03-04].site,x", "rack1node03.site"), ("", ""),
])
def test_first_host(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(("tasks", "counts"), [
    ("4", [4]), ("4(x2),3", [4, 4, 3]), ("1, 2(x3)", [1, 2, 2, 2]),
])
def test_tasks_on_node(tasks, counts):
    assert [tasks_on_node(tasks, node) for node in range(len(counts))] == counts


@pytest.mark.parametrize(("limit", "cores"), [
    ("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8),
    ("nonsense", 8),
])
def test_available_cores_obeys_affinity_and_container(monkeypatch, tmp_path, limit, cores):
    file = tmp_path / "cpu.max"
    file.write_text(limit)
    monkeypatch.setattr(environment, "_CGROUP_LIMIT", file)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert available_cores() == cores


def test_available_cores_without_a_container(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "_CGROUP_LIMIT", tmp_path / "absent")
    assert available_cores() >= 1
