"""Starts the ranks of a job on this machine through torchrun's machinery, and ends them together.

The first failing rank ends the job: its message is what the user sees, the others are stopped.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shardlab.errors import REQUEUE, SIGNAL_EXIT, LaunchError
from shardlab.launch.environment import available_cores
from shardlab.launch.rank import LOCAL_RANK_MARK

#: Only this host: no name look-up, no firewall, no network card.
_LOOPBACK = "127.0.0.1"
#: Signals that torchrun's agent passes on; by itself it would die of SIGUSR1.
_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
#: Exit codes of ranks that a signal stopped in order.
_STOPPED = {SIGNAL_EXIT + signal.SIGINT, SIGNAL_EXIT + signal.SIGTERM, REQUEUE}
#: The agent kills ranks that outlive the first failure by 30 s; timestamps are whole seconds.
_AGENT_KILLS_AFTER_S = 28


def start_local_ranks(ranks: int, command: Sequence[str]) -> int:
    """Runs ``command`` once per rank, with torchrun's variables, and waits for all to end.

    However it ends, no rank is left.

    Args:
        ranks: processes to start.
        command: program and arguments; the program reports failures by `rank.guarded`.

    Returns:
        0, or 128 + the signal that stopped the job (75 for SIGUSR1): this process passes SIGINT,
        SIGTERM and SIGUSR1 on to the ranks, which end in order.

    Raises:
        LaunchError: a rank failed; carries the first failing rank's message.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="shardlab-") as folder, _variables(ranks), _quiet():
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=ranks, run_id=uuid.uuid4().hex,
            rdzv_backend="c10d", rdzv_endpoint=f"{_LOOPBACK}:0", local_addr=_LOOPBACK,
            max_restarts=0, logs_specs=DefaultLogsSpecs(log_dir=folder),
            signals_to_handle=_SIGNALS)
        try:
            elastic_launch(config, command[0])(*command[1:])
        except ChildFailedError as error:
            # The first rank that ends makes the agent send SIGTERM to one that is about to.
            codes = {failure.exitcode for failure in error.failures.values()} - {-signal.SIGTERM}
            if codes and codes <= _STOPPED:  # they noted the signal, and ended in order
                return int(max(codes))
            raise _first_failure(Path(folder), error.failures) from None
        except SignalException as error:
            number = int(error.sigval)
            return REQUEUE if number == signal.SIGUSR1 else SIGNAL_EXIT + number
    return 0


@contextmanager
def _variables(ranks: int) -> Iterator[None]:
    """Sets what the ranks inherit, and puts the former values back."""
    wanted = {LOCAL_RANK_MARK: "1"}
    if "OMP_NUM_THREADS" not in os.environ:
        wanted["OMP_NUM_THREADS"] = str(max(1, available_cores() // ranks))
    if "GLOO_SOCKET_IFNAME" not in os.environ and \
            "lo" in (name for _, name in socket.if_nameindex()):
        wanted["GLOO_SOCKET_IFNAME"] = "lo"
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the agent: it says in thirty lines what the LaunchError says in one."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _first_failure(folder: Path, failures: dict[int, Any]) -> LaunchError:
    """The cause, among ranks that failed within the same moment.

    A rank that died without reporting an exception did not die of another rank's failure (unless
    by the signals that stop the others); else the earliest exception is the cause. The agent's
    own timestamps count whole seconds, too coarse for that.
    """
    begin = min(failure.timestamp for failure in failures.values())
    reports = [json.loads(file.read_text())["message"] for file in folder.glob("**/error.json")]
    reported = {report["extraInfo"]["rank"] for report in reports}
    silent = {rank: failure for rank, failure in failures.items()
              if str(rank) not in reported and not _ended_by_agent(failure, begin)}
    if silent or not reports:
        rank, failure = next(iter((silent or failures).items()))
        if failure.exitcode >= 0:
            return LaunchError(f"rank {rank} (process {failure.pid}) ended with exit code "
                               f"{failure.exitcode} and no message", failure.exitcode)
        hint = "; the machine may be out of memory" if failure.exitcode == -signal.SIGKILL else ""
        return LaunchError(f"rank {rank} (process {failure.pid}) was killed by "
                           f"{failure.signal_name()}{hint}", SIGNAL_EXIT - failure.exitcode)
    first = min(reports, key=lambda report: int(report["extraInfo"]["time_ns"]))
    rank = first["extraInfo"]["rank"]
    return LaunchError(f"rank {rank} failed: {first['message'].rstrip()}",
                       int(first["extraInfo"]["exit_code"]))


def _ended_by_agent(failure: Any, begin: int) -> bool:
    """Whether the agent stopped a rank after the first failure, which was at ``begin``."""
    code, after_s = int(failure.exitcode), int(failure.timestamp) - begin
    return code == -signal.SIGTERM or (code == -signal.SIGKILL and after_s >= _AGENT_KILLS_AFTER_S)


def rank_command(*arguments: str) -> list[str]:
    """The command that runs ``shardlab`` with these arguments in this interpreter."""
    return [sys.executable, "-m", "shardlab.cli", *arguments]
