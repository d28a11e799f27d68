"""The machine a plan is made for: ranks, hosts, their memories, disks and links, as plain data.

Sizes are bytes, speeds bytes or rows or ids per second, times seconds. Hosts are equal, and so are
ranks. Speeds are those of one rank while all ranks of its host work, except a disk's, which its
host's ranks share.

    tier    on CUDA                              without CUDA
    hbm     the device's memory                  an arena of host memory, a budget of each rank
    ddr     host memory, behind `device_host`    host memory outside the arenas
    ssd     the host's disk                      the host's disk
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from shardlab.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

Curve = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Link:
    """What one rank sends, and at the same time receives, over links of one sort.

    A message of b bytes takes latency_s + b / speed(b); speed follows ``curve``, straight in log
    bytes and log speed between its points, constant outside.

    Attributes:
        curve: (message bytes, bytes per second), ascending; a plain number means that speed for
            messages of any size.
        latency_s: fixed cost of one message.
    """

    curve: Curve
    latency_s: float

    def __post_init__(self) -> None:
        if isinstance(self.curve, (int, float)):
            object.__setattr__(self, "curve", ((1.0, float(self.curve)),))
        else:
            object.__setattr__(self, "curve", tuple((float(b), float(s)) for b, s in self.curve))

    @property
    def bytes_per_s(self) -> float:
        """Speed of the largest messages."""
        return self.curve[-1][1]

    def seconds(self, message_bytes: ArrayLike, messages: ArrayLike = 1) -> NDArray[np.float64]:
        """Time to send messages one after the other.

        Args:
            message_bytes: size of each; an empty one still has its latency.
            messages: how many; broadcast against ``message_bytes``.

        Returns:
            Seconds, in the shape of the arguments broadcast together.
        """
        import numpy as np

        size = np.asarray(message_bytes, dtype=np.float64)
        points = np.log(np.array(self.curve))
        speed = np.exp(np.interp(np.log(np.maximum(size, 1.0)), points[:, 0], points[:, 1]))
        return np.asarray(messages * (self.latency_s + size / speed))


@dataclass(frozen=True)
class Memory:
    """Speed of a memory; a random row of b bytes costs 1 / rows_per_s + b / row_bytes_per_s.

    Attributes:
        stream_bytes_per_s: reading or writing contiguous bytes.
        rows_per_s: rate of random accesses, the part that does not depend on the row's size.
        row_bytes_per_s: bandwidth inside random rows.
        ids_per_s: rate of de-duplicating ids (sorting them, with their positions).
        rewrite_factor: reading, changing and writing back a random row, as a multiple of the time
            to read it.
    """

    stream_bytes_per_s: float
    rows_per_s: float
    row_bytes_per_s: float
    ids_per_s: float
    rewrite_factor: float = 1.1

    def row_seconds(self, row_bytes: ArrayLike) -> NDArray[np.float64]:
        """Time to read one random row of each size."""
        import numpy as np

        size = np.asarray(row_bytes, dtype=np.float64)
        return np.asarray(1 / self.rows_per_s + size / self.row_bytes_per_s)


@dataclass(frozen=True)
class Disk:
    """One host's SSD, shared by its ranks.

    Attributes:
        capacity_bytes: bytes that tables may take.
        read_iops: random reads of a page (`shardlab.pages.PAGE_BYTES`) per second, many at once.
        write_iops: random writes of a page per second.
        read_bytes_per_s: reading long runs.
        write_bytes_per_s: writing long runs.
        endurance_bytes: bytes that may be written in its life; None: not known.
    """

    capacity_bytes: int
    read_iops: float
    write_iops: float
    read_bytes_per_s: float
    write_bytes_per_s: float
    endurance_bytes: float | None = None


@dataclass(frozen=True)
class Topology:
    """A cluster of equal hosts with equal ranks.

    Attributes:
        name: how reports call it.
        hosts: number of hosts.
        ranks_per_host: ranks (devices) of a host.
        hbm_bytes: memory of one rank; without CUDA an arena of host memory.
        ddr_bytes: host memory of one host that its ranks share, arenas not counted.
        hbm: speed of a rank's own memory.
        ddr: speed of host memory, one rank's share of it. Under CUDA: as the host's cores see it.
        ssd: the host's disk; None: there is none.
        device_host: link between a device and its host's memory; None: ranks compute on the host.
        intra_host: link between two ranks of one host.
        inter_host: link between ranks of two hosts, one rank's share of the network.
        encode_bytes_per_s: fp32 bytes that a rank turns into a narrower dtype.
        decode_bytes_per_s: fp32 bytes that a rank makes out of a narrower dtype.
        fp32_flops_per_s: dense fp32 products of a rank, a multiply-add counts two.
        bf16_flops_per_s: dense bf16 products of a rank.
        reserved_fraction: share of ``hbm_bytes`` and ``ddr_bytes`` that no table may take: dense
            model, activations, readers, allocators.
        shard_overhead_s: fixed cost of a shard in every step: its part of the bookkeeping of
            the multi-table read and update.
        step_overhead_s: fixed cost of a step on a rank: Python and launching kernels.
        layer_overhead_s: fixed cost of a layer of the dense model, forward, backward and its
            optimiser's step. On a device launches run ahead of the work, which hides them.
    """

    name: str
    hosts: int
    ranks_per_host: int
    hbm_bytes: int
    ddr_bytes: int
    hbm: Memory
    ddr: Memory
    ssd: Disk | None
    device_host: Link | None
    intra_host: Link
    inter_host: Link
    encode_bytes_per_s: float
    decode_bytes_per_s: float
    fp32_flops_per_s: float
    bf16_flops_per_s: float
    reserved_fraction: float
    shard_overhead_s: float
    step_overhead_s: float
    layer_overhead_s: float = 0.0

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise ConfigError([f"topology {self.name!r}: {problem}" for problem in problems])

    @property
    def world_size(self) -> int:
        return self.hosts * self.ranks_per_host

    @property
    def capacity(self) -> int:
        """Bytes of one rank's hbm that shards and exchange buffers may take together."""
        return int(self.hbm_bytes * (1 - self.reserved_fraction))

    @property
    def ddr_capacity(self) -> int:
        """Bytes of one host's ddr that tables may take."""
        return int(self.ddr_bytes * (1 - self.reserved_fraction))

    @property
    def ssd_capacity(self) -> int:
        """Bytes of one host's disk that tables may take."""
        return self.ssd.capacity_bytes if self.ssd else 0

    @property
    def memory(self) -> Memory:
        """Speed of a rank's own memory."""
        return self.hbm


#: Lowest value of the fields that may be 0 or start at another number; all other numbers must be
#: above 0.
_LOWEST = {"hosts": 1, "ranks_per_host": 1, "hbm_bytes": 1, "ddr_bytes": 0, "latency_s": 0,
           "shard_overhead_s": 0, "step_overhead_s": 0, "layer_overhead_s": 0,
           "rewrite_factor": 1}


def _problems(part: Any, where: str = "") -> Iterator[str]:
    """What is impossible about the numbers of a dataclass and of those inside it."""
    for entry in fields(part):
        key, value = where + entry.name, getattr(part, entry.name)
        if entry.name == "name" or value is None:
            continue
        if hasattr(value, "__dataclass_fields__"):
            yield from _problems(value, f"{key}.")
        elif entry.name == "curve":
            yield from _curve_problems(value, f"{where}bytes_per_s")
        elif entry.name == "reserved_fraction":
            if not 0 <= value < 1:
                yield f"{key} must lie in [0, 1), found {value!r}"
        elif entry.name in _LOWEST:
            if not value >= _LOWEST[entry.name]:
                yield f"{key} must be at least {_LOWEST[entry.name]}, found {value!r}"
        elif not value > 0:
            yield f"{key} must be above 0, found {value!r}"


def _curve_problems(curve: Sequence[tuple[float, float]], key: str) -> Iterator[str]:
    sizes = [size for size, _ in curve]
    if not curve or sizes != sorted(set(sizes)) or not sizes[0] > 0:
        yield f"{key} needs message sizes above 0, each once, found {sizes}"
    yield from (f"{key} must be above 0, found {speed!r}" for _, speed in curve if not speed > 0)
