"""A Slurm cluster of two nodes on this machine, from Debian's slurm-wlm: brought up, taken down.

Two slurmd share the host under different names and ports. Needs root, munge and slurm-wlm; see
`missing`. As a program: ``python tests/slurm.py COMMAND ...`` runs a command inside a cluster.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
NODES = ("node1", "node2")
_KEY_BYTES = 128  # munge wants 32 to 1024
_START_S = 30.0
_CONF = """ClusterName=shardlab-test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobRequeue=1
KillWait=20
MinJobAge=600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=low Nodes=node1,node2 Default=YES MaxTime=60 PriorityTier=1 GraceTime=20 State=UP
PartitionName=high Nodes=node1,node2 MaxTime=60 PriorityTier=2 State=UP
"""


def missing() -> str | None:
    """Why no cluster can be made here; None: it can."""
    absent = [name for name in PROGRAMS if _program(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed (apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "needs root, as slurmd does"
    return None


@contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """Brings the cluster up; the variables that Slurm's commands need are the value.

    Raises:
        RuntimeError: it did not come up; carries the daemons' last lines.
    """
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        variables = _configure(folder)
        daemons.append(_start_munge(folder, variables))
        daemons.append(_start("slurmctld", "-D", "-c", environ=variables, folder=folder))
        for node in NODES:
            daemons.append(_start("slurmd", "-D", "-N", node, environ=variables, folder=folder))
        _wait_for_nodes(folder, variables, daemons)
        yield variables
    finally:
        _stop(folder, daemons)
        shutil.rmtree(folder, ignore_errors=True)


def _configure(folder: Path) -> dict[str, str]:
    host = socket.gethostname().split(".")[0]
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    config = folder / "slurm.conf"
    config.write_text(_CONF.format(folder=folder, host=host, ports=_free_ports(3)))
    return {**os.environ, "SLURM_CONF": str(config)}


def _start_munge(folder: Path, environ: dict[str, str]) -> subprocess.Popen[bytes]:
    key = folder / "munge.key"
    key.write_bytes(os.urandom(_KEY_BYTES))
    key.chmod(0o400)
    daemon = _start("munged", "--foreground", "--force", f"--key-file={key}",
                    f"--socket={folder}/munge.socket", f"--pid-file={folder}/munged.pid",
                    f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed",
                    environ=environ, folder=folder)
    end = time.monotonic() + _START_S
    while not (folder / "munge.socket").exists():
        if time.monotonic() > end or daemon.poll() is not None:
            raise RuntimeError(f"munged did not start:\n{_last_lines(folder)}")
        time.sleep(0.05)
    return daemon


def _wait_for_nodes(folder: Path, environ: dict[str, str],
                    daemons: list[subprocess.Popen[bytes]]) -> None:
    end = time.monotonic() + _START_S
    while True:
        states = subprocess.run(["sinfo", "-h", "-N", "-p", "low", "-o", "%t"], env=environ,
                                capture_output=True, text=True, check=False).stdout.split()
        if states == ["idle"] * len(NODES):
            return
        if time.monotonic() > end or any(daemon.poll() is not None for daemon in daemons):
            raise RuntimeError(f"nodes are {states}, expected idle:\n{_last_lines(folder)}")
        time.sleep(0.1)


def _stop(folder: Path, daemons: list[subprocess.Popen[bytes]]) -> None:
    """Ends steps, then the daemons, the last one first; nothing of the cluster is left."""
    config = str(folder / "slurm.conf")
    subprocess.run(["scancel", "--user=root", "--signal=KILL"], check=False, capture_output=True,
                   env={**os.environ, "SLURM_CONF": config})
    for daemon in reversed(daemons):
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(timeout=10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def _start(name: str, *arguments: str, environ: dict[str, str],
           folder: Path) -> subprocess.Popen[bytes]:
    program = _program(name)
    assert program is not None
    with open(folder / f"{name}.out", "ab") as out:
        return subprocess.Popen([program, *arguments], env=environ, stdout=out, stderr=out,
                                stdin=subprocess.DEVNULL, start_new_session=True)


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


def _last_lines(folder: Path) -> str:
    return "\n".join(f"{path.name}: {line}" for path in sorted(folder.glob("*.[lo][ou][gt]"))
                     for line in path.read_text(errors="replace").splitlines()[-5:])


def main(command: list[str]) -> int:
    """Runs a command inside a cluster; returns its exit code."""
    reason = missing()
    if reason is not None:
        print(f"no Slurm cluster: {reason}", file=sys.stderr)
        return 1
    with cluster() as environ:
        return subprocess.run(command, env=environ, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
