"""A plan that does not fit free memory is refused with where its bytes go and what would fit."""

from __future__ import annotations

import pytest

from shardlab.comm import Groups
from shardlab.config import load_job
from shardlab.errors import DOES_NOT_FIT, ForecastError
from shardlab.launch import forecast as module
from shardlab.launch.forecast import Free, check_memory, forecast, host_free
from shardlab.launch.planning import choose_plan, job_request, plan_request
from shardlab.planner import local_cpu

JOB = load_job(None, ["tables={preset: criteo_kaggle, embedding_dim: 16, max_rows: 100000}",
                      "batch_size=64"])
MIB = 2**20


def test_free_memory_is_positive_and_capped(tmp_path, monkeypatch):
    assert host_free() > 0
    for name, text in (("memory.max", "1000000"), ("memory.current", "400000"),
                       ("memory.stat", "inactive_file 1000\nactive_file 50\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(module, "_CGROUP", tmp_path)
    assert host_free() == 601050
    (tmp_path / "memory.max").write_text("max")
    assert host_free() > 601050


def test_what_fits_is_silent():
    request = job_request(JOB, local_cpu(2))
    plan = plan_request(request).plan
    assert forecast(plan, request, [Free(None, 1 << 40, None)] * 2, on_device=False) == ""


def test_what_does_not_fit_is_broken_down():
    request = job_request(JOB, local_cpu(2))
    plan = plan_request(request).plan
    text = forecast(plan, request, [Free(None, 40 * MIB, None)] * 2, on_device=False)
    first, line, *rest = text.split("\n")
    assert first.startswith("the job is predicted not to fit")
    assert line.startswith("  host 0: memory needs ")
    assert "40 MiB are free" in line
    assert any(entry.startswith("  table t_C3: ") for entry in rest)
    assert any(entry.startswith("smallest change") for entry in rest)


def test_memory_of_devices_is_told_by_rank():
    request = job_request(JOB, local_cpu(2))
    plan = plan_request(request).plan
    text = forecast(plan, request, [Free(1 << 40, 1 << 40, None), Free(MIB, 1 << 40, None)],
                    on_device=True)
    assert "  rank 1: hbm needs " in text
    assert "rank 0: hbm needs" not in text


def test_a_rank_refuses_before_it_allocates(monkeypatch):
    monkeypatch.setattr(module, "host_free", lambda: 30 * MIB)
    plan = choose_plan(JOB, Groups(), None).plan
    with pytest.raises(ForecastError, match="the job is predicted not to fit") as caught:
        check_memory(JOB, plan, Groups())
    assert caught.value.exit_code == DOES_NOT_FIT
