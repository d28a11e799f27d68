"""Numbers as people read them: bytes, counts, durations."""

from __future__ import annotations

import math

_KILO = 1000.0
_ROUNDS_UP = 999.5  # three digits of this and more would read 1000


def format_bytes(size: float) -> str:
    """Bytes with a decimal prefix: 1234567 -> "1.23 MB"."""
    return _scaled(size, ("B", "kB", "MB", "GB", "TB", "PB"))


def format_count(count: float) -> str:
    """A count with a decimal suffix: 98765 -> "98.8 k"."""
    return _scaled(count, ("", "k", "M", "G", "T"))


def format_metric(value: float | None) -> str:
    """A metric with four decimals, or a dash where it is undefined."""
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"


def format_seconds(seconds: float) -> str:
    """A duration: 3723 -> "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    step = 0
    while abs(value) >= _ROUNDS_UP and step < len(units) - 1:
        value /= _KILO
        step += 1
    text = f"{value:.0f}" if step == 0 else f"{value:.3g}"
    return f"{text} {units[step]}".rstrip()
