"""Every error a user can meet, as one small tree.

Each message says what was asked, what was found and what to do, with names and values.
"""

from __future__ import annotations


class ShardLabError(Exception):
    """Base of all errors that ShardLab raises on purpose."""


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


class LaunchError(ShardLabError, RuntimeError):
    """Ranks could not be started, or one of them failed; names the rank."""


class ExchangeError(ShardLabError, RuntimeError):
    """Ranks could not talk: one ended, stalled or cannot be reached; names phase and rank."""


def nearest_name(wrong: str, known: list[str]) -> str:
    """Returns " (did you mean 'x'?)" for the closest known name, or an empty string."""
    from difflib import get_close_matches

    close = get_close_matches(wrong, known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
