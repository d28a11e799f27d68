"""Checks of what users write: words of a list, known keys, shares; and nouns that are counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from shardlab.errors import ConfigError, nearest_name


def counted(number: int, noun: str) -> str:
    """``1 rank``, ``1,024 ranks``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def check_word(value: Any, known: Sequence[str] | Mapping[str, Any], where: str,
               what: str = "value") -> None:
    """Refuses a word that is not known.

    Raises:
        ConfigError: names the nearest known one.
    """
    if value not in known:
        raise ConfigError(f"{where}: unknown {what} {value!r}{nearest_name(str(value), [*known])}; "
                          f"known: {', '.join(known)}")


def check_share(value: Any, where: str) -> float:
    """A number in (0, 1].

    Raises:
        ConfigError: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ConfigError(f"{where}: expected a share above 0 and at most 1, found {value!r}")
    return float(value)


def refuse_unknown(value: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Refuses keys that are not known.

    Raises:
        ConfigError: names the first with the nearest known one.
    """
    for key in value:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{nearest_name(str(key), [*known])}; "
                              f"known: {', '.join(known)}")


def parse_enum(kind: type[Enum], value: Any, where: str) -> Any:
    """Returns the member of ``kind`` with this value, or raises a ConfigError listing them."""
    try:
        return kind(value)
    except ValueError:
        known = [member.value for member in kind]
        raise ConfigError(f"{where}: unknown {kind.__name__} {value!r}"
                          f"{nearest_name(str(value), known)}; known: {', '.join(known)}") from None
