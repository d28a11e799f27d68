"""Whether a job's exchange has two stages: as asked, or by the plan's byte count."""

from __future__ import annotations

import json

import pytest

from shardlab.comm import build_groups
from shardlab.config import load_job
from shardlab.errors import ConfigError, LaunchError
from shardlab.launch.hierarchy import choose_hierarchy
from shardlab.plan import ShardingPlan
from shardlab.specs import ShardingType
from shardlab.table_plan import build_table_plan
from tests.harness import run_ranks

TABLES = "tables={preset: criteo_kaggle, embedding_dim: 16, max_rows: 20000}"


def _choose(groups, overrides, hosts=2):
    groups = build_groups(groups.process_group, groups.world_size // hosts)
    job = load_job(None, [TABLES, *overrides])
    plan = ShardingPlan(4, tuple(build_table_plan(table, ShardingType.ROW_WISE, range(4))
                                 for table in job.table_configs()))
    try:
        choice, chosen = choose_hierarchy(job, plan, groups)
    except LaunchError as error:
        return str(error)
    return json.loads(choice.to_json()), chosen.transport, chosen.stages is not None


def _machine(folder, bytes_per_s):
    path = folder / "machine.yaml"
    path.write_text("profile: 2x2xcpu\n"
                    f"inter_host: {{bytes_per_s: {bytes_per_s}, latency_s: 0.00001}}\n"
                    "intra_host: {bytes_per_s: 5e9, latency_s: 0.00001}\n")
    return [f"topology={path}", "batch_size=512"]


def test_slow_links_take_two_stages(tmp_path):
    found = run_ranks(4, _choose, _machine(tmp_path, 10e6))
    assert all(one == found[0] for one in found)
    choice, transport, stages = found[0]
    assert choice["hierarchy"] == "two_stage"
    assert choice["costs"]["two_stage"]["across_bytes"] < choice["costs"]["flat"]["across_bytes"]
    assert transport.startswith("two stages, shared memory inside 2 hosts of 2 ranks, gloo between "
                                "them; two stages send ")
    assert stages


def test_fast_links_stay_flat_and_say_so(tmp_path):
    choice, transport, stages = run_ranks(4, _choose, _machine(tmp_path, 50e9))[0]
    assert choice["hierarchy"] == "flat"
    assert "; flat: two stages send" in transport
    assert not stages


def test_one_host_is_flat_and_refuses_two_stages():
    choice, transport, stages = run_ranks(4, _choose, [], 1)[0]
    assert (choice["hierarchy"], choice["reason"]) == ("flat", "all 4 ranks are on one host")
    assert transport == "shared memory: all ranks are on one host"
    assert not stages
    refused = run_ranks(4, _choose, ["exchange.hierarchy=two_stage"], 1)[0]
    assert "two_stage was asked for, but all 4 ranks are on one host" in refused


def test_what_is_asked_for_is_done(tmp_path):
    slow = _machine(tmp_path, 10e6)
    assert not run_ranks(4, _choose, [*slow, "exchange.hierarchy=flat"])[0][2]
    choice, transport, stages = run_ranks(4, _choose, ["exchange.hierarchy=two_stage"])[0]
    assert (choice["costs"], stages) == (None, True)
    assert transport.endswith("gloo between them; as exchange.hierarchy asks")


def test_unknown_hierarchy_is_refused():
    with pytest.raises(ConfigError, match=r"exchange\.hierarchy"):
        load_job(None, [TABLES, "exchange.hierarchy=three_stage"])
