"""The final summary as a table and as plain data."""

from __future__ import annotations

import io
import json
import signal
from dataclasses import replace

from rich.console import Console

from shardlab.phases import MEASURED_PHASES
from shardlab.storage_bytes import TierBytes
from shardlab.train.meters import Pace, SentBytes
from shardlab.train.metrics import BinaryMetrics
from shardlab.train.summary import Summary

METRICS = BinaryMetrics(rows=13_714, auc=0.7654, logloss=0.4712, ne=0.8266, calibration=1.012,
                        label_rate=0.256)
SUMMARY = Summary(
    run="runs/a", steps=1200, epochs=1, resumed_at=0, stopped_by=None, skipped_rows=0,
    pace=Pace(1200, 4_915_200, 62.0, 79_277.4, 81_000.0, 50.5, 61.25, 0.031),
    train=replace(METRICS, logloss=0.4533), validation=METRICS,
    wire_per_step=SentBytes(300e3, 1.2e6, 1.2e6, 2e6),
    tables=[TierBytes(hbm=100_000_000), TierBytes(hbm=120_000_000, ddr=5_000)],
    peak_rss_bytes=[500_000_000, 510_000_000],
    phase_ms=[dict.fromkeys(MEASURED_PHASES, 0.0) | {"ids": 1.5, "dense": ms} for ms in (3, 4)],
    checkpoint="runs/a/checkpoints/step-1200",
    transport="shared memory: all ranks are on one host")


def shown(summary: Summary) -> str:
    out = io.StringIO()
    Console(file=out, width=150).print(summary.table())
    return out.getvalue()


def test_table_says_everything() -> None:
    text = shown(SUMMARY)
    for part in ("run runs/a", "1,200", "validation AUC", "0.7654", "0.4712", "0.8266", "1.0120",
                 "81 k samples/s", "79.3 k samples/s", "50.50 / 61.25 ms", "3.1% of the time",
                 "4.7 MB, all ranks: ids 300 kB, rows 1.2 MB, gradients 1.2 MB, dense all-reduce "
                 "2 MB", "220 MB (100 MB, 120 MB)", "5 kB (0 B, 5 kB)", "500 MB, 510 MB",
                 "0:01:02", "ids 1.50, dense 3.50 ms", "logloss 0.4533", "step-1200",
                 "shared memory: all ranks"):
        assert part in text
    assert "stopped by" not in text
    assert "ssd" not in text
    assert "skipped" not in text
    assert "training rows skipped" in shown(replace(SUMMARY, skipped_rows=3))


def test_hosts_are_told_apart_where_there_are_several() -> None:
    several = SentBytes(300e3, 1.2e6, 1.2e6, 2e6, inside=700e3)
    assert "2 MB across hosts, 700 kB inside them" in shown(replace(SUMMARY, wire_per_step=several))
    # On one host all of it is inside; means of counts may differ in the last bits.
    for inside in (2.7e6, 2.7e6 + 1e-9, 2.7e6 - 1e-9):
        one = SentBytes(300e3, 1.2e6, 1.2e6, 2e6, inside=inside)
        assert "by host" not in shown(replace(SUMMARY, wire_per_step=one))


def test_table_of_a_run_that_was_stopped_before_a_step() -> None:
    text = shown(replace(SUMMARY, pace=Pace(0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0), train=None,
                         validation=None, stopped_by=signal.SIGTERM, resumed_at=1200))
    assert "SIGTERM" in text
    assert "1,200 (1,200 before this start)" in text
    assert "throughput" not in text
    assert "AUC" not in text


def test_many_ranks_are_given_as_a_range() -> None:
    text = shown(replace(SUMMARY, peak_rss_bytes=[i * 10**9 for i in range(1, 17)]))
    assert "1 GB to 16 GB over 16 ranks" in text


def test_exit_code_is_the_shells() -> None:
    assert SUMMARY.exit_code == 0
    assert replace(SUMMARY, stopped_by=signal.SIGTERM).exit_code == 143
    assert replace(SUMMARY, stopped_by=signal.SIGINT).exit_code == 130


def test_plain_data_is_json() -> None:
    data = json.loads(json.dumps(SUMMARY.to_dict()))
    assert data["validation"]["auc"] == 0.7654
    assert data["wire_per_step"] == {"ids": 300e3, "rows": 1.2e6, "gradients": 1.2e6,
                                     "dense_all_reduce": 2e6, "inside": 0, "sync": 0,
                                     "total": 4.7e6}
    assert data["tables"][1] == {"hbm": 120_000_000, "ddr": 5_000, "ssd": 0}
    assert data["phase_ms"][1]["dense"] == 4
    assert data["exit_code"] == 0


def test_phases_that_were_not_timed_are_not_shown() -> None:
    assert "by phase" not in shown(replace(SUMMARY, phase_ms=[{}, {}]))
