"""Local ranks that are started again when one is lost, on fewer ranks where that is allowed."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from shardlab.errors import REQUEUE, SIGNAL_EXIT, STALLED, LaunchError
from shardlab.launch.local import rank_command, start_local_ranks

if TYPE_CHECKING:
    from shardlab.config import JobConfig

#: A rank was lost, not wrong: it was killed, or crashed in machine code, or hung.
LOST = frozenset({SIGNAL_EXIT + number for number in (
    signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT)} | {STALLED})


def supervise(job: JobConfig, min_ranks: int, restarts: int, say: Callable[[str], None]) -> int:
    """Runs a job on local ranks; a lost rank is survived by going on from the last checkpoint.

    Args:
        job: the job; its run folder must be named where it is to be survived.
        min_ranks: one rank fewer is started after each loss, of replica groups one of each, but
            never fewer than these.
        restarts: losses that are survived.
        say: is told of each.

    Returns:
        0, or the code of the signal that stopped the job.

    Raises:
        LaunchError: a rank failed of what would fail again, or too many were lost.
    """
    if restarts and job.train.run_dir is None:
        raise LaunchError("train.run_dir: absent; ranks that are started again must find their "
                          "checkpoints (--set train.run_dir=PATH, or --restarts 0)")
    ranks = job.ranks
    with tempfile.TemporaryDirectory(prefix="shardlab-job-") as folder:
        resolved = Path(folder) / "job.yaml"
        resolved.write_text(job.resolved_yaml(), encoding="utf-8")
        elastic = ["--set", "train.elastic=true"] if min_ranks < ranks else []
        for left in range(restarts, -1, -1):
            command = rank_command("train", str(resolved), *elastic, "--ranks", str(ranks))
            try:
                code = start_local_ranks(ranks, command)
            except LaunchError as error:
                if error.exit_code not in LOST or not left:
                    raise
                ranks = _fewer(ranks, min_ranks, job.parallel.replicas)
                say(f"{error}; goes on with {ranks} ranks from the last checkpoint, "
                    f"{left - 1} restarts left")
            else:
                if code:
                    number = signal.SIGUSR1 if code == REQUEUE else \
                        signal.Signals(code - SIGNAL_EXIT)
                    say(f"stopped by {number.name}")
                return code
    raise AssertionError("the last start returns or raises")


def _fewer(ranks: int, least: int, replicas: int) -> int:
    """The next lower number of ranks that divides into the replica groups; at least ``least``."""
    fewer = (ranks - 1) // replicas * replicas
    return fewer if fewer >= max(least, replicas) else ranks
