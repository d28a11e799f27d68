"""``shardlab plan``: prints, writes a plan that train can read, and checks its arguments."""

from __future__ import annotations

import pytest

from shardlab.cli.main import main
from shardlab.config import load_job
from shardlab.plan import ShardingPlan

SMALL = ("--set", "tables.max_rows=1000")


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["plan", *arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_plan_shows_ranks_and_tables(capsys):
    code, out, _ = run(capsys, "--demo", "--ranks", "3", *SMALL)
    assert code == 0
    assert "3xcpu (this machine)" in out
    assert "t_C26" in out


def test_json_is_a_plan_that_fits_the_job(capsys, tmp_path):
    path = tmp_path / "plan.json"
    code, out, _ = run(capsys, "--demo", "--topology", "2x4xh100", "--json", str(path), *SMALL)
    assert code == 0
    assert out.endswith(f"plan written to {path}\n")
    found = ShardingPlan.from_json(path.read_text())
    found.check(load_job(None, [SMALL[1]]).table_configs(), 8)


def test_the_topology_of_the_job_is_used(capsys):
    code, out, _ = run(capsys, "--demo", "--set", "topology=4xa100-80gb", *SMALL)
    assert code == 0
    assert "4xa100-80gb" in out


@pytest.mark.parametrize(("arguments", "message"), [
    (("--topology", "8xh10"), "unknown topology '8xh10' (did you mean 'h100'?)"),
    (("--topology", "8xh100", "--ranks", "3"), "--ranks 3: topology 8xh100 has 8 ranks"),
    (("--set", "tables.embedding_dim=0"), "tables.embedding_dim: must be greater than 0"),
])
def test_mistakes_are_messages(capsys, arguments, message):
    code, _, err = run(capsys, "--demo", *arguments)
    assert code == 2
    assert message in err
