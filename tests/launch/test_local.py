"""Local ranks: started with torchrun's variables, and ended together whatever happens to one.

The ranks here import no torch, so that starting them costs little.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from shardlab.errors import LaunchError
from shardlab.launch import local
from shardlab.launch.local import rank_command, start_local_ranks

# What a rank does, by name; each is the body of a function in a process of its own.
BODIES = {
    "environment": """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
                 "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME")
        values = {name: os.environ.get(name) for name in names}
        (folder / os.environ["RANK"]).write_text(json.dumps(values))
    """,
    "user error": """
        if os.environ["RANK"] == "1":
            raise InputError("feature 'x' is unknown")
        time.sleep(60)
    """,
    "bug": """
        if os.environ["RANK"] == "0":
            raise KeyError("boom")
        time.sleep(60)
    """,
    # Rank 0 fails because rank 1 did, and both are seen to have failed at once.
    "consequence": """
        if os.environ["RANK"] == "1":
            raise InputError("the cause")
        while not list(folder.glob("cause")):
            time.sleep(0.01)
        raise RuntimeError("connection closed by peer")
    """,
    "killed": """
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    """,
    "silent": """
        if os.environ["RANK"] == "1":
            os._exit(7)
        time.sleep(60)
    """,
    "stopped": """
        return 128 + signal.SIGTERM
    """,
    "hang": """
        (folder / os.environ["RANK"]).write_text(str(os.getpid()))
        time.sleep(60)
    """,
}
_RANK = """
import json, os, signal, sys, time
from pathlib import Path
from shardlab.errors import InputError
from shardlab.launch.rank import guarded

folder = Path(sys.argv[1])

def work():
{body}
    return 0

guarded(work)
"""


def command(folder: Path, body: str) -> list[str]:
    """A rank's program; its folder is where ranks leave what a test looks at."""
    program = folder / "rank.py"
    lines = [line[4:] for line in BODIES[body].strip("\n").split("\n")]
    program.write_text(_RANK.format(body="\n".join(lines)))
    return [sys.executable, str(program), str(folder)]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].startswith(" Z")


def wait_until(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_ranks_get_their_place_and_their_share_of_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr("shardlab.launch.local.available_cores", lambda: 6)
    assert start_local_ranks(2, command(tmp_path, "environment")) == 0
    for rank in ("0", "1"):
        values = json.loads((tmp_path / rank).read_text())
        assert values == {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2",
                          "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                          "OMP_NUM_THREADS": "3", "GLOO_SOCKET_IFNAME": "lo"}
    assert "OMP_NUM_THREADS" not in os.environ


def test_what_the_user_set_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    start_local_ranks(1, command(tmp_path, "environment"))
    values = json.loads((tmp_path / "0").read_text())
    assert (values["OMP_NUM_THREADS"], values["GLOO_SOCKET_IFNAME"]) == ("5", "eth9")
    assert os.environ["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize(("body", "message"), [
    ("user error", r"^rank 1 failed: feature 'x' is unknown$"),
    ("bug", r"^rank 0 failed: Traceback[\s\S]*KeyError: 'boom'$"),
    ("killed", r"^rank 1 \(process \d+\) was killed by SIGKILL; the machine may be out of memory$"),
    ("silent", r"^rank 1 \(process \d+\) ended with exit code 7 and no message$"),
])
def test_first_failing_rank_is_named_and_all_end(tmp_path, capfd, body, message):
    start = time.monotonic()
    with pytest.raises(LaunchError, match=message):
        start_local_ranks(2, command(tmp_path, body))
    assert time.monotonic() - start < 30  # the other rank sleeps longer
    assert capfd.readouterr().err == ""


def test_ranks_that_noted_a_stop_signal_give_its_exit_code(tmp_path):
    assert start_local_ranks(2, command(tmp_path, "stopped")) == 143


def test_the_cause_is_named_not_its_consequence(tmp_path):
    program = command(tmp_path, "consequence")
    # The cause's report is there before the consequence's; its process ends after it.
    text = Path(program[1]).read_text().replace(
        "guarded(work)",
        "import shardlab.launch.rank as rank\n"
        "real = os._exit\n"
        "def slow_exit(code):\n"
        "    (folder / 'cause').write_text('')\n"
        "    time.sleep(1.0 if os.environ['RANK'] == '1' else 0.0)\n"
        "    real(code)\n"
        "rank.os._exit = slow_exit\n"
        "guarded(work)")
    Path(program[1]).write_text(text)
    with pytest.raises(LaunchError, match=r"^rank 1 failed: the cause$"):
        start_local_ranks(2, program)


_PARENT = """
import sys
from shardlab.launch.local import start_local_ranks
sys.exit(start_local_ranks(2, sys.argv[1:]))
"""


@pytest.mark.parametrize(("number", "code"), [
    (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL),
], ids=lambda value: value.name if isinstance(value, signal.Signals) else "")
def test_no_rank_outlives_its_parent(tmp_path, number, code):
    with subprocess.Popen([sys.executable, "-c", _PARENT, *command(tmp_path, "hang")],
                          stderr=subprocess.PIPE, text=True) as parent:
        files = [tmp_path / "0", tmp_path / "1"]
        wait_until(lambda: all(file.exists() and file.read_text() for file in files))
        pids = [int(file.read_text()) for file in files]
        parent.send_signal(number)
        _, err = parent.communicate(timeout=30)
    assert (parent.returncode, err) == (code, "")
    wait_until(lambda: not any(map(alive, pids)))


def failure(rank: int, code: int, timestamp: int) -> ProcessFailure:
    made = ProcessFailure(rank, 100 + rank, code, "")
    made.timestamp = timestamp
    return made


@pytest.mark.parametrize(("killed_at", "code", "message"), [
    (1030, 5, "rank 0 failed: no progress"),  # it stood still, and the agent killed it
    (1000, 137, r"rank 1 \(process 101\) was killed by SIGKILL; .* out of memory")])
def test_a_rank_that_the_agent_had_to_kill_is_not_the_cause(tmp_path, killed_at, code, message):
    extra = {"rank": "0", "time_ns": "1", "exit_code": "5"}
    report = {"message": "no progress", "extraInfo": extra}
    (tmp_path / "error.json").write_text(json.dumps({"message": report}))
    failures = {0: failure(0, 5, 1000), 1: failure(1, -signal.SIGKILL, killed_at)}
    found = local._first_failure(tmp_path, failures)
    assert found.exit_code == code
    assert re.match(message, str(found))


def test_rank_command_runs_this_interpreter():
    assert rank_command("train", "x") == [sys.executable, "-m", "shardlab.cli", "train", "x"]
