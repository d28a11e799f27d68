"""The machine a plan is made for: ranks, hosts, their memories and links, as plain data.

All sizes are bytes, all speeds bytes or rows per second and per rank, all times seconds.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from shardlab.errors import ConfigError, nearest_name


@dataclass(frozen=True)
class Link:
    """A connection between two ranks: seconds = latency_s + bytes / bytes_per_s.

    Attributes:
        bytes_per_s: what one rank can send (and at the same time receive) over such links.
        latency_s: fixed cost of one message.
    """

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class Memory:
    """Speed of one rank's own memory; a random row costs 1 / rows_per_s + bytes / row_bytes_per_s.

    Attributes:
        stream_bytes_per_s: reading or writing contiguous bytes.
        rows_per_s: rate of random accesses, the part that does not depend on the row's size.
        row_bytes_per_s: bandwidth inside random rows.
        ids_per_s: rate of de-duplicating ids (sorting them, with their positions).
    """

    stream_bytes_per_s: float
    rows_per_s: float
    row_bytes_per_s: float
    ids_per_s: float


@dataclass(frozen=True)
class Topology:
    """A cluster of equal hosts with equal ranks.

    Attributes:
        name: how reports call it.
        hosts: number of hosts.
        ranks_per_host: ranks (devices) of a host.
        hbm_bytes: memory of one rank; without CUDA an arena of host memory.
        ddr_bytes: host memory of one host, shared by its ranks. Not placed on yet.
        ssd_bytes: disk of one host, shared by its ranks. Not placed on yet.
        memory: speed of a rank's memory.
        intra_host: link between two ranks of one host.
        inter_host: link between ranks of two hosts, one rank's share of the network.
        reserved_fraction: share of ``hbm_bytes`` that no table may take: dense model,
            activations, allocator.
        shard_overhead_s: fixed cost of a shard in every step: its part of the bookkeeping of
            the multi-table read and update.
    """

    name: str
    hosts: int
    ranks_per_host: int
    hbm_bytes: int
    ddr_bytes: int
    ssd_bytes: int
    memory: Memory
    intra_host: Link
    inter_host: Link
    reserved_fraction: float
    shard_overhead_s: float

    def __post_init__(self) -> None:
        problems = [f"{key} must be at least {low}, found {value!r}"
                    for key, value, low in _limits(self) if not value >= low]
        if not 0 <= self.reserved_fraction < 1:
            problems.append("reserved_fraction must lie in [0, 1), "
                            f"found {self.reserved_fraction!r}")
        problems += [f"{key} must be above 0, found {value!r}"
                     for key, value in _speeds(self) if not value > 0]
        if problems:
            raise ConfigError([f"topology {self.name!r}: {problem}" for problem in problems])

    @property
    def world_size(self) -> int:
        return self.hosts * self.ranks_per_host

    @property
    def capacity(self) -> int:
        """Bytes of one rank that shards and exchange buffers may take together."""
        return int(self.hbm_bytes * (1 - self.reserved_fraction))


def _limits(topology: Topology) -> list[tuple[str, float, int]]:
    return [("hosts", topology.hosts, 1), ("ranks_per_host", topology.ranks_per_host, 1),
            ("hbm_bytes", topology.hbm_bytes, 1), ("ddr_bytes", topology.ddr_bytes, 0),
            ("ssd_bytes", topology.ssd_bytes, 0),
            ("intra_host.latency_s", topology.intra_host.latency_s, 0),
            ("inter_host.latency_s", topology.inter_host.latency_s, 0),
            ("shard_overhead_s", topology.shard_overhead_s, 0)]


def _speeds(topology: Topology) -> list[tuple[str, float]]:
    speeds = [(f"memory.{key}", value) for key, value in asdict(topology.memory).items()]
    return [*speeds, ("intra_host.bytes_per_s", topology.intra_host.bytes_per_s),
            ("inter_host.bytes_per_s", topology.inter_host.bytes_per_s)]


_NAME = re.compile(r"(?:(?:(?P<hosts>\d+)x)?(?P<ranks>\d+)x)?(?P<profile>[a-z][a-z0-9-]*)")


def read_topology(name_or_path: str | Path) -> Topology:
    """Reads a built-in profile by name, or a YAML file.

    ``h100`` is one rank, ``8xh100`` one host of 8, ``16x8xh100`` 16 hosts of 8. A file (name
    ending in .yaml or .yml, or a path that exists) holds the fields of `Topology`; with
    ``profile: 8xh100`` it only needs the fields that differ. Quantities are plain numbers or
    strings with a unit: ``80 GiB``, ``25 GB/s``, ``3 us``.

    Raises:
        ConfigError: unknown profile (the known ones are listed), unreadable file, or every
            unknown, missing or unreadable field of the file.
    """
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return _read_file(path)
    return _read_profile(str(name_or_path))


def _read_profile(name: str) -> Topology:
    from shardlab.planner.profiles import PROFILES

    match = _NAME.fullmatch(name)
    base = PROFILES.get(match["profile"]) if match else None
    if match is None or base is None:
        word = match["profile"] if match else name
        raise ConfigError(f"unknown topology {name!r}{nearest_name(word, list(PROFILES))}; known "
                          f"profiles: {', '.join(PROFILES)}, each with sizes like 8xh100 (one "
                          "host) or 16x8xh100 (16 hosts); or the path of a YAML file")
    return replace(base, name=name, hosts=int(match["hosts"] or 1),
                   ranks_per_host=int(match["ranks"] or 1))


def local_cpu(ranks: int) -> Topology:
    """The ``cpu`` profile with this machine's own memory divided among ``ranks`` ranks."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [pages, *(int(text) for text in _cgroup_limits() if text.isdigit())]
    return replace(_read_profile("cpu"), name=f"{ranks}xcpu (this machine)",
                   ranks_per_host=ranks, hbm_bytes=min(limits) // ranks)


def _cgroup_limits() -> list[str]:
    """Memory limits of the container we run in, v2 and v1; "max" when there is none."""
    paths = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
    return [Path(path).read_text().strip() for path in paths if os.access(path, os.R_OK)]


_NESTED: dict[str, type] = {"memory": Memory, "intra_host": Link, "inter_host": Link}
_UNITS: dict[str, float] = {
    "": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
    "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40,
    "rows/s": 1, "s": 1, "ms": 1e-3, "us": 1e-6,
}
_UNITS.update({f"{unit}/s": size for unit, size in list(_UNITS.items()) if unit.endswith("B")})
_QUANTITY = re.compile(r"\s*([0-9.eE+-]+)\s*([A-Za-z/]*)\s*")


def _read_file(path: Path) -> Topology:
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"topology file {path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"topology file {path}: not YAML: {error}") from None
    if not isinstance(data, Mapping):
        raise ConfigError(f"topology file {path}: expected a mapping of fields, found {data!r}")
    values = {str(key): value for key, value in data.items()}
    base = values.pop("profile", None)
    start: dict[str, Any] = {"name": path.stem}
    if base is not None:
        start = {**asdict(_read_profile(str(base))), "name": f"{path.stem} ({base})"}
    problems: list[str] = []
    merged = _merge(start, values, Topology, "", problems)
    if problems:
        raise ConfigError([f"topology file {path}: {problem}" for problem in problems])
    for key, kind in _NESTED.items():
        merged[key] = kind(**merged[key])
    return Topology(**merged)


def _merge(base: Mapping[str, Any], values: Mapping[str, Any], kind: type, where: str,
           problems: list[str]) -> dict[str, Any]:
    """``base`` overlaid with ``values``; appends what is unknown, missing or unreadable."""
    known = [entry.name for entry in fields(kind)]
    problems += [f"unknown field {where + key!r}{nearest_name(key, known)}; "
                 f"known: {', '.join(known)}" for key in values if key not in known]
    problems += [f"field {where + key!r} is missing (or name a `profile:` to start from)"
                 for key in known if key not in values and key not in base]
    merged = dict(base)
    for key in known:
        if key not in values:
            continue
        value = values[key]
        if key in _NESTED:
            if not isinstance(value, Mapping):
                problems.append(f"field {where + key!r}: expected a mapping, found {value!r}")
                continue
            merged[key] = _merge(base.get(key, {}), {str(k): v for k, v in value.items()},
                                 _NESTED[key], f"{key}.", problems)
        else:
            merged[key] = str(value) if key == "name" else _number(where + key, value, problems)
    return merged


def _number(key: str, value: Any, problems: list[str]) -> float | int:
    number: float | None = None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        number = value
    elif isinstance(value, str) and (match := _QUANTITY.fullmatch(value)) \
            and match[2] in _UNITS:
        try:
            number = float(match[1]) * _UNITS[match[2]]
        except ValueError:
            number = None
    whole = key in ("hosts", "ranks_per_host") or key in ("hbm_bytes", "ddr_bytes", "ssd_bytes")
    if number is None or number != number or abs(number) == float("inf"):
        problems.append(f"field {key!r}: expected a number, with a unit such as GiB, GB/s or us "
                        f"if it is text, found {value!r}")
        return 1
    if key in ("hosts", "ranks_per_host") and number != int(number):
        problems.append(f"field {key!r}: expected a whole number, found {value!r}")
    return int(number) if whole else number
