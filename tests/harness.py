"""Runs a function on several ranks; one pool of processes serves the whole test session.

    results = run_ranks(2, train_two_steps, plan)       # [rank 0's value, rank 1's value]

The parent talks to each worker over its own pipe. A call makes a fresh gloo process group and
destroys it afterwards (about 0.05 s), so nothing a test leaves behind reaches the next one.
Importing torch is what costs, and that happens once: workers are forked by a process that has
imported it, the first ones as those that follow workers which a test killed.
"""

from __future__ import annotations

import importlib.util
import io
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

MAX_RANKS = 4
#: Seconds for a worker to import torch on a busy machine.
START_TIMEOUT_S = 120.0
#: Seconds that the other ranks get to notice that one of them has failed.
GRACE_S = 5.0
#: Beyond every test's own timeout: the parent decides when to give up.
_GROUP_TIMEOUT_S = 600.0
#: What a worker sends when it is ready for calls, and when its rank of a call has joined.
_JOINED = b"joined"
_ROOT = Path(__file__).resolve().parent.parent
#: What ranks import sooner or later; torch's optimisers import its compiler.
_PRELOADED = ("torch._dynamo", "shardlab.sharded", "shardlab.train")


class RankError(AssertionError):
    """A rank failed, died or did not answer; the message names it and carries its traceback."""


@dataclass(frozen=True)
class _Call:
    """What a worker needs to run one function; the function travels by file and name."""

    module: str
    file: str
    qualname: str
    arguments: bytes
    rank: int
    world_size: int
    store: str


@dataclass(frozen=True)
class _Answer:
    """What a worker sends back: a pickled value, or the traceback of its failure."""

    value: bytes = b""
    error: str = ""
    failed_at: float = 0.0


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any,
              timeout: float = 60.0) -> list[Any]:
    """Runs ``fn(groups, *args)`` on every rank of a fresh world and returns the ranks' values.

    Args:
        world_size: ranks, 1 to `MAX_RANKS`. A world of 1 has no process group.
        fn: a module-level function; its first argument is this rank's ``shardlab.comm.Groups``.
        *args: picklable; every rank gets its own copy.
        timeout: seconds for all ranks together, from when they have joined.

    Returns:
        One value per rank, in rank order.

    Raises:
        RankError: the first rank that failed, or those that died or did not answer in time.
    """
    __tracebackhide__ = True  # a failure shows the rank's traceback, not the pool's
    if not 1 <= world_size <= MAX_RANKS:
        raise ValueError(f"run_ranks: world_size {world_size} is not in 1..{MAX_RANKS}")
    if "<" in fn.__qualname__:
        raise ValueError(f"run_ranks: {fn.__qualname__} must be a module-level function, so "
                         "that another process can find it")
    return _pool.run(world_size, fn, args, timeout)


def shutdown_ranks() -> None:
    """Stops the pool; a later `run_ranks` starts it again."""
    _pool.stop()


def start_processes(processes: Sequence[BaseProcess]) -> None:
    """Starts processes of `rank_context`, each with one thread, on this host alone."""
    with _environment(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME=_loopback()):
        for process in processes:
            process.start()


def rank_context() -> BaseContext:
    """Makes processes that have imported torch already; with CUDA, which a fork would break, ones
    that import it each."""
    import torch

    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    return context


class _Pool:
    """Up to `MAX_RANKS` idle workers, started when first needed."""

    def __init__(self) -> None:
        self.workers: list[tuple[Any, Connection]] = []
        self.folder = ""
        self.calls = 0

    def run(self, world_size: int, fn: Callable[..., Any], args: tuple[Any, ...],
            timeout: float) -> list[Any]:
        __tracebackhide__ = True
        self._start(world_size)
        self.calls += 1
        file = sys.modules[fn.__module__].__file__
        for rank, (_, pipe) in enumerate(self.workers[:world_size]):
            call = _Call(fn.__module__, str(file), fn.__qualname__, _dumps(args), rank,
                         world_size, os.path.join(self.folder, f"store{self.calls}"))
            pipe.send_bytes(pickle.dumps(call))
        answers = self._collect(world_size, timeout)
        failed = {rank: answer for rank, answer in answers.items() if answer.error}
        silent = [rank for rank in range(world_size) if rank not in answers]
        dead = {rank: self.workers[rank][0].exitcode for rank in silent
                if not self.workers[rank][0].is_alive()}
        if silent:
            self.stop()
        if failed or silent:
            raise RankError(_describe(fn.__qualname__, failed, silent, dead, timeout))
        return [_loads(answers[rank].value) for rank in range(world_size)]

    def _collect(self, world_size: int, timeout: float) -> dict[int, _Answer]:
        """Answers by rank. The time counts from when all ranks have joined; a first failure
        leaves the others `GRACE_S`."""
        answers: dict[int, _Answer] = {}
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self.workers[:world_size])}
        deadline, joined, failed = time.monotonic() + START_TIMEOUT_S, 0, False
        while waiting and (left := deadline - time.monotonic()) > 0:
            for pipe in wait(list(waiting), left):
                assert isinstance(pipe, Connection)
                rank = waiting[pipe]
                try:
                    message = pipe.recv_bytes()
                except (EOFError, ConnectionError):
                    self.workers[rank][0].join(GRACE_S)
                    message = b""
                if message == _JOINED:
                    joined += 1
                    if joined == world_size and not failed:
                        deadline = time.monotonic() + timeout
                    continue
                del waiting[pipe]
                if message:
                    answers[rank] = pickle.loads(message)
                if not message or answers[rank].error:
                    failed = True
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        return answers

    def _start(self, world_size: int) -> None:
        if any(not process.is_alive() for process, _ in self.workers):
            self.stop()
        self.folder = self.folder or tempfile.mkdtemp(prefix="shardlab_ranks_")
        context = rank_context()
        started = []
        for rank in range(len(self.workers), world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), name=f"rank{rank}",
                                      daemon=True)
            start_processes([process])
            theirs.close()
            self.workers.append((process, ours))
            started.append(ours)
        for pipe in started:
            if not pipe.poll(START_TIMEOUT_S):
                self.stop()
                raise RankError(f"a rank did not start within {START_TIMEOUT_S:.0f} s")
            pipe.recv_bytes()

    def stop(self) -> None:
        for process, pipe in self.workers:
            pipe.close()
            process.kill()
            process.join()
            process.close()
        self.workers = []
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder = ""


_pool = _Pool()


def _describe(name: str, failed: dict[int, _Answer], silent: list[int],
              dead: dict[int, int | None], timeout: float) -> str:
    """The first failure in time leads: later ones are mostly its consequence."""
    lines = [f"rank {rank} died with exit code {code} in {name}" for rank, code in dead.items()]
    quiet = [rank for rank in silent if rank not in dead]
    if quiet and not failed and not dead:
        lines.append(f"rank(s) {quiet} did not answer within {timeout:g} s in {name}")
    elif quiet:
        lines.append(f"rank(s) {quiet} were still waiting and were stopped")
    if failed:
        first = min(failed, key=lambda rank: failed[rank].failed_at)
        lines.insert(len(dead), f"rank {first} failed in {name}:\n{failed[first].error}")
        others = sorted(set(failed) - {first})
        lines += [f"rank(s) {others} failed after it"] if others else []
    return "\n".join(lines)


def _dumps(value: Any) -> bytes:
    """Pickles plain data and tensors; torch.save keeps the aliasing of tensors and is fast."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _loads(data: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(data), weights_only=False)


def _loopback() -> str:
    """Interface for gloo: the host's own name need not resolve where tests run."""
    names = os.listdir("/sys/class/net") if os.path.isdir("/sys/class/net") else ["lo0"]
    return next((name for name in names if name in ("lo", "lo0")), names[0])


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Sets variables for the processes started inside."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


# What follows runs in the workers.


def _serve(pipe: Connection) -> None:
    """Answers calls until the parent closes the pipe or goes away."""
    import torch

    import shardlab.comm  # noqa: F401  (paid once here instead of in the first call)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides; no traceback per rank
    torch.set_num_threads(1)
    pipe.send_bytes(_JOINED)
    while True:
        try:
            data = pipe.recv_bytes()
        except (EOFError, ConnectionError):
            return
        pipe.send_bytes(pickle.dumps(_answer(pickle.loads(data), pipe)))
        torch.set_num_threads(1)


def _answer(call: _Call, pipe: Connection) -> _Answer:
    """Runs one call; whatever it raises becomes an answer."""
    import torch.distributed as dist

    from shardlab.comm.joining import build_groups

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fn, arguments = _load_function(call), _loads(call.arguments)
            if call.world_size > 1:
                dist.init_process_group(
                    "gloo", store=dist.FileStore(call.store, call.world_size), rank=call.rank,
                    world_size=call.world_size, timeout=timedelta(seconds=_GROUP_TIMEOUT_S))
            groups = build_groups()
            pipe.send_bytes(_JOINED)
            return _Answer(value=_dumps(fn(groups, *arguments)))
    except BaseException:
        return _Answer(error=traceback.format_exc(), failed_at=time.monotonic())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _load_function(call: _Call) -> Callable[..., Any]:
    """The function in this process; its module is loaded from its file under the same name.

    Test modules need not be importable by name (pytest's importlib mode), and arguments may be
    instances of classes that the test module defines: both work once it is in ``sys.modules``.
    """
    module = sys.modules.get(call.module)
    if module is None:
        if str(_ROOT) not in sys.path:
            sys.path.insert(0, str(_ROOT))
        spec = importlib.util.spec_from_file_location(call.module, call.file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[call.module] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[call.module]
            raise
    found: Any = module
    for name in call.qualname.split("."):
        found = getattr(found, name)
    assert isinstance(found, types.FunctionType), f"{call.qualname} is not a function"
    return found
