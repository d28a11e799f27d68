"""The folder of one training run: what was asked, what was planned, what came out.

    runs/<name or time>/
        job.yaml        the resolved job
        plan.json       the sharding plan
        metrics.jsonl   one JSON object per log interval and per validation
        summary.json    the final summary
        tensorboard/    events, if asked for
        checkpoints/    step-N folders

Every rank holds a `RunFolder`; only rank 0 writes.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from shardlab.comm.collectives import broadcast_text
from shardlab.comm.groups import Groups
from shardlab.errors import CheckpointError, ConfigError
from shardlab.train.retention import latest

DEFAULT_ROOT = Path("runs")


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run, and the checkpoint it continues from (None: it starts anew)."""

    path: Path
    resume_from: Path | None = None

    @property
    def checkpoints(self) -> Path:
        """Folder of the ``step-N`` checkpoints."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's events."""
        return self.path / "tensorboard"

    @property
    def metrics(self) -> Path:
        """The file of metric records."""
        return self.path / "metrics.jsonl"

    def write_job(self, text: str) -> None:
        """Writes the resolved job, as YAML text (rank 0 only)."""
        _write_whole(self.path / "job.yaml", text)

    def write_plan(self, text: str) -> None:
        """Writes the sharding plan, as JSON text (rank 0 only)."""
        _write_whole(self.path / "plan.json", text)

    def write_wire(self, text: str) -> None:
        """Writes by what the codecs of the wire were chosen, as JSON text (rank 0 only)."""
        _write_whole(self.path / "wire.json", text)

    def write_exchange(self, text: str) -> None:
        """Writes how ranks exchange across hosts, and why, as JSON text (rank 0 only)."""
        _write_whole(self.path / "exchange.json", text)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes the final summary (rank 0 only)."""
        _write_whole(self.path / "summary.json", json.dumps(finite(summary), indent=1) + "\n")

    def write_trace(self, trace: dict[str, Any]) -> None:
        """Writes the timeline of the first steps (rank 0 only)."""
        _write_whole(self.path / "trace.json", json.dumps(trace))

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Appends one record to ``metrics.jsonl`` (rank 0 only); NaN becomes null."""
        with open(self.metrics, "a") as file:
            file.write(json.dumps(finite(record)) + "\n")

    def sync_metrics(self) -> None:
        """Flushes the metric records to the disk, before a checkpoint counts them (rank 0)."""
        with open(self.metrics, "a") as file:
            os.fsync(file.fileno())

    def keep_metrics(self, records: int) -> None:
        """Cuts ``metrics.jsonl`` to its first records (rank 0 only).

        What a run wrote after the checkpoint it is resumed from goes, a half-written line too.

        Raises:
            CheckpointError: the file has fewer records than the checkpoint counted.
        """
        lines = self.metrics.read_text().splitlines(keepends=True) if self.metrics.exists() else []
        if len(lines) < records:
            raise CheckpointError(f"{self.metrics} has {len(lines)} records, the checkpoint was "
                                  f"taken after {records}; put the file back, or resume in a new "
                                  "run folder")
        _write_whole(self.metrics, "".join(lines[:records]))


def open_run_folder(path: str | Path | None, resume: str, groups: Groups) -> RunFolder:
    """Chooses and makes the folder of a run; every rank must call it, and all get the same.

    Args:
        path: the folder; None: ``runs/<date-time>``, new.
        resume: ``auto`` continues from the newest checkpoint in the folder, or starts anew where
            there is none; ``never`` wants a folder without a run; anything else is the path of
            the checkpoint to continue from.
        groups: the ranks of the job.

    Raises:
        ConfigError: ``never``, and the folder holds a run; or its newest checkpoint is not the
            one to continue from, so that later saves could meet it.
        CheckpointError: the checkpoint to continue from does not exist.
    """
    failure: ConfigError | CheckpointError | None = None
    answer = None
    if groups.rank == 0:
        try:
            answer = json.dumps(_choose(path, resume))
        except (ConfigError, CheckpointError) as error:
            failure, answer = error, json.dumps([type(error).__name__, str(error)])
    chosen = json.loads(broadcast_text(answer, groups))
    if isinstance(chosen, list):
        raise failure or {"ConfigError": ConfigError,
                          "CheckpointError": CheckpointError}[chosen[0]](chosen[1])
    resume_from = chosen["resume_from"]
    return RunFolder(Path(chosen["path"]), None if resume_from is None else Path(resume_from))


def _choose(path: str | Path | None, resume: str) -> dict[str, str | None]:
    folder = RunFolder(_new_folder() if path is None else Path(path))
    newest = latest(folder.checkpoints)
    if resume == "never":
        if newest is not None or folder.metrics.exists():
            raise ConfigError(f"train.run_dir: {folder.path} already holds a run; set "
                              "train.resume=auto to continue it, or name another folder")
        newest = None
    elif resume != "auto":
        asked = Path(resume)
        if not asked.is_dir():
            raise CheckpointError(f"train.resume: {asked} is not a checkpoint folder")
        if newest is not None and newest.resolve() != asked.resolve():
            raise ConfigError(f"train.resume: {folder.path} already has checkpoint {newest.name}; "
                              "remove it, or name another train.run_dir")
        newest = asked
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    return {"path": str(folder.path), "resume_from": None if newest is None else str(newest)}


def _new_folder() -> Path:
    """A folder named by the time that does not exist yet."""
    name = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    path, number = DEFAULT_ROOT / name, 1
    while path.exists():
        number += 1
        path = DEFAULT_ROOT / f"{name}-{number}"
    return path


def finite(value: Any) -> Any:
    """The same plain data with NaN and infinities as None, which JSON can say."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def _write_whole(path: Path, text: str) -> None:
    """Replaces a file at once: a reader sees the old text or the new."""
    staging = path.with_name(f".tmp-{path.name}")
    staging.write_text(text)
    os.replace(staging, path)
