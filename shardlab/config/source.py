"""From YAML text and ``key=value`` overrides to one plain mapping, with every problem listed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from shardlab.errors import ConfigError

_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")


def read_source(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Reads a job file.

    Args:
        path: YAML file.

    Returns:
        The mapping, and one line per key that is written twice.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or does not hold a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the job file: {error}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = _unshared(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {_yaml_reason(error)}") from None
    except RecursionError:
        raise ConfigError(f"{path}: the YAML is nested too deep, or an alias "
                          "contains itself") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of keys such as tables and model, "
                          f"found {type(data).__name__}")
    return data, _repeated_keys(node, "", set())


def _unshared(value: Any) -> Any:
    """A copy in which aliases are copies too, so that an override changes one place only."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


def _yaml_reason(error: yaml.YAMLError) -> str:
    """PyYAML's finding on one line."""
    mark = getattr(error, "problem_mark", None)
    place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    return f"{getattr(error, 'problem', None) or error}{place}"


def _repeated_keys(node: Any, place: str, seen_nodes: set[int]) -> list[str]:
    """One line per key that a mapping holds twice; YAML would silently keep the last."""
    if id(node) in seen_nodes:  # an alias of a node that was read already
        return []
    seen_nodes.add(id(node))
    problems: list[str] = []
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            problems += _repeated_keys(item, f"{place}[{index}]", seen_nodes)
    elif isinstance(node, yaml.MappingNode):
        first_lines: dict[str, int] = {}
        for key, value in node.value:
            name = str(key.value)
            line = key.start_mark.line + 1
            inner = f"{place}.{name}" if place else name
            if name in first_lines:
                problems.append(f"{inner}: written twice, on lines {first_lines[name]} and {line}")
            first_lines.setdefault(name, line)
            problems += _repeated_keys(value, inner, seen_nodes)
    return problems


def apply_overrides(data: dict[str, Any], overrides: list[str]) -> list[str]:
    """Writes each ``a.b[2].c=value`` into ``data``; the value is read as YAML.

    Args:
        data: mapping of a job, changed in place.
        overrides: what followed ``--set``, applied in order.

    Returns:
        One line per override that could not be applied.
    """
    problems = []
    for override in overrides:
        try:
            _apply(data, override)
        except ConfigError as error:
            problems += error.problems
    return problems


def _apply(data: dict[str, Any], override: str) -> None:
    where, equals, text = override.partition("=")
    steps = _steps(where.strip())
    if not equals or not steps:
        raise ConfigError(f"--set {override}: expected key=value, such as optimizer.sparse.lr=0.1")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML: "
                          f"{_yaml_reason(error)}") from None
    target: Any = data
    for depth, step in enumerate(steps[:-1]):
        target = _descend(target, step, override, ".".join(map(str, steps[:depth])))
    _descend(target, steps[-1], override, ".".join(map(str, steps[:-1])), value=value)


_MISSING = object()


def _descend(target: Any, step: str | int, override: str, place: str,
             value: Any = _MISSING) -> Any:
    """Enters ``target`` at ``step``, or writes ``value`` there."""
    if isinstance(target, list):
        index = int(step) if str(step).isdigit() else -1
        if not 0 <= index < len(target):
            raise ConfigError(f"--set {override}: {place} is a list of {len(target)} entries, "
                              f"{step!r} is not one of them")
        if value is not _MISSING:
            target[index] = value
        return target[index]
    if not isinstance(target, dict):
        raise ConfigError(f"--set {override}: {place} is {target!r}, "
                          f"which has no {step!r}")
    if value is not _MISSING:
        target[step] = value
    elif target.get(step) is None:  # an absent section is made on the way
        target[step] = {}
    return target[step]


def _steps(where: str) -> list[str | int]:
    """``a.b[2].c`` as ["a", "b", 2, "c"]; empty where it is no such path."""
    steps: list[str | int] = []
    for part in where.split("."):
        matches = list(_STEP.finditer(part))
        if not matches or "".join(match.group(0) for match in matches) != part:
            return []
        steps += [match.group(1) or int(match.group(2)) for match in matches]
    return steps
