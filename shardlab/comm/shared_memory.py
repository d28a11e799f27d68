"""Lanes between CPU ranks of one host, through shared memory.

Every rank makes one anonymous file in memory (memfd) and hands it to its peers over a Unix socket
without a name in any file system: nothing is left behind, however a rank ends. The sockets stay
open; the kernel closes them when a rank dies, and so a wait ends at once.
"""

from __future__ import annotations

import os
import secrets
import select
import socket
import struct
import sys
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from shardlab.comm.lanes import Finish

_PAGE = 4096
#: Bytes of one lane's rings of one rank; pages are taken as they are first used.
_LANE_BYTES = 32 << 20
#: A ring that fits a second-level cache is read out of it, not out of memory. The largest holds
#: half of a bucket of dense gradients and its length: a sum of two ranks starts without a wait.
_MAX_RING_BYTES, _MIN_RING_BYTES = (1 << 20) + _PAGE, 256 << 10
#: How long a wait sleeps before it looks whether its peers are alive.
_LOOK_MS = 100
#: How long peers get to come to a meeting; they are on their way already.
_PATIENCE_S = 30.0
_HELLO = struct.Struct("=i16s")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NETWORK = Path("/proc/self/ns/net")


def host_identity() -> str:
    """Equal for two processes that can share memory here: same kernel, same network namespace."""
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else socket.gethostname()
    network = os.readlink(_NETWORK) if _NETWORK.is_symlink() else ""
    return f"{boot} {network}"


def missing_support() -> str:
    """Why this process cannot use shared memory; empty: it can."""
    if not sys.platform.startswith("linux") or not hasattr(os, "memfd_create"):
        return "the system has no memfd"
    try:
        built = _native() is not None
    except (ImportError, OSError) as error:
        return f"the native library cannot be loaded: {error}"
    return "" if built else "the native library is not built"


def _native() -> Any:
    from shardlab.ops.registry import native

    return native()


class Meeting:
    """Where ranks of a host meet to make lanes: a listening socket with a random name.

    Args:
        rank: this rank.
        ranks: of the host.
        count: lanes to make.
        timeout_s: seconds after which a transfer has failed.

    Raises:
        OSError: the system refused memory or a socket.
    """

    def __init__(self, rank: int, ranks: int, count: int, timeout_s: float) -> None:
        self._rank, self._timeout_s = rank, timeout_s
        self._patience_s = min(timeout_s, _PATIENCE_S)
        self._ring = min(_MAX_RING_BYTES,
                         max(_MIN_RING_BYTES, _LANE_BYTES // ranks // _PAGE * _PAGE))
        size = _native().Lane.segment_bytes(ranks, self._ring)
        self._segments = {rank: [_memory(size) for _ in range(count)]}
        self.name = f"shardlab-{secrets.token_hex(16)}"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.settimeout(self._patience_s)
        self._listener.bind(f"\0{self.name}")
        self._listener.listen()

    def make_lanes(self, names: Sequence[str]) -> list[SharedMemoryLane]:
        """Meets all peers; every rank calls it.

        Args:
            names: of all ranks' meetings, by rank.

        Raises:
            OSError: a peer did not come, or no rank of this job came.
            RuntimeError: the system refused memory.
        """
        sockets: dict[int, socket.socket] = {}
        try:
            self._meet(names, sockets)
            peers = _Peers(sockets)
            return [SharedMemoryLane(_native().Lane(list(fds), self._rank, self._ring), peers,
                                     self._timeout_s)
                    for fds in zip(*(self._segments[rank] for rank in range(len(names))),
                                   strict=True)]
        except (OSError, RuntimeError):
            _close_all([*sockets.values()])
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Stops listening and forgets the memory; lanes keep theirs."""
        self._listener.close()
        for fds in self._segments.values():
            for fd in fds:
                os.close(fd)
        self._segments.clear()

    def _meet(self, names: Sequence[str], sockets: dict[int, socket.socket]) -> None:
        """Calls the ranks before this one, then takes the calls of those behind it."""
        segments = self._segments
        mine = segments[self._rank]
        for peer in range(self._rank):
            sockets[peer] = socket.socket(socket.AF_UNIX)
            sockets[peer].settimeout(self._patience_s)
            sockets[peer].connect(f"\0{names[peer]}")
            self._greet(sockets[peer], mine)
            _, segments[peer] = self._read(sockets[peer], len(mine), names)
        while len(sockets) < len(names) - 1:
            guest, _ = self._listener.accept()
            guest.settimeout(self._patience_s)
            try:
                peer, fds = self._read(guest, len(mine), names)
            except OSError:
                guest.close()
                raise
            sockets[peer], segments[peer] = guest, fds
            self._greet(guest, mine)

    def _greet(self, peer: socket.socket, fds: list[int]) -> None:
        socket.send_fds(peer, [_HELLO.pack(self._rank, _token(self.name))], fds)

    def _read(self, peer: socket.socket, count: int,
              names: Sequence[str]) -> tuple[int, list[int]]:
        data, fds, _, _ = socket.recv_fds(peer, _HELLO.size, count)
        rank, token = _HELLO.unpack(data) if len(data) == _HELLO.size else (-1, b"")
        if not 0 <= rank < len(names) or _token(names[rank]) != token or len(fds) != count:
            for fd in fds:
                os.close(fd)
            raise OSError("a process that is no rank of this job came to the meeting")
        return rank, fds


def _token(name: str) -> bytes:
    """What proves a rank of this job: the names were exchanged over the process group."""
    return name.encode()[-16:]


def _memory(size: int) -> int:
    fd = os.memfd_create("shardlab-lane", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


class _Peers:
    """The open sockets to all peers; readable means that the peer has ended."""

    def __init__(self, sockets: dict[int, socket.socket]) -> None:
        self._ranks = {peer.fileno(): rank for rank, peer in sockets.items()}
        self._finalizer = weakref.finalize(self, _close_all, list(sockets.values()))

    def ended(self) -> list[int]:
        poller = select.poll()
        for fd in self._ranks:
            poller.register(fd, select.POLLIN)
        return sorted(self._ranks[fd] for fd, _ in poller.poll(0))


def _close_all(sockets: list[socket.socket]) -> None:
    for peer in sockets:
        peer.close()


class PeerError(RuntimeError):
    """A transfer failed for some ranks.

    Args:
        ended: ranks that are gone.
        late: ranks that did not answer in time.
        text: what else is known.
    """

    def __init__(self, ended: Sequence[int], late: Sequence[int], text: str = "") -> None:
        super().__init__(text or f"ranks ended: {list(ended)}, late: {list(late)}")
        self.ended, self.late, self.text = tuple(ended), tuple(late), text


class SharedMemoryLane:
    """A lane through shared memory; of CPU tensors. One thread at a time uses it.

    Args:
        lane: the native lane.
        peers: tells which peers have ended.
        timeout_s: seconds after which a transfer has failed.
    """

    def __init__(self, lane: Any, peers: _Peers, timeout_s: float) -> None:
        self._lane, self._peers, self._timeout_s = lane, peers, timeout_s
        #: Tensors of transfers under way, by number: the lane has only their addresses, and goes
        #: on with a transfer that nobody waits for.
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def all_to_all(self, out: Tensor, source: Tensor, out_splits: Sequence[int],
                   source_splits: Sequence[int]) -> Finish:
        """Starts a transfer: what the rings take is copied at once, the rest in the wait."""
        assert out.is_contiguous(), "all_to_all: out must be contiguous"
        source = source.contiguous()
        return self._start(out, source, out_splits, source_splits, False)

    def all_gather(self, out: Tensor, source: Tensor, out_splits: Sequence[int]) -> Finish:
        """Starts sending ``source`` to every rank; it may lie in its place in ``out`` already."""
        return self._start(out, source, out_splits, [source.numel()] * len(out_splits), True)

    def _start(self, out: Tensor, source: Tensor, out_splits: Sequence[int],
               source_splits: Sequence[int], same: bool) -> Finish:
        size = source.element_size()
        number = self._lane.start(source.data_ptr(), [size * n for n in source_splits],
                                  out.data_ptr(), [size * n for n in out_splits], same)
        self._held[number] = (out, source)
        return lambda: self._finish(number)

    def _finish(self, number: int) -> None:
        deadline = time.monotonic() + self._timeout_s
        while not self._lane.wait(number, _LOOK_MS):
            if self._lane.mismatch():
                raise PeerError((), (), self._lane.mismatch())
            ended = self._peers.ended()
            # What a peer wrote before it ended still counts.
            if ended and set(ended) & set(self._lane.awaited()) and not self._lane.wait(number, 0):
                raise PeerError(ended, ())
            if time.monotonic() > deadline:
                raise PeerError((), self._lane.awaited())
        # Rings keep order: transfers before this one are over, too.
        for over in [other for other in self._held if other <= number]:
            del self._held[over]
