"""Every way a local job can end, several times each: its exit code, and that nothing hangs.

    python benchmarks/fault_paths.py --runs 50

A run is two ranks of a small job under ``shardlab launch local``. At a random moment of training
one thing happens to it. It must then end within `LIMIT_S` with the documented exit code, and no
rank may be left.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

#: From the moment something happens to the end of the last process.
LIMIT_S = 60.0
START_S = 240.0
STALL_S = 6
SMALL = ("tables={preset: criteo_kaggle, embedding_dim: 4, max_rows: 500}", "batch_size=16",
         "model={kind: dlrm, bottom_mlp: [16], top_mlp: [16]}", "train.log_every=5",
         "train.checkpoint_every=20", f"train.stall_timeout_s={STALL_S}")
#: A machine that the job's 500 GiB fit, unlike the one that it runs on.
LARGE = "large.yaml"
_LARGE_TEXT = "profile: 2xh100\nhbm_bytes: 1000000000000\n"
ENDLESS = ("data.train_rows=[0, 3200000]",)
SHORT = ("data.train_rows=[0, 16000]",)


@dataclass(frozen=True)
class Ending:
    """One way to end.

    Attributes:
        name: in the report.
        code: exit code that is documented for it.
        act: what happens, given the launcher and its ranks; None: nothing, the job ends itself.
        sets: overrides of the job.
        options: of ``shardlab launch local``.
    """

    name: str
    code: int
    act: Callable[[subprocess.Popen[str], list[int]], None] | None
    sets: tuple[str, ...] = ENDLESS
    options: tuple[str, ...] = field(default=("--restarts", "0"))


def to_launcher(number: int) -> Callable[[subprocess.Popen[str], list[int]], None]:
    """Sends a signal to the launcher, as Slurm, a shell or a person would."""
    return lambda launcher, _: launcher.send_signal(number)


def to_rank(number: int) -> Callable[[subprocess.Popen[str], list[int]], None]:
    """Sends a signal to one rank."""
    def act(_: subprocess.Popen[str], ranks: list[int]) -> None:
        os.kill(random.choice(ranks), number)
    return act


PATHS = (
    Ending("SIGTERM", 143, to_launcher(signal.SIGTERM)),
    Ending("SIGINT", 130, to_launcher(signal.SIGINT)),
    Ending("SIGUSR1", 75, to_launcher(signal.SIGUSR1)),
    Ending("a rank is killed", 137, to_rank(signal.SIGKILL)),
    Ending("a rank is killed, started again", 0, to_rank(signal.SIGKILL), SHORT,
          ("--restarts", "1")),
    Ending("a rank is killed, one goes on", 0, to_rank(signal.SIGKILL), SHORT,
          ("--restarts", "1", "--min-ranks", "1")),
    Ending("a rank stands still", 5, to_rank(signal.SIGSTOP)),
    Ending("the loss is not finite", 4, None,
          (*ENDLESS, "optimizer.dense.lr=1e30", "optimizer.sparse.lr=1e30")),
    Ending("memory is too small", 3, None,
          (*ENDLESS, "tables.max_rows=100000000", "tables.embedding_dim=4096",
           f"topology={LARGE}")),
    Ending("no such checkpoint", 2, None, (*ENDLESS, "train.resume=absent")),
)


def ranks_of(launcher: int) -> list[int]:
    """Processes that the launcher started and that run the job."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == launcher and b"shardlab.cli\0train" in \
                    (stat.parent / "cmdline").read_bytes():
                found.append(int(stat.parent.name))
        except OSError:  # it has just ended
            continue
    return found


def runs(process: int) -> bool:
    """Whether a process is there and more than an exit code that nobody has asked for yet."""
    try:
        stat = (Path("/proc") / str(process) / "stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def run(path: Ending, job: Path, folder: Path) -> tuple[int, float]:
    """Runs a job until something happens to it; returns its exit code and the seconds it took."""
    sets = (*SMALL, f"train.run_dir={folder / 'run'}", *path.sets)
    command = [sys.executable, "-m", "shardlab.cli", "launch", "local", str(job), "--ranks", "2",
               *path.options, *(word for entry in sets for word in ("--set", entry))]
    with open(folder / "log", "w") as log, \
            subprocess.Popen(command, stdout=log, stderr=log, text=True,
                             cwd=folder) as launcher:
        try:
            return _until_end(path, launcher, folder)
        finally:
            launcher.kill()


def _until_end(path: Ending, launcher: subprocess.Popen[str],
               folder: Path) -> tuple[int, float]:
    begin = time.monotonic()
    if path.act is None:
        return launcher.wait(START_S), time.monotonic() - begin
    while not list((folder / "run" / "checkpoints").glob("step-*/manifest.json")):
        if time.monotonic() - begin > START_S or launcher.poll() is not None:
            raise RuntimeError(f"{path.name}: did not begin:\n{(folder / 'log').read_text()}")
        time.sleep(0.02)
    time.sleep(random.random())
    ranks = ranks_of(launcher.pid)
    begin = time.monotonic()
    path.act(launcher, ranks)
    limit = START_S if path.sets is SHORT else LIMIT_S
    code = launcher.wait(limit)
    seconds = time.monotonic() - begin
    left = [rank for rank in ranks if runs(rank)]
    if left:
        raise RuntimeError(f"{path.name}: ranks {left} are left")
    return code, seconds


def main() -> int:
    """Runs all paths in turn; returns 1 when one ended otherwise than documented."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    seconds: dict[str, list[float]] = {path.name: [] for path in PATHS}
    wrong = 0
    with tempfile.TemporaryDirectory() as top:
        job = Path(top) / "job.yaml"
        job.write_text("tables: {preset: criteo_kaggle}\n")
        for number in range(options.runs):
            path = PATHS[number % len(PATHS)]
            folder = Path(top) / str(number)
            folder.mkdir()
            (folder / LARGE).write_text(_LARGE_TEXT)
            try:
                code, took = run(path, job, folder)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                code, took = -1, LIMIT_S
                print(error, flush=True)
            seconds[path.name].append(took)
            if code != path.code:
                wrong += 1
                print(f"{path.name}: exit code {code}, expected {path.code}\n"
                      f"{(folder / 'log').read_text()[-2000:]}", flush=True)
            shutil.rmtree(folder)
    print("| what happens | exit code | runs | median s | longest s |\n|---|---|---|---|---|")
    for path in PATHS:
        took = seconds[path.name]
        if took:
            print(f"| {path.name} | {path.code} | {len(took)} | {statistics.median(took):.1f} | "
                  f"{max(took):.1f} |")
    print(f"{options.runs} runs, {wrong} not as documented")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
