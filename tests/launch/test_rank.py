"""What a rank reports when it fails, in processes of its own: it ends at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

_PROGRAM = """
import sys
from shardlab.errors import InputError
from shardlab.launch.rank import guarded

def work():
    print("begun")
    {body}
    return 0

guarded(work)
"""


def run(body: str, tmp_path, **environ: str | None) -> subprocess.CompletedProcess[str]:
    """Runs a rank that does ``body``; a variable that is None is not set."""
    variables = {**os.environ, "RANK": "3", "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json"),
                 **environ}
    return subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(body=body)], capture_output=True, text=True,
        timeout=60, check=False,
        env={name: value for name, value in variables.items() if value is not None})


def test_success_returns_the_exit_code(tmp_path):
    assert run("return 7", tmp_path).returncode == 7
    assert not (tmp_path / "error.json").exists()


def test_user_error_is_one_message_with_exit_code_2(tmp_path):
    done = run("raise InputError('no feature x\\nnor y')", tmp_path)
    assert (done.returncode, done.stdout) == (2, "begun\n")
    assert done.stderr == "rank 3: error: no feature x\nrank 3: nor y\n"
    report = json.loads((tmp_path / "error.json").read_text())["message"]
    assert report["message"] == "no feature x\nnor y"
    assert report["extraInfo"]["rank"] == "3"


def test_bug_is_a_traceback_with_exit_code_1(tmp_path):
    done = run("raise KeyError('boom')", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("rank 3: Traceback")
    assert done.stderr.endswith("rank 3: KeyError: 'boom'\n")
    report = json.loads((tmp_path / "error.json").read_text())["message"]
    assert report["message"].rstrip().endswith("KeyError: 'boom'")


def test_local_rank_leaves_printing_to_its_parent(tmp_path):
    done = run("raise InputError('no feature x')", tmp_path, SHARDLAB_LOCAL_RANK="1")
    assert (done.returncode, done.stderr) == (2, "")


def test_torchrun_can_read_the_report(tmp_path):
    run("raise InputError('no feature x')", tmp_path)
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2,
                             error_file=str(tmp_path / "error.json"))
    assert failure.message["message"] == "no feature x"


def test_without_an_error_file_the_message_is_printed(tmp_path):
    done = run("raise InputError('no feature x')", tmp_path, TORCHELASTIC_ERROR_FILE=None)
    assert (done.returncode, done.stderr) == (2, "rank 3: error: no feature x\n")
    assert not (tmp_path / "error.json").exists()


def test_threads_that_go_on_do_not_disturb_the_end(tmp_path):
    body = """
    import threading, torch
    def go_on():
        while True:
            torch.ones(100_000).sum()
    threading.Thread(target=go_on, daemon=True).start()"""
    done = run(body, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "begun\n", "")
