"""Every error a user can meet, as one small tree, and the codes that processes end with.

Each message says what was asked, what was found and what to do, with names and values.
"""

from __future__ import annotations

#: Exit codes; docs/launch.md lists them with what follows from each.
FAILURE, USER_ERROR, DOES_NOT_FIT, NOT_FINITE, STALLED = 1, 2, 3, 4, 5
#: A checkpoint was asked for and taken; start the same job again (EX_TEMPFAIL of sysexits.h).
REQUEUE = 75
#: Shells report a process that signal n ended as this + n.
SIGNAL_EXIT = 128


class ShardLabError(Exception):
    """Base of all errors that ShardLab raises on purpose.

    Attributes:
        exit_code: what the process that it ends should exit with.
    """

    exit_code = USER_ERROR


class ConfigError(ShardLabError, ValueError):
    """A job or table description is wrong; lists every problem found.

    Args:
        problems: one line per problem, each starting with the place it was found at.
    """

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class InputError(ShardLabError, ValueError):
    """A batch does not fit the tables: unknown or missing feature, wrong dtype or shape."""


class BoundsError(InputError):
    """An id lies outside its table; names feature, table, rank, row of the batch and value."""


class PlanError(ShardLabError, ValueError):
    """A sharding plan does not fit the tables, the world size or the memory."""


class DataError(ShardLabError, ValueError):
    """A data file cannot be read; names file and line or row group."""


class CheckpointError(ShardLabError, RuntimeError):
    """A checkpoint is missing, torn, corrupted or foreign; names the file and the reason."""


class StorageError(ShardLabError, RuntimeError):
    """A file of the SSD tier failed or is not what it should be; names table, file and rows."""


class ForecastError(PlanError):
    """A job would not fit a machine's memory; carries what it needs, by table and tier."""

    exit_code = DOES_NOT_FIT


class NotFiniteError(ShardLabError, ArithmeticError):
    """A loss or a gradient is NaN or infinite; names step, rows, and table or feature."""

    exit_code = NOT_FINITE


class StallError(ShardLabError, TimeoutError):
    """No step ended for too long; names the rank and the phase that others wait for."""

    exit_code = STALLED


class LaunchError(ShardLabError, RuntimeError):
    """Ranks could not be started, or one of them failed; names the rank.

    Args:
        message: what happened.
        exit_code: that of the rank that failed.
    """

    def __init__(self, message: str, exit_code: int = USER_ERROR) -> None:
        self.exit_code = exit_code
        super().__init__(message)


class ExchangeError(ShardLabError, RuntimeError):
    """Ranks could not talk: one ended, stalled or cannot be reached; names phase and rank."""

    exit_code = FAILURE


def nearest_name(wrong: str, known: list[str]) -> str:
    """Returns " (did you mean 'x'?)" for the closest known name, or an empty string."""
    from difflib import get_close_matches

    close = get_close_matches(wrong, known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
