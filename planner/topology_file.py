"""Topologies as YAML: strict reading that lists every problem at once, and writing.

    profile: 8xh100                 # optional: then only what differs is needed
    hosts: 4
    hbm_bytes: 64 GiB
    ssd: {capacity_bytes: 15 TB, read_iops: 2.0e6, ...}      # null: no disk
    inter_host:
      bytes_per_s: {4 KiB: 1 GB/s, 1 MiB: 20 GB/s}           # or one speed: 25 GB/s
      latency_s: 7 us

Quantities are plain numbers or strings with a unit (`UNITS`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from shardlab.errors import ConfigError, nearest_name
from shardlab.planner.profiles import read_profile
from shardlab.planner.topology import Disk, Link, Memory, Topology

#: Unit -> how many bytes, seconds or things it stands for.
UNITS: dict[str, float] = {
    "": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "PB": 1e15,
    "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40,
    "rows/s": 1, "ids/s": 1, "s": 1, "ms": 1e-3, "us": 1e-6, "ns": 1e-9,
    "FLOP/s": 1, "GFLOP/s": 1e9, "TFLOP/s": 1e12,
}
UNITS.update({f"{unit}/s": size for unit, size in list(UNITS.items()) if unit.endswith("B")})
_QUANTITY = re.compile(r"\s*([0-9.eE+-]+)\s*([A-Za-z/]*)\s*")

_NESTED: dict[str, type] = {"hbm": Memory, "ddr": Memory, "ssd": Disk, "device_host": Link,
                            "intra_host": Link, "inter_host": Link}
_MAY_BE_NULL = {"ssd", "device_host", "endurance_bytes"}
_COUNTS = {"hosts", "ranks_per_host"}
_WHOLE = {*_COUNTS, "hbm_bytes", "ddr_bytes", "capacity_bytes"}
#: In a file a link's curve is its speed: one number, or one for each message size.
_FILE_NAMES = {"curve": "bytes_per_s"}


def read_topology(name_or_path: str | Path) -> Topology:
    """Reads a built-in profile by name, or a YAML file.

    ``h100`` is one rank, ``8xh100`` one host of 8, ``16x8xh100`` 16 hosts of 8. A file (name
    ending in .yaml or .yml, or a path that exists) holds the fields of `Topology`; with
    ``profile: 8xh100`` it only needs the fields that differ (`read_file`).

    Raises:
        ConfigError: unknown profile (the known ones are listed), unreadable file, or every
            unknown, missing or unreadable field of the file.
    """
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return read_file(path)
    return read_profile(str(name_or_path))


def read_file(path: Path) -> Topology:
    """Reads a topology file.

    Raises:
        ConfigError: the file cannot be read, or every unknown, missing, unreadable or impossible
            field of it.
    """
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
        start = {**_fields_of(read_profile(str(base))), "name": f"{path.stem} ({base})"}
    problems: list[str] = []
    merged = _merge(start, values, Topology, "", problems)
    if problems:
        raise ConfigError([f"topology file {path}: {problem}" for problem in problems])
    return Topology(**merged)


def change_fields(topology: Topology, values: Mapping[str, Any]) -> Topology:
    """A topology with some fields replaced, written as in a file.

    Args:
        topology: where to start.
        values: field -> value; a mapping for a field that has fields.

    Raises:
        ConfigError: every unknown, unreadable or impossible field.
    """
    problems: list[str] = []
    merged = _merge(_fields_of(topology), values, Topology, "", problems)
    if problems:
        raise ConfigError([f"topology {topology.name!r}: {problem}" for problem in problems])
    return Topology(**merged)


def parse_quantity(text: str) -> float | None:
    """A number, with a unit of `UNITS` or without; None where the text is none."""
    match = _QUANTITY.fullmatch(text)
    if match is None or match[2] not in UNITS:
        return None
    try:
        return float(match[1]) * UNITS[match[2]]
    except ValueError:
        return None


def _fields_of(part: Any) -> dict[str, Any]:
    """A dataclass as a mapping, under the names that files use; values are kept as they are."""
    return {_FILE_NAMES.get(entry.name, entry.name): getattr(part, entry.name)
            for entry in fields(part)}


def _merge(base: Mapping[str, Any], values: Mapping[str, Any], kind: type, where: str,
           problems: list[str]) -> dict[str, Any]:
    """``base`` overlaid with ``values``, as arguments of ``kind``.

    Appends what is unknown, missing or unreadable to ``problems``.
    """
    known = {_FILE_NAMES.get(entry.name, entry.name): entry for entry in fields(kind)}
    problems += [f"unknown field {where + key!r}{nearest_name(key, list(known))}; "
                 f"known: {', '.join(known)}" for key in values if key not in known]
    problems += [f"field {where + key!r} is missing (or name a `profile:` to start from)"
                 for key, entry in known.items()
                 if key not in values and key not in base and entry.default is MISSING]
    merged = {}
    for key, entry in known.items():
        if key in values:
            merged[entry.name] = _value(key, values[key], base.get(key), where, problems)
        elif key in base:
            merged[entry.name] = base[key]
    return merged


def _value(key: str, value: Any, base: Any, where: str, problems: list[str]) -> Any:
    if key == "name":
        return str(value)
    if value is None and key in _MAY_BE_NULL:
        return None
    if key in _NESTED:
        if not isinstance(value, Mapping):
            problems.append(f"field {where + key!r}: expected a mapping, found {value!r}")
            return None
        before = len(problems)
        merged = _merge({} if base is None else _fields_of(base),
                        {str(name): entry for name, entry in value.items()}, _NESTED[key],
                        f"{where}{key}.", problems)
        return _NESTED[key](**merged) if len(problems) == before else None
    if key == "bytes_per_s" and isinstance(value, Mapping):
        return tuple(sorted((_number(f"{where}{key}", size, problems),
                             _number(f"{where}{key}", speed, problems))
                            for size, speed in value.items()))
    return _number(where + key, value, problems)


def _number(key: str, value: Any, problems: list[str]) -> float | int:
    number: float | None = None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        number = value
    elif isinstance(value, str):
        number = parse_quantity(value)
    if number is None or number != number or abs(number) == float("inf"):
        problems.append(f"field {key!r}: expected a number, with a unit such as GiB, GB/s or us "
                        f"if it is text, found {value!r}")
        return 1
    name = key.rsplit(".", 1)[-1]
    if name in _COUNTS and number != int(number):
        problems.append(f"field {key!r}: expected a whole number, found {value!r}")
    return int(number) if name in _WHOLE else number


#: Field name ending -> units that writing tries, largest first.
_WRITTEN_UNITS = (
    ("flops_per_s", ("TFLOP/s", "GFLOP/s")), ("rows_per_s", ()), ("ids_per_s", ()),
    ("bytes_per_s", ("GB/s", "MB/s")), ("_bytes", ("TiB", "GiB", "MiB", "TB", "GB", "MB")),
    ("_s", ("ms", "us", "ns")))


def to_yaml(topology: Topology, comments: Mapping[str, str] | None = None,
            header: str = "") -> str:
    """A topology as text that `read_file` reads to an equal one.

    Args:
        topology: what to write.
        comments: where a number comes from, by field (``hbm`` or ``hbm.rows_per_s``); written in
            the line above it.
        header: first lines, without the comment's mark.
    """
    lines = [f"# {line}".rstrip() for line in header.splitlines()]
    _write(topology, "", comments or {}, lines)
    return "\n".join(lines) + "\n"


def _write(part: Any, where: str, comments: Mapping[str, str], lines: list[str]) -> None:
    indent = "  " * where.count(".")
    for key, value in _fields_of(part).items():
        lines += [f"{indent}# {line}" for line in comments.get(where + key, "").splitlines()]
        if hasattr(value, "__dataclass_fields__"):
            lines.append(f"{indent}{key}:")
            _write(value, f"{where}{key}.", comments, lines)
        elif isinstance(value, tuple) and len(value) > 1:
            points = ", ".join(f"{_quantity('_bytes', size)}: {_quantity('bytes_per_s', speed)}"
                               for size, speed in value)
            lines.append(f"{indent}{key}: {{{points}}}")
        else:
            lines.append(f"{indent}{key}: {_scalar(key, value)}")


def _scalar(key: str, value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # a YAML string, whatever is in it
    if isinstance(value, tuple):
        value = value[0][1]
    return _quantity(key, value)


def _quantity(key: str, value: float) -> str:
    """A number with the largest unit that keeps it exact, else as it is."""
    units: tuple[str, ...] = next((units for end, units in _WRITTEN_UNITS if key.endswith(end)), ())
    for unit in units:
        text = f"{value / UNITS[unit]:.6g}"
        if abs(float(text)) >= 1 and float(text) * UNITS[unit] == value:
            return f"{text} {unit}"
    return repr(value)
