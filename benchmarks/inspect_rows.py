"""Time and memory of `shardlab inspect` on a large table.

    python inspect_rows.py --dir /a/folder [--rows 10000000] [--dim 64]

Writes a checkpoint of one table, cut in two by columns, and looks at it in every way, each time in
a process of its own. Prints JSON lines with seconds and that process's most resident memory.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from benchlib import emit

from shardlab.storage import TableChunk
from shardlab.train.manifest import ALL, MANIFEST, Manifest, TableEntry
from shardlab.train.table_files import NamedChunk, TableFiles

_STEP = 1 << 16
_ROW = "4711"


def chunks(rows: int, columns: int) -> Iterator[NamedChunk]:
    """Normal rows, every third without a gradient."""
    for left in (0, columns // 2):
        generator = torch.Generator().manual_seed(left)
        for first in range(0, rows, _STEP):
            count = min(_STEP, rows - first)
            state = (torch.arange(first, first + count) % 3).float()
            yield NamedChunk("ebc", TableChunk(
                "user", first, left, torch.randn(count, columns // 2, generator=generator),
                {"sum": state}), ALL)


def write(folder: Path, rows: int, columns: int) -> None:
    """The checkpoint."""
    folder.mkdir(parents=True)
    written = TableFiles(folder, 0)
    written.write(chunks(rows, columns))
    table = TableEntry("ebc", "user", rows, columns)
    (folder / MANIFEST).write_bytes(Manifest(
        1, (table,), tuple(written.files), tuple(written.chunks), "row_wise_adagrad").to_bytes())


def look(folder: Path, *options: str) -> None:
    """Runs one inspection."""
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, "-m", "shardlab.cli", "inspect", str(folder), "user",
                           *options, "--json"], stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    emit(options=" ".join(options), seconds=time.perf_counter() - began, code=process.returncode,
         cpu_s=usage.ru_utime + usage.ru_stime, max_rss_mib=usage.ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", required=True, type=Path)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--dim", type=int, default=64)
    args = parser.parse_args()
    folder = args.dir / "step-1"
    try:
        write(folder, args.rows, args.dim)
        look(folder, "--rows", "5,9")
        look(folder, "--stats")
        look(folder, "--dead")
        look(folder, "--top-norm", "20")
        look(folder, "--neighbors", _ROW)
    finally:
        shutil.rmtree(args.dir)


if __name__ == "__main__":
    main()
