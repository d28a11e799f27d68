"""Every example script runs as its docstring says, and shows what it claims."""

from __future__ import annotations

import ast
import json
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from shardlab import comm
from shardlab.comm import Groups
from shardlab.planner.torchrec_plan import import_plan
from shardlab.specs import EmbeddingBagConfig
from tests.harness import run_ranks

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))
#: Scripts with a test on several ranks below.
ON_RANKS = {"checkpoint_resharding", "prefetching", "replicas", "row_wise_torchrun",
            "torchrec_user", "two_stages"}


def run_example(name: str) -> None:
    """Runs a script in this process, where torch is imported already."""
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def run_example_on_rank(groups: Groups, name: str) -> str:
    """Runs a script on a rank of the pool, to whom the process group belongs; its output."""
    before, comm.shutdown = comm.shutdown, lambda: None
    try:
        with redirect_stdout(StringIO()) as out:
            run_example(name)
    finally:
        comm.shutdown = before
    return out.getvalue()


def numbers(pattern: str, text: str) -> list[float]:
    found = re.findall(pattern, text)
    assert found, f"{pattern!r} is not in:\n{text}"
    return [float(number.replace(",", "")) for number in found]


def check_quickstart(out: str) -> None:
    assert numbers(r"loss ([\d.]+)", out)[0] < 0.56


def check_torchrec_user(out: str) -> None:
    first, last = re.search(r"loss ([\d.]+) -> ([\d.]+)", out).groups()
    assert float(last) < float(first) - 0.05
    assert "feature 'user', table 't_user', rank 0, row 0 of the batch: id 400 is outside" in out


def check_custom_model(out: str) -> None:
    assert "collections: users.tables, items.tables" in out
    assert numbers(r"right group ([\d.]+)%", out)[-1] > 90


def check_lr_schedule(out: str) -> None:
    rates = re.findall(r"lr of tables, dense: ([\d.]+), ([\d.]+)", out)
    assert rates[0] == ("0.1000", "0.0200")
    assert rates[-1] == ("0.0010", "0.0010")


def check_checkpoint_resharding(out: str) -> None:
    assert "saved ['rank 0: 20000 x 16']" in out
    assert numbers(r"differ by at most ([\d.e+-]+)", out)[0] == 0  # one rank: the same arithmetic


def check_row_wise_torchrun(out: str) -> None:
    assert numbers(r"row_wise +rows +(\d+)", out) == [0]  # a world of one sends nothing


def check_prefetching(out: str) -> None:
    assert "ahead: logits differ by at most 0.00e+00, nothing travels" in out


def check_two_stages(out: str) -> None:
    assert "two stages need several hosts with several ranks each: all 1 ranks are on one" in out


def check_replicas(out: str) -> None:
    assert "every step: logits differ by at most 0.0e+00; rank 0 sent 0 bytes" in out


def check_torchrec_plan_to_json(out: str) -> None:
    tables = [EmbeddingBagConfig(1000, 16, "t_user"), EmbeddingBagConfig(4000, 16, "t_item")]
    plan = import_plan(json.loads(out), tables, 2)
    assert [len(entry.shards) for entry in plan.tables] == [2, 1]


def check_serve_a_checkpoint(out: str) -> None:
    assert numbers(r"20 steps is (\d+)% of a full", out)[0] < 50
    assert 0 < numbers(r"C3: ([\d,]+) of 20,000", out)[0] < 20_000
    assert numbers(r"int8 rows differ by at most ([\d.e+-]+)", out)[0] < 5e-3


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items())
          if name.startswith("check_")}


def test_every_example_is_checked():
    assert set(SCRIPTS) == set(CHECKS)


def test_every_torchrun_example_runs_on_ranks():
    """Every script whose docstring shows torchrun is started on ranks by a test below."""
    docs = {name: ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text()))
            for name in SCRIPTS}
    assert {name for name, text in docs.items() if "torchrun --nproc" in text} == ON_RANKS


@pytest.mark.parametrize("name", SCRIPTS)
def test_example_runs_alone(name, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run_example(name)
    CHECKS[name](capsys.readouterr().out)
    assert not list(tmp_path.iterdir())


def test_port_from_torchrec_runs_on_two_ranks():
    out, other = run_ranks(2, run_example_on_rank, "torchrec_user")
    check_torchrec_user(out)
    assert "on 2 rank(s)" in out
    assert not other


def test_checkpoint_changes_its_plan_on_two_ranks():
    out, other = run_ranks(2, run_example_on_rank, "checkpoint_resharding")
    assert "saved ['rank 0: 10000 x 16', 'rank 1: 10000 x 16']" in out
    assert "loaded ['rank 0: 20000 x 8', 'rank 1: 20000 x 8']" in out
    # Squares are summed column block by column block: another order, the same within rounding.
    assert numbers(r"differ by at most ([\d.e+-]+)", out)[0] < 1e-5
    assert not other


def test_looking_ahead_changes_no_bit_on_two_ranks():
    out, other = run_ranks(2, run_example_on_rank, "prefetching")
    assert "ahead: logits differ by at most 0.00e+00, " in out
    stale, = numbers(r"stale: logits differ by at most ([\d.e+-]+)", out)
    assert 0 < stale < 1
    assert "over shared memory: all ranks are on one host" in out
    assert not other


def test_two_stages_send_less_across_hosts():
    out, *others = run_ranks(4, run_example_on_rank, "two_stages")
    assert numbers(r"logits differ by at most ([\d.e+-]+)", out)[0] < 1e-4
    flat, staged = re.search(r"sent ([\d,]+) B across hosts flat, ([\d,]+) B in two", out).groups()
    assert int(staged.replace(",", "")) < 0.9 * int(flat.replace(",", ""))
    assert "over two stages, shared memory inside 2 hosts of 2 ranks" in out
    assert not any(others)


def test_groups_train_as_one_where_they_merge_every_step_on_two_ranks():
    out, other = run_ranks(2, run_example_on_rank, "replicas")
    one, merged, averaged = numbers(r"differ by at most ([\d.e+-]+)", out)
    assert one == 0 <= merged < 1e-5 < averaged < 1
    between = numbers(r"([\d,]+) between groups", out)
    assert between[0] == 0 < between[2] < between[1]
    assert not other


def test_torchrun_example_counts_the_wire(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         str(EXAMPLES / "row_wise_torchrun.py")],
        check=True, timeout=180, cwd=tmp_path, capture_output=True, text=True)
    sent = {(kind, exchange): tuple(float(part.replace(",", "")) for part in parts)
            for kind, exchange, *parts in re.findall(
                r"^(\w+) +(rows|pooled) +([\d,]+) +([\d,]+) +([\d,]+)$", done.stdout, re.MULTILINE)}
    assert len(sent) == 5, done.stdout
    ids, rows, gradients = range(3)
    unique, pooled = sent["row_wise", "rows"], sent["row_wise", "pooled"]
    assert 0 < unique[rows] == unique[gradients] < 0.3 * pooled[rows]
    assert sent["column_wise", "rows"][ids] > sent["table_wise", "rows"][ids]
    # Two ranks' bags of 26 features from each of two row blocks: half of them lie at home.
    assert pooled[rows] == 2 * 512 * 26 * 16 * 4 / 1024
    assert sent["data_parallel", "rows"][rows] == 0 < sent["data_parallel", "rows"][gradients]
