"""Jobs for Slurm: the batch script as text, its submission, and its output as it appears."""

from __future__ import annotations

import re
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shardlab.errors import REQUEUE, SIGNAL_EXIT, LaunchError

#: Seconds after the first rank's end in which the others end, or are ended.
_WAIT_S = 60
_POLL_S = 1.0
#: States of a job that will not run again, of `squeue`; none: it has left the queue.
_ENDED = frozenset({"", "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE",
                    "OUT_OF_MEMORY", "BOOT_FAIL"})
_SIGTERM_EXIT = SIGNAL_EXIT + 15


@dataclass(frozen=True)
class SlurmJob:
    """What is asked of Slurm.

    Attributes:
        name: of the job.
        command: what every rank runs.
        folder: for the script and the logs; all nodes see it.
        nodes: ``N``, or ``MIN-MAX`` where the job takes what it gets.
        ranks_per_node: tasks on each node.
        gpus_per_node: 0 for ranks on CPUs.
        cpus_per_task: cores of each rank; None: the cluster's default.
        time: limit, as sbatch takes it; None: the partition's.
        partition, account, qos: as sbatch takes them; None: the cluster's default.
        requeue: start again after preemption, the warning of the time limit, or a node's failure.
        warn_s: seconds before the time limit at which ranks get SIGUSR1.
        interface: network interface for NCCL and gloo; None: they choose.
        extra: further lines for sbatch, without ``#SBATCH``.
        setup: shell line that runs first on the batch node, such as one that loads modules.
    """

    name: str
    command: Sequence[str]
    folder: Path
    nodes: str
    ranks_per_node: int
    gpus_per_node: int = 0
    cpus_per_task: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    requeue: bool = False
    warn_s: int = 120
    interface: str | None = None
    extra: Sequence[str] = field(default=())
    setup: str | None = None

    def __post_init__(self) -> None:
        if re.fullmatch(r"[1-9]\d*(-[1-9]\d*)?", self.nodes) is None or \
                self.most_nodes < self.fewest_nodes:
            raise LaunchError(f"--nodes {self.nodes}: expected a number, or MIN-MAX such as 2-4")

    @property
    def fewest_nodes(self) -> int:
        """Nodes without which the job does not start."""
        return int(self.nodes.split("-")[0])

    @property
    def most_nodes(self) -> int:
        """Nodes that it takes where they are free."""
        return int(self.nodes.split("-")[-1])

    def log(self, job_id: str, rank: int | None = None) -> Path:
        """The log of the batch script, or of a rank."""
        part = "" if rank is None else f".rank-{rank}"
        return self.folder / f"slurm-{job_id}{part}.log"


def batch_script(job: SlurmJob) -> str:
    """The script for sbatch; everything it relies on stands in it."""
    options = [f"--job-name={job.name}", f"--nodes={job.nodes}",
               f"--ntasks-per-node={job.ranks_per_node}",
               f"--output={job.folder}/slurm-%j.log", "--open-mode=append",
               "--requeue" if job.requeue else "--no-requeue", f"--signal=USR1@{job.warn_s}"]
    for name, value in (("gpus-per-node", job.gpus_per_node or None),
                        ("cpus-per-task", job.cpus_per_task), ("time", job.time),
                        ("partition", job.partition), ("account", job.account), ("qos", job.qos)):
        if value is not None:
            options.append(f"--{name}={value}")
    options += job.extra
    lines = ["#!/usr/bin/env bash", *(f"#SBATCH {option}" for option in options), "",
             "# Written by shardlab launch slurm. Submit with sbatch; submitting it again resumes.",
             "set -uo pipefail", *([job.setup] if job.setup else []), "", *_environment(job), "",
             *_run(job), "", *_end(job)]
    return "\n".join(lines) + "\n"


def _environment(job: SlurmJob) -> list[str]:
    address = "sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p'"
    threads = "export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}"
    lines = ["# Rank 0 listens on the first node, at the address that Slurm has for it.",
             'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
             f'MASTER_ADDR=$(scontrol show node "$first" | {address})',
             "export MASTER_ADDR=${MASTER_ADDR:-$first}",
             "export PYTHONUNBUFFERED=1 TORCH_NCCL_ASYNC_ERROR_HANDLING=1", threads]
    if job.interface is not None:
        name = shlex.quote(job.interface)
        lines.append(f"export NCCL_SOCKET_IFNAME={name} GLOO_SOCKET_IFNAME={name}")
    if job.cpus_per_task is not None:
        lines.append("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK")
    return lines


def _run(job: SlurmJob) -> list[str]:
    logs = shlex.quote(f"{job.folder}/slurm-%j.rank-%t.log")
    return [
        "# Signals reach the ranks themselves, which save and end; this script waits for them.",
        "trap : TERM USR1",
        'echo "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST"',
        f"srun --kill-on-bad-exit=0 --wait={_WAIT_S} --open-mode=append --output={logs} \\",
        f"  {shlex.join(job.command)} &",
        "step=$!",
        'while kill -0 "$step" 2> /dev/null; do wait "$step"; code=$?; done',
        'wait "$step" 2> /dev/null; again=$?',
        '[ "$again" -eq 127 ] || code=$again',
        'echo "ranks ended with exit code $code"']


def _end(job: SlurmJob) -> list[str]:
    if not job.requeue:
        return ['exit "$code"']
    return [
        f"# {REQUEUE}: stopped by SIGUSR1 before the time limit; {_SIGTERM_EXIT}: preempted. Who "
        "cancelled the job",
        "# does not want it back: its state is then no longer RUNNING.",
        "state=$(squeue -h -j \"$SLURM_JOB_ID\" -o %T)",
        f'if [ "$code" -eq {REQUEUE} ] || [ "$code" -eq {_SIGTERM_EXIT} ] && '
        '[ "$state" = RUNNING ]; then',
        '  echo "requeued after a checkpoint"',
        '  scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        'exit "$code"']


def submit(job: SlurmJob) -> str:
    """Writes the script into the job's folder and hands it to sbatch; returns the job's number.

    Raises:
        LaunchError: sbatch is not there or refused; carries its message.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    path = job.folder / "job.sbatch"
    path.write_text(batch_script(job), encoding="utf-8")
    return _slurm("sbatch", "--parsable", str(path)).split(";")[0]


def follow(job: SlurmJob, job_id: str, say: Callable[[str], None]) -> int:
    """Shows the batch log and rank 0's log until the job has ended; returns its exit code.

    Args:
        job: what was submitted.
        job_id: its number.
        say: is given text as it appears.
    """
    logs = {job.log(job_id): 0, job.log(job_id, 0): 0}
    shown = ""
    while True:
        state = _state(job_id)
        for path, read in logs.items():
            logs[path] = read + _show_new(path, read, say)
        if state in _ENDED:
            return _exit_code(job, job_id)
        if state != shown:
            say(f"job {job_id}: {state}\n")
            shown = state
        time.sleep(_POLL_S)


def _show_new(path: Path, read: int, say: Callable[[str], None]) -> int:
    """Says what a file has beyond ``read`` bytes, in whole lines; returns their bytes."""
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        file.seek(read)
        data = file.read()
    whole = data[:data.rfind(b"\n") + 1]
    if whole:
        say(whole.decode(errors="replace"))
    return len(whole)


def _state(job_id: str) -> str:
    """A job's state; "" once Slurm has forgotten it; where Slurm does not answer, that."""
    done = subprocess.run(["squeue", "-h", "-j", job_id, "-t", "all", "-o", "%T"],
                          capture_output=True, text=True, check=False)
    if done.returncode and "Invalid job id" not in done.stderr:
        return f"state unknown, squeue failed: {done.stderr.strip()}"
    return done.stdout.strip()


def _exit_code(job: SlurmJob, job_id: str) -> int:
    """The ranks' exit code, which the batch log ends with, or 1 where it never said one."""
    path = job.log(job_id)
    text = path.read_text(errors="replace") if path.exists() else ""
    codes = re.findall(r"^ranks ended with exit code (\d+)$", text, re.MULTILINE)
    return int(codes[-1]) if codes else 1


def _slurm(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise LaunchError(f"{command[0]} is not installed here; run this on a login node of the "
                          "cluster, or use --dry-run to see the script") from None
    if done.returncode:
        raise LaunchError(f"{command[0]} refused: {done.stderr.strip()}")
    return done.stdout.strip()
