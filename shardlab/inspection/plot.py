"""A histogram as a picture; matplotlib is an extra."""

from __future__ import annotations

from pathlib import Path

from shardlab.errors import ConfigError
from shardlab.inspection.scan import TableStats


def plot_norms(stats: TableStats, path: Path) -> None:
    """Draws how the norms of a table's rows are spread.

    Raises:
        ConfigError: matplotlib is not installed, or it does not know the file's ending.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'shardlab[plot]'") from None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.stairs(stats.norms.counts, stats.norms.edges, fill=True)
    axes.set_yscale("symlog", linthresh=1)
    axes.set(title=f"{stats.table}: {stats.rows:,} rows x {stats.columns}", xlabel="norm of a row",
             ylabel="rows")
    try:
        figure.savefig(path)
    except ValueError as error:
        raise ConfigError(f"--plot {path}: {error}") from None
