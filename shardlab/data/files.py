"""Which files a path or pattern names."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence

from shardlab.errors import DataError


def expand_paths(path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    """Files in reading order: patterns in the order given, each one's matches sorted.

    Raises:
        DataError: no path, a pattern without a match, a folder, or a file without permission.
    """
    patterns = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    if not patterns:
        raise DataError("data path: none given; name a file or a pattern")
    files = []
    for pattern in map(os.fspath, patterns):
        # A file may have a name that also reads as a pattern.
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
        if not found:
            raise DataError(f"data path {pattern!r}: no such file, and no file matches it as a "
                            f"pattern (looked in {os.getcwd()})")
        files += found
    for file in files:
        if os.path.isdir(file):
            raise DataError(f"{file}: is a folder; name its files, such as {file}/*")
        if not os.access(file, os.R_OK):
            raise DataError(f"{file}: no permission to read it")
    return files
