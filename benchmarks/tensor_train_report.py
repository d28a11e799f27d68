"""Runs of tensor_train_quality.py as a table in Markdown and as a picture."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

#: Data, kind, tables, rank, start, and what else differs from the defaults.
Key = tuple[str, str, int, int, str, str]


def key_of(one: dict) -> Key:
    """What the runs of all seeds have in common."""
    return (one.get("data", "criteo"), *one["case"], one.get("variant", ""))


def read_runs(paths: list[str]) -> dict[tuple[Key, int], dict]:
    """Runs by configuration and seed; a later line of the same run takes its place.

    Raises:
        SystemExit: a file that is not there.
    """
    runs = {}
    for path in paths:
        if not Path(path).is_file():
            raise SystemExit(f"--from {path}: no such file; expected JSON lines that --out wrote")
        for line in Path(path).read_text().splitlines():
            one = json.loads(line)
            runs[key_of(one), one["seed"]] = one
    return runs


def grouped(runs: dict[tuple[Key, int], dict]) -> dict[Key, dict[int, dict]]:
    """Runs of every configuration by seed, in the order of the table."""
    found: dict[Key, dict[int, dict]] = {}
    for key, seed in sorted(runs):
        found.setdefault(key, {})[seed] = runs[key, seed]
    return found


def describe(found: dict[Key, dict[int, dict]]) -> list[str]:
    """The table in Markdown; differences are those of the seeds that fp32 ran, too."""
    lines = ["| data | tables | rank | start | accuracy % | to fp32 | AUC | to fp32 | logloss | MB "
             "| seeds |", "|---" * 11 + "|"]
    for (data, kind, count, rank, init, variant), runs in found.items():
        base = found.get((data, "fp32", 0, 0, "-", ""), {})
        cells = [data, str(count or "-"), str(rank or "-"), _start(kind, init, variant)]
        for name, digits in (("accuracy", 3), ("auc", 4)):
            cells.append(f"{statistics.mean(one[name] for one in runs.values()):.{digits}f}")
            paired = [one[name] - base[seed][name] for seed, one in runs.items() if seed in base]
            error = statistics.stdev(paired) / len(paired)**0.5 if len(paired) > 1 else 0.0
            cells.append(f"{statistics.mean(paired):+.{digits}f} ± {error:.{digits}f}"
                         if paired and kind != "fp32" else "")
        first = next(iter(runs.values()))
        cells += [f"{statistics.mean(one['logloss'] for one in runs.values()):.4f}",
                  f"{first['bytes'] / 1e6:.1f}", str(len(runs))]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def plot(found: dict[Key, dict[int, dict]], path: str) -> None:
    """AUC over bytes, a picture with a panel for every data set and number of tables.

    Bars are standard errors over seeds, where there are several.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({(key[0], key[2]) for key in found if key[1] != "fp32"})
    kinds = sorted({line_name(key) for key in found if key[1] != "fp32"})
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels) + 1.5, 4),
                                   squeeze=False, sharey=True)
    for (data, count), panel in zip(panels, axes[0], strict=True):
        for color, name in enumerate(kinds):
            chosen = sorted((next(iter(runs.values()))["bytes"] / 1e6, *mean_auc(runs))
                            for key, runs in found.items()
                            if key[0] == data and key[2] == count and line_name(key) == name)
            if chosen:
                x, y, error = zip(*chosen, strict=True)
                panel.errorbar(x, y, error, marker="o", markersize=4, capsize=2, label=name,
                               color=f"C{color}", linestyle="--" if name == "hashed" else "-")
        for key, runs in found.items():
            if key[0] == data and key[1] == "fp32":
                panel.axhline(mean_auc(runs)[0], color="grey", linestyle=":", label="fp32")
        panel.set(title=f"{data}, {count} largest tables", xscale="log",
                  xlabel="MB of all tables")
        panel.grid(alpha=0.3)
    axes[0, 0].set_ylabel("validation AUC")
    axes[0, -1].legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def line_name(key: Key) -> str:
    """Of a run, in a picture: how its tables start, or that they are hashed."""
    return _start(key[1], key[4], key[5])


def _start(kind: str, init: str, variant: str) -> str:
    return (init if kind == "tensor_train" else kind) + (f", {variant}" if variant else "")


def mean_auc(runs: dict[int, dict]) -> tuple[float, float]:
    """Mean over seeds, and its standard error; 0 for one seed."""
    found = [one["auc"] for one in runs.values()]
    error = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else 0.0
    return statistics.mean(found), error
