"""``shardlab plan``: every option, what it prints and writes, its exit codes and messages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from shardlab.cli.main import main
from shardlab.cli.plan import plan as command
from shardlab.config import load_job
from shardlab.phases import MEASURED_PHASES
from shardlab.plan import ShardingPlan
from shardlab.specs import ShardingType
from shardlab.table_plan import build_table_plan

SMALL = ("--set", "tables.max_rows=1000")


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["plan", *arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def plan_file(path: Path, world_size: int) -> Path:
    """Every table of the small demo whole on the last rank."""
    tables = load_job(None, [SMALL[1]]).table_configs()
    path.write_text(ShardingPlan(world_size, tuple(
        build_table_plan(table, ShardingType.TABLE_WISE, [world_size - 1])
        for table in tables)).to_json())
    return path


def run_folder(path: Path, capsys) -> Path:
    """What a run of the small demo would leave behind: twice what was predicted."""
    path.mkdir()
    code, _, err = run(capsys, "--demo", "--ranks", "2", "--json", str(path / "plan.json"), *SMALL)
    assert code == 0, err
    (path / "job.yaml").write_text(load_job(None, [SMALL[1], "ranks=2"]).resolved_yaml())
    predicted = json.loads((path / "plan.json").read_text())["predicted"]
    phases = [dict.fromkeys(MEASURED_PHASES, 0.5)
              | dict(zip(predicted["phases"], (2 * ms for ms in rank["phase_ms"]), strict=True))
              for rank in predicted["ranks"]]
    tables = [rank["held"]["tables"] for rank in predicted["ranks"]]
    (path / "summary.json").write_text(json.dumps(
        {"phase_ms": phases, "tables": tables, "pace": {"step_ms_p50": 1.0}}))
    return path


# ------------------------------------------------------------------ report and files
def test_plan_shows_ranks_and_tables(capsys):
    code, out, _ = run(capsys, "--demo", "--ranks", "3", *SMALL)
    assert code == 0
    assert "3xcpu (this machine)" in out
    assert " t_C9 " not in out  # three rows: one of the tables of less work
    assert "6 tables of less work are not shown (--all shows them)" in out


def test_all_shows_every_table(capsys):
    code, out, _ = run(capsys, "--demo", "--ranks", "3", "--all", *SMALL)
    assert code == 0
    assert all(f"t_C{number} " in out for number in range(1, 27))


def test_json_is_a_plan_that_fits_the_job(capsys, tmp_path):
    path = tmp_path / "plan.json"
    code, out, _ = run(capsys, "--demo", "--topology", "2x4xh100", "--json", str(path), *SMALL)
    assert code == 0
    assert out.endswith(f"plan written to {path}\n")
    found = ShardingPlan.from_json(path.read_text())
    found.check(load_job(None, [SMALL[1]]).table_configs(), 8)


def test_html_is_written(capsys, tmp_path):
    path = tmp_path / "plan.html"
    code, out, _ = run(capsys, "--demo", "--html", str(path), *SMALL)
    assert code == 0
    assert out.endswith(f"page written to {path}\n")
    assert "t_C26" in path.read_text()


def test_a_plan_needs_no_data(capsys, tmp_path):
    """A login node or a laptop plans for data that lies elsewhere; training asks for it."""
    elsewhere = ("--set", "data={kind: criteo_tsv, path: absent.tsv}",
                 "--set", "train.resume=absent/step-1")
    assert run(capsys, "--demo", "--json", str(tmp_path / "p.json"), *SMALL, *elsewhere)[0] == 0
    with pytest.raises(SystemExit) as stop:
        main(["train", "--demo", *SMALL, *elsewhere])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "data.path: no file matches 'absent.tsv'" in message
    assert "train.resume: no checkpoint at 'absent/step-1'" in message


def test_the_topology_of_the_job_is_used(capsys):
    code, out, _ = run(capsys, "--demo", "--set", "topology=4xa100-80gb", *SMALL)
    assert code == 0
    assert "4xa100-80gb" in out


def test_the_dense_model_is_part_of_the_step(capsys):
    _, out, _ = run(capsys, "--demo", *SMALL)
    assert "the dense model" in out


def test_a_time_limit_still_gives_a_plan(capsys):
    code, out, _ = run(capsys, "--demo", "--time-limit", "0.001", *SMALL)
    assert code == 0
    assert "Plan of 26 tables" in out


# ------------------------------------------------------------------ questions
def test_explain(capsys):
    code, out, _ = run(capsys, "--demo", "--explain", "t_C3", "--explain", "t_C4", *SMALL)
    assert code == 0
    assert "Table t_C3: " in out
    assert "Table t_C4: " in out
    assert "What would change it" in out
    assert "Plan of" not in out


def test_what_if_of_machine_wire_and_job(capsys):
    code, out, _ = run(capsys, "--demo", "--topology", "2x2xh100", "--what-if", "hosts=+1",
                       "--what-if", "wire=bf16 batch_size=512", "--what-if", "no ssd", *SMALL)
    assert code == 0
    assert "6 (+50.0%)" in out
    assert "no ssd: every table keeps its choice" in out


def test_compare_with_another_plan(capsys, tmp_path):
    path = plan_file(tmp_path / "other.json", 2)
    code, out, _ = run(capsys, "--demo", "--ranks", "2", "--compare", str(path), *SMALL)
    assert code == 0
    assert "Two plans" in out
    assert "other.json: " in out


def test_compare_with_a_run(capsys, tmp_path):
    folder = run_folder(tmp_path / "run", capsys)
    code, out, _ = run(capsys, "--compare", str(folder))
    assert code == 0
    assert "Predicted and measured" in out
    assert "2xcpu (this machine), 2 ranks, batch 2048 per rank" in out
    assert "2.00" in out


def test_a_run_can_be_predicted_anew(capsys, tmp_path):
    folder = run_folder(tmp_path / "run", capsys)
    code, out, _ = run(capsys, "--compare", str(folder), "--topology", "2xh100")
    assert code == 0
    assert "machine  2xh100" in out
    shutil.copy(plan_file(tmp_path / "plan.json", 2), folder / "plan.json")  # no predictions
    code, out, _ = run(capsys, "--compare", str(folder))
    assert code == 0
    assert "2xcpu (this machine)" in out


# ------------------------------------------------------------------ given plans
def test_the_plan_of_the_job_is_rated(capsys, tmp_path):
    path = plan_file(tmp_path / "mine.json", 2)
    code, out, _ = run(capsys, "--demo", "--ranks", "2", "--set", f"plan={path}", *SMALL)
    assert code == 0
    assert "the plan was given, not searched" in out
    assert "as the plan says" in out


def torchrec_file(path: Path, kernel: str = "fused") -> Path:
    tables = load_job(None, [SMALL[1]]).table_configs()
    path.write_text(json.dumps({"ebc": {table.name: {
        "sharding_type": "table_wise", "compute_kernel": kernel, "ranks": [1]}
        for table in tables}}))
    return path


def test_a_torchrec_plan_is_taken_and_written(capsys, tmp_path):
    target = tmp_path / "plan.json"
    code, _, _ = run(capsys, "--demo", "--ranks", "2", "--import-torchrec",
                     str(torchrec_file(tmp_path / "torchrec.json")), "--json", str(target),
                     *SMALL)
    assert code == 0
    found = ShardingPlan.from_json(target.read_text())
    assert all([shard.rank for shard in entry.shards] == [1] for entry in found.tables)
    assert all(entry.exchange.value in ("rows", "pooled") for entry in found.tables)


def test_a_given_plan_that_does_not_fit_ends_with_2(capsys, tmp_path):
    path = plan_file(tmp_path / "mine.json", 2)
    machine = tmp_path / "tiny.yaml"
    machine.write_text("profile: 2xcpu\nhbm_bytes: 12 MiB\n")
    code, out, _ = run(capsys, "--demo", "--topology", str(machine), "--set", f"plan={path}",
                       *SMALL, "--set", "model.bottom_mlp=[16]", "--set", "model.top_mlp=[16]",
                       "--set", "batch_size=16384")
    assert code == 2
    assert "does not fit: rank 1: hbm holds" in out


# ------------------------------------------------------------------ mistakes
def test_nothing_fits_says_what_would(capsys, tmp_path):
    machine = tmp_path / "tiny.yaml"
    machine.write_text("profile: 2xcpu\nhbm_bytes: 300 MiB\nddr_bytes: 0\nssd: null\n")
    code, out, err = run(capsys, "--demo", "--topology", str(machine), "--set",
                         "tables.max_rows=20000000")
    assert code == 2
    assert out == ""
    assert "short by" in err
    assert "smallest change" in err


@pytest.mark.parametrize(("inter_host", "way"), [("10e6", "two_stage"), ("1e11", "flat")])
def test_several_hosts_are_told_how_to_exchange(inter_host, way, capsys, tmp_path):
    machine = tmp_path / "machine.yaml"
    machine.write_text("profile: 2x2xcpu\n"
                       f"inter_host: {{bytes_per_s: {inter_host}, latency_s: 0.00001}}\n")
    _, out, _ = run(capsys, "--demo", "--topology", str(machine), *SMALL)
    assert f"exchange.hierarchy auto: {way}; two stages send" in out
    assert "exchange.hierarchy" not in run(capsys, "--demo", "--ranks", "2", *SMALL)[1]


BAD_FILES = {
    "bad.yaml": "tables: [", "list.yaml": "- 1", "typo.yaml": "profile: 2xcpu\nhbm_byte: 3 GiB\n",
    "machine.yaml": "profile: 2xcpu\n", "torn.json": "{\"version\": 2", "old.json":
    "{\"version\": 1}", "empty.json": "{}", "bytes.json": "\xff\xfe"}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in BAD_FILES.items():
        (tmp_path / name).write_text(text, encoding="latin-1")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("arguments", "message"), [
    (("--demo", "--topology", "8xh10"), "unknown topology '8xh10' (did you mean '8xh100'?)"),
    (("--demo", "--topology", "none.yaml"), "topology file none.yaml: cannot be read: No such"),
    (("--demo", "--topology", "bad.yaml"), "topology file bad.yaml: not YAML"),
    (("--demo", "--topology", "list.yaml"), "expected a mapping of fields"),
    (("--demo", "--topology", "typo.yaml"), "'hbm_byte' (did you mean 'hbm_bytes'?)"),
    (("--demo", "--topology", "folder"), "unknown topology 'folder'"),
    (("--demo", "--topology", "8xh100", "--ranks", "3"),
     "--ranks 3: topology 8xh100 has 8 ranks"),
    (("--demo", "--set", "tables.embedding_dim=0"),
     "tables.embedding_dim: must be greater than 0"),
    (("bad.yaml",), "bad.yaml: not YAML"),
    (("none.yaml",), "'none.yaml' does not exist"),
    (("--demo", "--stats", "none.json"), "none.json"),
    (("--demo", "--stats", "empty.json"), "empty.json"),
    (("--demo", "--json", "no/where.json"), "--json no/where.json: cannot be written: No such"),
    (("--demo", "--html", "no/where.html"), "--html no/where.html: cannot be written: No such"),
    (("--demo", "--explain", "t_C33"), "no table 't_C33' (did you mean 't_C3'?)"),
    (("--demo", "--what-if", "hosts"), "'hosts' is no change; write key=value"),
    (("--demo", "--what-if", "model.knd=dcn"), "model.knd: unknown key (did you mean 'kind'?)"),
    (("--demo", "--what-if", "host=+1"), "--what-if 'host=+1' (did you mean 'hosts'?): the demo "),
    (("--demo", "--what-if", "hosts=0"), "hosts must be at least 1, found 0"),
    (("--demo", "--compare", "none.json"), "plan none.json: cannot be read: No such file"),
    (("--demo", "--compare", "torn.json"), "plan torn.json: plan is not JSON"),
    (("--demo", "--compare", "old.json"), "plan old.json: plan has schema version 1"),
    (("--demo", "--compare", "bytes.json"), "plan bytes.json: "),
    (("--compare", "folder"), "run folder: summary.json cannot be read: No such file"),
    (("--demo", "--import-torchrec", "none.json"), "TorchRec plan none.json: cannot be read"),
    (("--demo", "--import-torchrec", "torn.json"), "TorchRec plan torn.json: not JSON"),
    (("--demo", "--import-torchrec", "empty.json"), "holds no ParameterSharding"),
    (("--demo", "--set", "plan=none.json"), "plan: no file 'none.json'"),
    (("--demo", "--set", "plan=torn.json"), "torn.json: plan is not JSON"),
    (("--demo", "--set", "plan=torn.json", "--explain", "t_C3"), "--set plan= plans anew"),
    (("--demo", "--time-limit", "0"), "--time-limit"),
    ((), "give a job file, JOB.yaml, or --demo"),
])
def test_mistakes_are_messages(capsys, files, arguments, message):
    code, _, err = run(capsys, *arguments, *SMALL)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_a_plan_of_other_tables_is_refused_by_name(capsys, tmp_path):
    path = plan_file(tmp_path / "other.json", 2)
    code, _, err = run(capsys, "--demo", "--ranks", "3", "--compare", str(path))
    assert code == 2
    assert f"--compare {path}: " in err
    assert "plan is for 2 ranks, this job runs 3" in err
    assert "table 't_C1'" in err


def test_explaining_an_imported_plan_is_refused(capsys, tmp_path):
    path = torchrec_file(tmp_path / "torchrec.json")
    code, _, err = run(capsys, "--demo", "--ranks", "2", "--import-torchrec", str(path),
                       "--explain", "t_C3", *SMALL)
    assert code == 2
    assert "the plan is given, nothing was chosen" in err


def test_every_option_has_help():
    assert all(option.help for option in command.params if option.param_type_name == "option")
