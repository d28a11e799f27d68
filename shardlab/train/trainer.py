"""The training loop: steps, metrics, validation, checkpoints, and an orderly end.

    restore -> for each epoch: for each batch: step; then log, validate, save where due -> finish

Everything between two checkpoints follows from the checkpoint and the data alone: a run that was
killed and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from shardlab.comm.collectives import all_reduce_, gather_objects_json
from shardlab.comm.groups import Groups
from shardlab.errors import CheckpointError, StallError
from shardlab.sharded import prefetching
from shardlab.sharded.depth_trial import DepthChoice
from shardlab.sharded.trace import Trace, chrome_trace
from shardlab.storage_bytes import TierBytes
from shardlab.train.cache_meter import CacheCounts, as_record, total_of
from shardlab.train.checkpoint import load
from shardlab.train.checkpoint_writer import CheckpointWriter
from shardlab.train.events import EventWriter
from shardlab.train.finite import FiniteGuard
from shardlab.train.interval import Interval, IntervalLog
from shardlab.train.meters import SentBytes, model_tier_bytes, peak_rss_bytes
from shardlab.train.metrics import BinaryMetrics, ValidationMetrics
from shardlab.train.options import TrainOptions
from shardlab.train.progress import ProgressLine, ProgressView
from shardlab.train.pruned_meter import PrunedMeter
from shardlab.train.pruned_plot import write_pruned_plot
from shardlab.train.reader import Reader, reader_from
from shardlab.train.run_folder import RunFolder
from shardlab.train.step import StepRunner
from shardlab.train.stop_signal import StopSignal
from shardlab.train.summary import Summary
from shardlab.train.units import format_metric
from shardlab.train.watchdog import Watchdog, print_and_exit
from shardlab.train.wire_meter import TableWire, wire_record

if TYPE_CHECKING:
    from shardlab.data.batch import Batch
    from shardlab.sharded import ShardedModel


@dataclass
class Position:
    """Where a run is; saved with every checkpoint.

    Attributes:
        step: training steps done, over all epochs.
        epoch: epochs completed.
        data: `Batch.position` of the epoch's last step; None: the epoch has not begun.
        records: records in ``metrics.jsonl``.
        validated_at: step of the last validation.
    """

    step: int = 0
    epoch: int = 0
    data: int | None = None
    records: int = 0
    validated_at: int = 0


@dataclass
class Trainer:
    """Trains a sharded model on clicks; every rank makes one and calls `run`.

    Attributes:
        model: the model that `shardlab.shard` returned; maps (dense, features) to logits.
        optimizer: the optimiser that came with it.
        groups: the ranks of the job.
        train_reader: this rank's part of the training rows.
        validation_reader: this rank's part of the validation rows; None: no validation.
        run_folder: from `open_run_folder`.
        options: how long to train, and what to do on the way.
        scheduler: from `build_schedule`, or any torch scheduler that is stepped once a step.
        console: where rank 0 shows progress; None: the standard output.
        on_stall: ends this process, which makes no progress.
    """

    model: ShardedModel
    optimizer: torch.optim.Optimizer
    groups: Groups
    train_reader: Reader
    validation_reader: Reader | None
    run_folder: RunFolder
    options: TrainOptions
    scheduler: LRScheduler | None = None
    console: Console | None = None
    on_stall: Callable[[StallError], None] = print_and_exit

    def __post_init__(self) -> None:
        self._first = self.groups.rank == 0
        self._at = Position()
        self._step = StepRunner(self.model, self.optimizer, self.scheduler, self.groups.device,
                                self.options.dense_dtype, self.groups.world_size,
                                FiniteGuard(self.model, self.groups, self.options.on_nan))
        self._watch = Watchdog(self.model.clock, self.groups, self.options.stall_timeout_s,
                               self.on_stall)
        self._saves = CheckpointWriter(self.model, self.optimizer, self.groups,
                                       self.options.saving, self._watch.beat)
        self._depth = self.options.depth
        self._signal = StopSignal()
        self._log = IntervalLog(self.model, self.groups, self._signal)
        self._interval: Interval | None = None
        self._sent = SentBytes()
        self._skipped = 0
        self._caches: dict[str, CacheCounts] = {}
        if self.options.trace is not None:
            self.model.clock.trace = Trace(self.options.trace)
        self._wires: dict[str, TableWire] = {}
        self._pruned = PrunedMeter(self.model, self.groups)
        if self.options.time_phases:
            self.model.clock.time_device()
        self._validation: BinaryMetrics | None = None
        self._checkpoint: Path | None = None
        self._stopped_by: int | None = None

    def run(self) -> Summary:
        """Trains to the end, or until a stop signal; returns what it came to.

        SIGTERM, SIGINT and SIGUSR1 end the run at the next log interval, or `STOP_WITHIN_S`
        later where intervals are longer, with a checkpoint; the process should then exit with
        `Summary.exit_code`.

        Raises:
            ShardLabError: the loss is not finite; names the step.
            CheckpointError: a checkpoint could not be read or written.
        """
        self._restore()
        resumed_at = self._at.step
        self._view = ProgressView(self.console or Console(), self._first, self._steps_planned(),
                                  resumed_at)
        self._events = EventWriter(self.run_folder.tensorboard, resumed_at,
                                   enabled=self.options.tensorboard and self._first)
        with self._signal, self._view, self._events, self._saves, self._watch:
            if self._at.step and self._due(self.options.validate_every):
                self._validate()  # a run that was asked to stop left it out
            while not self._done():
                self._run_epoch()
            self._finish()
        return self._summarise(resumed_at)

    def _restore(self) -> None:
        torch.manual_seed(self.options.seed + self.groups.rank)
        source = self.run_folder.resume_from
        if source is not None:
            extra = load(source, self.model, self.optimizer, self.groups)
            if extra:  # an imported checkpoint is no point of a run: this one starts with it
                self._at = Position(**extra["position"])
                self._log.window.load_state_dict(extra["window"])
                self._restore_schedule(source, extra["scheduler"])
            if source.parent.resolve() != self.run_folder.checkpoints.resolve():
                self._at.records = 0
            self._checkpoint = source
        if self._first:
            self.run_folder.keep_metrics(self._at.records)

    def _restore_schedule(self, source: Path, state: dict[str, Any] | None) -> None:
        if (state is None) != (self.scheduler is None):
            has, lacks = ("the job", source) if state is None else (source, "the job")
            raise CheckpointError(f"{has} has a learning-rate schedule, {lacks} has none; resume "
                                  "with the job that the run was started with")
        if self.scheduler is not None and state is not None:
            self.scheduler.load_state_dict(state)

    def _steps_planned(self) -> int:
        steps = self.options.epochs * len(self.train_reader)
        return min(steps, self.options.max_steps or steps)

    def _done(self) -> bool:
        at, options = self._at, self.options
        return self._stopped_by is not None or at.epoch >= options.epochs or \
            (options.max_steps is not None and at.step >= options.max_steps)

    def _run_epoch(self) -> None:
        self.model.train()
        self._log.restart()
        reader = reader_from(self.train_reader, self._at.data)
        moved = (batch.to(self.groups.device) for batch in reader)
        for batch in prefetching(moved, self.model, lambda batch: batch.sparse,
                                 depth=self._depth, staleness=self.options.staleness,
                                 chosen=self._keep_depth):
            self._train(batch)
            self._after_step()
            if self._done():
                return
        self._flush()
        if self._stopped_by is None:
            self._validate()
            self._at.epoch, self._at.data = self._at.epoch + 1, None

    def _keep_depth(self, choice: DepthChoice) -> None:
        """Later epochs take what the first one found."""
        self._depth = choice.depth
        self._view.say(choice.text)
        plain, ahead = choice.step_ms
        self._record("depth", {"depth": choice.depth, "plain_step_ms": plain,
                               "ahead_step_ms": ahead})

    def _train(self, batch: Batch) -> None:
        self._log.got_batch()
        begin = self.train_reader.start if self._at.data is None else self._at.data
        rows = batch.position - begin  # of all ranks; a bad row that a reader skipped adds no loss
        self._watch.beat(f"training step {self._at.step + 1}")
        done = self._step.train(batch, rows, self._at.step + 1)
        if done is None:
            self._log.add_skipped(rows)
        else:
            logits, loss = done
            self._log.add(logits, batch.labels, loss, rows)
        self._at.step += 1
        self._at.data = batch.position

    def _after_step(self) -> None:
        """Logs, validates and saves where that is due, in this order."""
        self._view.step(self._at.step)
        validate, save_now = self._due(self.options.validate_every), \
            self._due(self.options.checkpoint_every)
        due = validate or save_now or self._due(self.options.log_every)
        if not (due or self._log.stop_wanted()):
            return
        self._flush()
        if validate and self._stopped_by is None:
            self._validate()
        if save_now:
            self._save()
        self._log.restart()

    def _due(self, every: int | None) -> bool:
        return every is not None and self._at.step % every == 0

    def _flush(self) -> None:
        """Closes the log interval on all ranks: metrics, progress, stop signals."""
        interval = self._log.flush(self._at.step)
        if interval is None:
            return
        metrics, pace, wire = interval.metrics, interval.pace, interval.wire / interval.pace.steps
        skipped = pace.rows - metrics.rows  # a reader that skips a bad row keeps its place empty
        self._interval, self._sent = interval, self._sent + interval.wire
        self._skipped += skipped
        self._stopped_by = interval.stop
        self._record("train", {
            "loss": metrics.logloss, "auc": metrics.auc, "ne": metrics.ne,
            "calibration": metrics.calibration, "label_rate": metrics.label_rate,
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            "samples_per_s": pace.samples_per_s_mean, "step_ms": pace.step_ms_p50,
            "wait_share": pace.wait_share, "wire_bytes_per_step": wire.total,
            "dense_bytes_per_step": wire.dense_all_reduce,
            "skipped_rows": skipped, "phase_ms": interval.phase_ms,
            **as_record(interval.caches, pace.steps),
            **wire_record(interval.wires, pace.steps)})
        pruned = self._pruned.take()
        if pruned:
            self._record("pruned", pruned)
        for table, sent in interval.wires.items():
            self._wires[table] = self._wires.get(table, TableWire()) + sent
        for table, counts in interval.caches.items():
            self._caches[table] = self._caches.get(table, CacheCounts()) + counts
        rate = total_of(interval.caches).hit_rate if interval.caches else None
        self._view.show(ProgressLine(self._at.step, self._at.epoch, metrics.logloss, metrics.auc,
                                     pace.samples_per_s_mean, wire.total, rate,
                                     wire.dense_all_reduce))

    def _record(self, kind: str, values: dict[str, Any]) -> None:
        self._at.records += 1
        if self._first:
            record = {"kind": kind, "step": self._at.step, "epoch": self._at.epoch, **values}
            self.run_folder.append_metrics(record)
            self._events.write(record)

    def _validate(self) -> None:
        """Runs the validation reader once, unless that was done at this step already."""
        if self.validation_reader is None or self._at.validated_at == self._at.step:
            return
        started = time.perf_counter()
        metrics = ValidationMetrics(self.groups.device, self._reduce, self.groups.rank,
                                    self.groups.world_size)
        self.model.eval()
        for number, batch in enumerate(self.validation_reader, 1):
            self._watch.beat(f"validation batch {number} after step {self._at.step}")
            moved = batch.to(self.groups.device)
            metrics.add(self._step.predict(moved), moved.labels)
        self.model.train()
        found = self._validation = metrics.result()
        self._at.validated_at = self._at.step
        self._record("validation", {**asdict(found), "seconds": time.perf_counter() - started})
        self._view.say(f"step {self._at.step}  validation on {found.rows:,} rows  "
                       f"AUC {format_metric(found.auc)}  logloss {format_metric(found.logloss)}  "
                       f"NE {format_metric(found.ne)}  "
                       f"calibration {format_metric(found.calibration)}")

    def _reduce(self, tensor: Tensor) -> None:
        all_reduce_(tensor, self.groups)

    def _save(self) -> None:
        path = self.run_folder.checkpoints / f"step-{self._at.step}"
        if self._checkpoint is not None and self._checkpoint.name == path.name:
            return
        self._watch.beat(f"checkpoint {path.name}")
        if self._first:
            self.run_folder.sync_metrics()
        extra = {"position": asdict(self._at), "window": self._log.window.state_dict(),
                 "scheduler": self.scheduler.state_dict() if self.scheduler else None}
        self._checkpoint = self._saves.save(path, extra)
        self._watch.beat(f"what follows checkpoint {path.name}")

    def _finish(self) -> None:
        """Closes the last interval; validates unless the run was asked to stop; saves."""
        self._flush()
        if self._stopped_by is None:
            self._validate()
        self._save()
        self._saves.finish()
        if self._first and self._pruned.tables:
            write_pruned_plot(self.run_folder.metrics, self.run_folder.path / "pruned.svg")

    def _summarise(self, resumed_at: int) -> Summary:
        steps = self._at.step - resumed_at
        ranks = gather_objects_json(
            {"hidden": self.model.clock.hidden_share(),
             "trace": [] if self.model.clock.trace is None else self.model.clock.trace.boxes(),
             "tables": asdict(model_tier_bytes(self.model)), "rss": peak_rss_bytes(),
             "phase_ms": self.model.clock.median_ms()}, self.groups)
        summary = Summary(
            run=str(self.run_folder.path), steps=self._at.step, epochs=self._at.epoch,
            resumed_at=resumed_at, stopped_by=self._stopped_by, skipped_rows=self._skipped,
            pace=self._log.timer.total(), train=self._interval.metrics if self._interval else None,
            validation=self._validation, wire_per_step=self._sent / max(1, steps),
            tables=[TierBytes(**rank["tables"]) for rank in ranks],
            peak_rss_bytes=[rank["rss"] for rank in ranks],
            phase_ms=[rank["phase_ms"] for rank in ranks], caches=self._caches,
            wires={table: sent.per_step(max(1, steps)) for table, sent in self._wires.items()},
            checkpoint=None if self._checkpoint is None else str(self._checkpoint),
            dense_wire=self.model.reducer.codec if self.model.reducer else "fp32",
            transport=self.groups.transport, hidden_share=[rank["hidden"] for rank in ranks])
        if self._first and self.options.trace is not None:
            self.run_folder.write_trace(chrome_trace([rank["trace"] for rank in ranks]))
        if self._first:
            self.run_folder.write_summary(summary.to_dict())
        return summary
