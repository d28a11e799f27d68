"""pydantic's findings as lines that start with the YAML path and say what to write instead."""

from __future__ import annotations

import re
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from shardlab.errors import nearest_name

_LONGEST_VALUE = 60
_EXPECTED = {"model_type": "a mapping", "dict_type": "a mapping", "tuple_type": "a list",
             "too_short": "longer", "string_type": "a text", "float_type": "a number",
             "float_parsing": "a number", "int_type": "a whole number",
             "int_parsing": "a whole number", "int_from_float": "a whole number",
             "bool_type": "true or false", "bool_parsing": "true or false"}


def problem_lines(model: type[BaseModel], data: Any, error: ValidationError) -> list[str]:
    """One line per finding, such as ``tables[3].embedding_dim: must be greater than 0, found 0``.

    Args:
        model: the model that refused the data; its fields are the known keys.
        data: what it refused, as it was written.
        error: what it found.
    """
    lines: list[str] = []
    for found in error.errors(include_url=False):
        if found["type"] == "job":  # the checks across fields write whole lines themselves
            lines += found["msg"].split("\n")
        elif found["type"] == "placed":  # starts with ":" or with a deeper place
            lines.append(f"{_place(found['loc'], data)}{found['msg']}")
        else:
            lines.append(f"{_place(found['loc'], data)}: {_reason(model, found)}")
    return lines


def _place(loc: tuple[int | str, ...], data: Any) -> str:
    """("tables", "@TableConfig", 3, "name") as ``tables[3].name``."""
    text = ""
    for step in loc:
        if str(step).startswith("@"):
            continue
        if isinstance(step, int):
            if isinstance(data, str):
                break  # one word was written where a list may stand
            text += f"[{step}]"
            data = data[step] if isinstance(data, list) and step < len(data) else None
        else:
            text += f".{step}"
            data = data.get(step) if isinstance(data, dict) else None
    return text.removeprefix(".")


def _reason(model: type[BaseModel], found: Any) -> str:
    kind, value, message = found["type"], found["input"], str(found["msg"])
    if kind == "extra_forbidden":
        known = _keys_at(model, found["loc"][:-1])
        wrong = str(found["loc"][-1])
        return f"unknown key{nearest_name(wrong, known)}; known: {', '.join(known)}"
    if kind == "missing":
        return "is required, but not given"
    if kind in _EXPECTED:
        return f"must be {_EXPECTED[kind]}, found {_short(value)}"
    choices = re.findall(r"'([^']*)'", str(found.get("ctx", {}).get("expected", "")))
    hint = nearest_name(value, choices) if choices and isinstance(value, str) else ""
    return f"{message.replace('Input should', 'must', 1)}, found {_short(value)}{hint}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _keys_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Known keys of the mapping at ``loc``."""
    models = [model]
    for step in loc:
        if isinstance(step, int):
            continue
        if step.startswith("@"):  # the arm of a union that pydantic chose
            models = [arm for arm in models if arm.__name__ == step[1:]]
        else:
            models = [inner for outer in models
                      for inner in _models_in(outer.model_fields[step].annotation)]
    return [name for known in models for name in known.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """All models that an annotation such as ``tuple[A, ...] | B`` mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]
