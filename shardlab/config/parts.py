"""The valid parts of a job by place, also of a job that is not valid as a whole."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter, ValidationError

from shardlab.config.checks import VALID_TABLES
from shardlab.config.models import Section, TableConfig


def valid_parts(section: Section, place: str = "") -> dict[str, Any]:
    """Every field of a valid section, and of the sections in it, such as ``train.resume``."""
    parts: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        parts[place + name] = value
        if isinstance(value, Section):
            parts |= valid_parts(value, f"{place}{name}.")
    if isinstance(parts.get("tables"), tuple):
        parts[VALID_TABLES] = tuple(enumerate(parts["tables"]))
    return parts


def valid_parts_of(model: type[Section], data: dict[str, Any], place: str = "") -> dict[str, Any]:
    """Every field that would be valid on its own; an absent field counts with its default.

    Args:
        model: the section's model.
        data: what the user wrote there.
        place: dotted path of the section, ending in a dot, or empty at the top.
    """
    parts: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if name not in data:
            if not field.is_required():
                parts |= _with_inner(f"{place}{name}", field.default)
            continue
        annotation: Any = field.rebuild_annotation()
        try:
            value = TypeAdapter(annotation).validate_python(data[name])
            parts |= _with_inner(f"{place}{name}", value)
        except ValidationError:
            inner, written = field.annotation, data[name]
            if isinstance(inner, type) and issubclass(inner, Section) and isinstance(written, dict):
                parts |= valid_parts_of(inner, written, f"{place}{name}.")
    if isinstance(data.get("tables"), list):
        parts[VALID_TABLES] = _valid_tables(data["tables"])
    return parts


def _with_inner(place: str, value: Any) -> dict[str, Any]:
    inner = valid_parts(value, f"{place}.") if isinstance(value, Section) else {}
    return {place: value, **inner}


def _valid_tables(entries: list[Any]) -> tuple[tuple[int, TableConfig], ...]:
    valid = []
    for index, entry in enumerate(entries):
        try:
            valid.append((index, TableConfig.model_validate(entry)))
        except ValidationError:
            continue  # its lines are listed already
    return tuple(valid)
