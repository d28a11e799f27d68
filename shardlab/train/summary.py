"""What a run came to, as plain data and as a table."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from shardlab.errors import REQUEUE, SIGNAL_EXIT
from shardlab.phases import PHASES
from shardlab.storage_bytes import TierBytes
from shardlab.train.cache_meter import CacheCounts, total_of
from shardlab.train.meters import Pace, SentBytes
from shardlab.train.metrics import BinaryMetrics
from shardlab.train.units import format_bytes, format_count, format_metric, format_seconds
from shardlab.train.wire_meter import TableWire

_SHOWN_MS = 0.005  # shorter phases would show as 0.00
_SHOWN_TABLES = 3  # those that send most
_SHOWN_RANKS = 8  # ranks listed one by one; with more, the range says enough


@dataclass(frozen=True)
class Summary:
    """The outcome of `Trainer.run`, equal on every rank.

    Attributes:
        run: the run folder.
        steps: training steps since the very start, earlier starts of a resumed run included.
        epochs: epochs completed.
        resumed_at: step this start continued from; 0 for a fresh run.
        stopped_by: the signal that ended the run early; None: it ran to its end.
        skipped_rows: bad training rows that this start's readers left out.
        pace: speed of this start's training steps, validation and checkpoints left out.
        train: metrics of the last log interval (AUC: of the running window).
        validation: metrics of the last validation; None: there was none.
        wire_per_step: mean bytes that all ranks sent per training step.
        tables: bytes of the tables by tier, one entry a rank.
        peak_rss_bytes: peak resident memory, one entry a rank.
        phase_ms: milliseconds of a step by phase, medians of the last steps, one entry a rank;
            empty where phases were not timed.
        checkpoint: the last checkpoint.
        transport: what the ranks' exchange ran over.
        hidden_share: of the exchange, by rank, what went on behind the training; None: nothing
            ran ahead.
        caches: counts of all ranks since this start, of every table that has a cache.
        wires: mean bytes of a step and worst relative errors of all ranks, of every table.
        dense_wire: codec of the dense part's gradients.
    """

    run: str
    steps: int
    epochs: int
    resumed_at: int
    stopped_by: int | None
    skipped_rows: int
    pace: Pace
    train: BinaryMetrics | None
    validation: BinaryMetrics | None
    wire_per_step: SentBytes
    tables: Sequence[TierBytes]
    peak_rss_bytes: Sequence[int]
    phase_ms: Sequence[Mapping[str, float]]
    checkpoint: str | None
    transport: str = ""
    hidden_share: Sequence[float | None] = ()
    caches: Mapping[str, CacheCounts] = field(default_factory=dict)
    wires: Mapping[str, TableWire] = field(default_factory=dict)
    dense_wire: str = "fp32"

    @property
    def exit_code(self) -> int:
        """What the process should exit with: 0, 143, 130 or 75 after SIGTERM, SIGINT or SIGUSR1."""
        if self.stopped_by is None:
            return 0
        return REQUEUE if self.stopped_by == signal.SIGUSR1 else SIGNAL_EXIT + self.stopped_by

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in ``summary.json``."""
        return {**asdict(self), "exit_code": self.exit_code,
                "wire_per_step": {**asdict(self.wire_per_step), "total": self.wire_per_step.total}}

    def table(self) -> Table:
        """The summary as a table for `rich.console.Console.print`."""
        table = Table(title=f"run {self.run}", show_header=False, title_justify="left")
        table.add_column("what", style="bold")
        table.add_column("value")
        for section in (self._run_rows(), self._quality_rows(), self._speed_rows(),
                        self._memory_rows()):
            for name, value in section.items():
                table.add_row(name, value)
            table.add_section()
        return table

    def _run_rows(self) -> Mapping[str, str]:
        rows = {"steps": f"{self.steps:,}" + (f" ({self.resumed_at:,} before this start)"
                                              if self.resumed_at else ""),
                "epochs completed": str(self.epochs)}
        if self.stopped_by is not None:
            rows["stopped by"] = signal.Signals(self.stopped_by).name
        if self.skipped_rows:
            rows["training rows skipped"] = f"{self.skipped_rows:,}"
        if self.transport:
            rows["exchange over"] = self.transport
        if self.checkpoint is not None:
            rows["checkpoint"] = self.checkpoint
        return rows

    def _quality_rows(self) -> Mapping[str, str]:
        rows = {}
        if self.train is not None:
            rows["train, last interval"] = (f"logloss {format_metric(self.train.logloss)}  "
                                            f"AUC {format_metric(self.train.auc)}")
        if self.validation is not None:
            rows |= {"validation rows": f"{self.validation.rows:,}",
                     "validation AUC": format_metric(self.validation.auc),
                     "validation logloss": format_metric(self.validation.logloss),
                     "validation NE": format_metric(self.validation.ne),
                     "validation calibration": format_metric(self.validation.calibration)}
        return rows

    def _speed_rows(self) -> Mapping[str, str]:
        pace, wire = self.pace, self.wire_per_step
        if not pace.steps:
            return {}
        kinds = (f"ids {format_bytes(wire.ids)}, rows {format_bytes(wire.rows)}, gradients "
                 f"{format_bytes(wire.gradients)}, dense all-reduce "
                 f"{format_bytes(wire.dense_all_reduce)}"
                 + (f" ({self.dense_wire})" if self.dense_wire != "fp32" else "")
                 + (f", between replicas {format_bytes(wire.sync)}" if wire.sync else ""))
        return {"training time": format_seconds(pace.seconds),
                "throughput, median": f"{format_count(pace.samples_per_s_median)} samples/s",
                "throughput, mean": f"{format_count(pace.samples_per_s_mean)} samples/s",
                "step p50 / p90": f"{pace.step_ms_p50:.2f} / {pace.step_ms_p90:.2f} ms",
                **self._phase_rows(),
                **self._hidden_rows(),
                "waiting for data": f"{pace.wait_share:.1%} of the time",
                "wire per step": f"{format_bytes(wire.total)}, all ranks: {kinds}",
                **self._host_rows(),
                **self._wire_rows()}

    def _host_rows(self) -> Mapping[str, str]:
        """What of ids, rows and gradients stayed on its host, where there are several."""
        wire = self.wire_per_step
        across = wire.total - wire.dense_all_reduce - wire.inside
        if not wire.inside or across < 1:  # means of counts: a difference of floats
            return {}
        return {"wire by host": f"{format_bytes(across)} across hosts, {format_bytes(wire.inside)} "
                "inside them (dense all-reduce left out)"}

    def _wire_rows(self) -> Mapping[str, str]:
        """The tables that send most, and the worst errors of what is sent."""
        sent = {name: wire for name, wire in self.wires.items() if wire.total}
        if not sent:
            return {}
        most = sorted(sent, key=lambda name: -sent[name].total)[:_SHOWN_TABLES]
        rows = {"wire by table": "; ".join(
            f"{name} {format_bytes(sent[name].total)} (ids {format_bytes(sent[name].ids)}, rows "
            f"{format_bytes(sent[name].rows)}, gradients {format_bytes(sent[name].gradients)})"
            for name in most) + ("" if len(most) == len(sent) else f"; {len(sent) - len(most)} "
                                 "more in summary.json")}
        worst = {"rows": max(sent, key=lambda name: sent[name].rows_error),
                 "gradients": max(sent, key=lambda name: sent[name].gradients_error)}
        errors = [f"{kind} {getattr(sent[name], kind + '_error'):.2g} ({name})"
                  for kind, name in worst.items() if getattr(sent[name], kind + "_error")]
        if errors:
            rows["wire, worst error of a row"] = ", ".join(errors)
        return rows

    def _phase_rows(self) -> Mapping[str, str]:
        """Mean over ranks of every phase that takes a visible time."""
        timed = [rank for rank in self.phase_ms if rank]
        if not timed:
            return {}
        mean = {phase: sum(rank[phase] for rank in timed) / len(timed) for phase in PHASES}
        return {"step by phase": ", ".join(f"{phase} {ms:.2f}" for phase, ms in mean.items()
                                           if ms >= _SHOWN_MS) + " ms"}

    def _hidden_rows(self) -> Mapping[str, str]:
        shares = [share for share in self.hidden_share if share is not None]
        return {"exchange hidden": f"{sum(shares) / len(shares):.1%} of its time, mean over "
                                   "ranks"} if shares else {}

    def _memory_rows(self) -> Mapping[str, str]:
        rows = {}
        for tier in ("hbm", "ddr", "ssd"):
            held = [getattr(rank, tier) for rank in self.tables]
            if sum(held):
                by_rank = f" ({_by_rank(held)})" if len(held) > 1 else ""
                rows[f"tables on {tier}"] = format_bytes(sum(held)) + by_rank
        if self.caches and self.pace.steps:
            every = total_of(self.caches)
            worst = min(self.caches, key=lambda name: self.caches[name].hit_rate)
            rows["cache hits"] = (f"{every.hit_rate:.1%} of the rows asked for; least "
                                  f"{self.caches[worst].hit_rate:.1%}, {worst}")
            rows["cache traffic"] = (f"{format_bytes(every.moved_bytes / self.pace.steps)} a step, "
                                     f"{every.evictions / self.pace.steps:,.0f} evictions")
        rows["peak RSS by rank"] = _by_rank(self.peak_rss_bytes)
        return rows


def _by_rank(sizes: Sequence[int]) -> str:
    if len(sizes) <= _SHOWN_RANKS:
        return ", ".join(format_bytes(size) for size in sizes)
    return f"{format_bytes(min(sizes))} to {format_bytes(max(sizes))} over {len(sizes)} ranks"
