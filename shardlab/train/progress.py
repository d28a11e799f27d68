"""What a person sees while training: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from shardlab.train.units import format_bytes, format_count, format_metric


@dataclass(frozen=True)
class ProgressLine:
    """One line of progress; rows and bytes are those of all ranks."""

    step: int
    epoch: int
    loss: float
    auc: float
    samples_per_s: float
    wire_bytes_per_step: float
    cache_hit_rate: float | None = None
    dense_bytes_per_step: float = 0.0

    @property
    def text(self) -> str:
        """The line after the step number."""
        wire = f"{format_bytes(self.wire_bytes_per_step)}/step"
        if self.dense_bytes_per_step:
            wire += f" ({format_bytes(self.dense_bytes_per_step)} dense)"
        cache = "" if self.cache_hit_rate is None else f"  cache {self.cache_hit_rate:.1%} hit"
        return (f"{format_count(self.samples_per_s)} samples/s  loss {format_metric(self.loss)}  "
                f"AUC {format_metric(self.auc)}  wire {wire}{cache}")


class ProgressView:
    """Shows a run on a console; one that is not enabled (ranks above 0) shows nothing.

    Args:
        console: where to; on a terminal one line lives at the bottom, elsewhere every log
            interval prints a line.
        enabled: False shows nothing.
        steps: steps of the whole run; None where the reader cannot tell.
        done: steps done before this start (a resumed run).
    """

    def __init__(self, console: Console, enabled: bool, steps: int | None, done: int) -> None:
        self._console, self._enabled, self._steps = console, enabled, steps
        self._done = done
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressView:
        if self._enabled and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step {task.completed:,.0f}" + ("/{task.total:,.0f}" if self._steps
                                                           else "")),
                BarColumn(bar_width=20), TextColumn("{task.description}"), TimeRemainingColumn(),
                console=self._console)
            self._task = self._bar.add_task("", total=self._steps, completed=self._done)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int) -> None:
        """Moves the bar."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step)

    def show(self, line: ProgressLine) -> None:
        """Shows the metrics of a log interval."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=line.step, description=line.text)
        else:
            of = f"/{self._steps}" if self._steps else ""
            self.say(f"step {line.step}{of}  epoch {line.epoch + 1}  {line.text}")

    def say(self, text: str) -> None:
        """Prints a line of its own."""
        if self._enabled:
            self._console.print(text, highlight=False, soft_wrap=True, markup=False)
