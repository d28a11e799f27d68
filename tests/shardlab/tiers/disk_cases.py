"""What the tests of the disk share: engines that run here, files with known records."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from shardlab.ops.registry import native
from shardlab.tiers import Disk, FileSpec, RecordFile


def _engines() -> list[str]:
    module = native()
    if module is None:
        return ["reference"]
    uring = ["io_uring"] if Disk("auto").describe().startswith("io_uring") else []
    return [*uring, "threads", "reference"]


ENGINES = _engines()

#: Record sizes: many to a page, two, one, several pages each.
SIZES = [1, 68, 2044, 4088, 4089, 20000]


def random_records(rows: int, record_bytes: int) -> Tensor:
    return torch.randint(0, 256, (rows, record_bytes), dtype=torch.uint8)


def filled_file(disk: Disk, path: Path, rows: int, record_bytes: int = 68, table: str = "user",
                salt: int = 7, checksums: bool = True) -> tuple[RecordFile, Tensor]:
    """A new file and the random records in it."""
    file = RecordFile.create(disk, path, FileSpec(table, rows, record_bytes, salt, checksums))
    records = random_records(rows, record_bytes)
    file.write_records(range(rows), records)
    return file, records


def read(file: RecordFile, rows: Tensor | range) -> Tensor:
    out = torch.full((len(rows), file.spec.record_bytes), 165, dtype=torch.uint8)
    file.read_records(rows, out)
    return out


def as_index(rows: Tensor | range) -> Tensor:
    return torch.arange(rows.start, rows.stop) if isinstance(rows, range) else rows
