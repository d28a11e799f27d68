"""What rank 0 prints, on a terminal and elsewhere."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from shardlab.train.progress import ProgressLine, ProgressView

LINE = ProgressLine(step=50, epoch=0, loss=0.5123, auc=0.7345, samples_per_s=81234.0,
                    wire_bytes_per_step=2_340_000)


def printed(terminal: bool, enabled: bool = True, steps: int | None = 100) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120)
    with ProgressView(console, enabled, steps, done=0) as view:
        view.step(50)
        view.show(LINE)
        view.say("step 50  validation")
    return out.getvalue()


def test_plain_lines_without_a_terminal() -> None:
    assert printed(terminal=False).splitlines() == [
        "step 50/100  epoch 1  81.2 k samples/s  loss 0.5123  AUC 0.7345  wire 2.34 MB/step",
        "step 50  validation"]


def test_dense_bytes_stand_beside_all() -> None:
    assert "wire 2.34 MB/step (1.02 MB dense)" in replace(LINE, dense_bytes_per_step=1_020_000).text


def test_bar_on_a_terminal_carries_the_same_words() -> None:
    text = printed(terminal=True)
    for part in ("50", "/100", "81.2 k samples/s", "loss 0.5123", "AUC 0.7345", "wire 2.34 MB/step",
                 "step 50  validation"):
        assert part in text


def test_unknown_number_of_steps() -> None:
    assert printed(terminal=False, steps=None).startswith("step 50  epoch 1")
    assert "/" not in printed(terminal=True, steps=None).split("samples")[0]


def test_other_ranks_say_nothing() -> None:
    assert printed(terminal=False, enabled=False) == printed(terminal=True, enabled=False) == ""
