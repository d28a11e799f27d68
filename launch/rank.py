"""What a rank does beside its work: it ends with its launcher and reports why it failed."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from shardlab.errors import FAILURE, ShardLabError

#: Set for ranks that `local.start_local_ranks` started: that parent prints the failure.
LOCAL_RANK_MARK = "SHARDLAB_LOCAL_RANK"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def guarded(work: Callable[[], int]) -> NoReturn:
    """Runs ``work`` in a rank that torchrun, srun or the local launcher started, and ends it.

    A rank ends at once, without the interpreter's clean-up. Where it failed, that could wait
    forever for ranks that wait for this one, and its exception goes to torchrun's error file.
    Where it did not, a daemon thread that is inside torch when the interpreter ends can abort the
    process ("terminate called without an active exception", exit code 134): two threads that
    multiply matrices did so in 8 of 8 runs.

    Args:
        work: what the rank does; returns the exit code. It closes what it opened.
    """
    local = os.environ.get(LOCAL_RANK_MARK) == "1"
    if local:
        _end_with_parent()
    try:
        code = work()
    except Exception as error:
        end_rank(error)
    _end(code)


def end_rank(error: Exception) -> NoReturn:
    """Ends this process with the code of an error, once it is printed and reported."""
    report_failure(error)
    _end(error.exit_code if isinstance(error, ShardLabError) else FAILURE)


def _end(code: int) -> NoReturn:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_with_parent() -> None:
    """Ctrl-C ends this process at once; so does the death of the launcher (Linux)."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel was asked
        os._exit(FAILURE)


def report_failure(error: Exception) -> None:
    """Prints why this rank fails, unless its launcher does, and writes torchrun's error file.

    That file keeps whole seconds only, so a finer time goes beside.
    """
    if os.environ.get(LOCAL_RANK_MARK) != "1":
        _print(error)
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    text = "".join(traceback.format_exception(error))
    now = time.time_ns()
    message = str(error) if isinstance(error, ShardLabError) else text
    extra = {"py_callstack": text, "timestamp": str(now // 1_000_000_000), "time_ns": str(now),
             "rank": os.environ.get("RANK", "?"),
             "exit_code": str(getattr(error, "exit_code", FAILURE))}
    Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))


def _print(error: Exception) -> None:
    text = f"error: {error}" if isinstance(error, ShardLabError) \
        else "".join(traceback.format_exception(error)).rstrip()
    lines = "\n".join(f"rank {os.environ.get('RANK', '?')}: {line}" for line in text.split("\n"))
    print(lines, file=sys.stderr)
