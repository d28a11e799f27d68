"""Numbers with units, as reports and errors show them."""

from __future__ import annotations

_STEP = 1024


def format_bytes(size: float) -> str:
    """``1536`` -> ``"1.5 KiB"``; three significant digits or more."""
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(value) < _STEP or unit == "PiB":
            break
        value /= _STEP
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.4g} {unit}"


def format_ms(ms: float) -> str:
    """Milliseconds with three significant digits, microseconds below 0.1 ms."""
    return f"{ms * 1e3:.3g} us" if abs(ms) < 0.1 else f"{ms:.3g} ms"
