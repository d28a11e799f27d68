"""A Slurm cluster of two nodes on this machine, from Debian's slurm-wlm: brought up, taken down.

Two slurmd share the host under different names and ports. Needs root, munge and slurm-wlm; see
`missing`. As a program: ``python tests/slurm.py COMMAND ...`` runs a command inside a cluster.

A keeper, which is this file in a process of its own, starts the daemons and is the parent that
Linux gives to whatever they leave behind. Its input closes when whoever asked for the cluster is
done or is killed; it then kills all that descends from it, jobs included.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
NODES = ("node1", "node2")
_KEY_BYTES = 128  # munge wants 32 to 1024
_START_S = 60.0
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_UP = "up"
#: Below the ports that Linux gives to outgoing connections, above those of Slurm jobs' ranks.
_PORTS = range(32000, 32768)
_JOB_IDS = range(1000, 60000)  # two clusters on one machine: other jobs, so other ports for ranks
# A requeued job is held for cred_expire seconds, by default 120, in which nodes forget its first
# start. Started at once instead, it fails now and then: what the first start reports late is taken
# for the second's.
_CONF = """ClusterName=shardlab-test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
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
FirstJobId={first_job}
MessageTimeout=60
BatchStartTimeout=60
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobRequeue=1
KillWait=60
MinJobAge=600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=low Nodes=node1,node2 Default=YES MaxTime=60 PriorityTier=1 GraceTime=300 State=UP
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
    with subprocess.Popen([sys.executable, __file__, "--keep", str(folder)], text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          start_new_session=True) as keeper:
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        try:
            said = keeper.stdout.readline().strip()
            if said != _UP:
                raise RuntimeError("\n".join([said, keeper.stdout.read()]))
            yield _variables(folder)
        finally:
            keeper.stdin.close()


def _keep(folder: Path) -> None:
    """What the keeper does, from the start of the first daemon to the end of the last process."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    folder.chmod(0o755)
    try:
        try:
            _bring_up(folder)
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            print(error, flush=True)
        else:
            print(_UP, flush=True)
            sys.stdin.read()
    finally:
        _kill_descendants()
        shutil.rmtree(folder, ignore_errors=True)


def _bring_up(folder: Path) -> None:
    _configure(folder)
    variables = _variables(folder)
    daemons = [_start_munge(folder, variables),
               _start("slurmctld", "-D", "-c", environ=variables, folder=folder)]
    daemons += [_start("slurmd", "-D", "-N", node, environ=variables, folder=folder)
                for node in NODES]
    _wait_for_nodes(folder, variables, daemons)


def _variables(folder: Path) -> dict[str, str]:
    return {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}


def _configure(folder: Path) -> None:
    host = socket.gethostname().split(".")[0]
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(_CONF.format(
        folder=folder, host=host, ports=_free_ports(3), first_job=random.choice(_JOB_IDS)))


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


def _kill_descendants() -> None:
    """Kills all that this process started, and what that started, until nothing is left."""
    while True:
        for process in _descendants(os.getpid()):
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(process, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.01)


def _descendants(ancestor: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [ancestor]
    for process in found:  # grows while it is read
        found += children.get(process, [])
    return found[1:]


def _start(name: str, *arguments: str, environ: dict[str, str],
           folder: Path) -> subprocess.Popen[bytes]:
    program = _program(name)
    assert program is not None
    with open(folder / f"{name}.out", "ab") as out:
        return subprocess.Popen([program, *arguments], env=environ, stdout=out, stderr=out,
                                stdin=subprocess.DEVNULL)


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        with suppress(OSError):  # taken
            socket.create_server(("127.0.0.1", port)).close()
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"{len(found)} of ports {_PORTS.start} to {_PORTS.stop - 1} are free, "
                       f"a cluster needs {count}")


def _last_lines(folder: Path) -> str:
    return "\n".join(f"{path.name}: {line}" for path in sorted(folder.glob("*.[lo][ou][gt]"))
                     for line in path.read_text(errors="replace").splitlines()[-5:])


def main(command: list[str]) -> int:
    """Runs a command inside a cluster; returns its exit code."""
    if command[:1] == ["--keep"]:
        _keep(Path(command[1]))
        return 0
    reason = missing()
    if reason is not None:
        print(f"no Slurm cluster: {reason}", file=sys.stderr)
        return 1
    with cluster() as environ:
        return subprocess.run(command, env=environ, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
