"""What is in a checkpoint: tables, rows, norms, rows that never trained; no GPU, no model code."""

from shardlab.inspection.overview import Overview, overview
from shardlab.inspection.scan import (
    Neighbor,
    Row,
    TableStats,
    dead_rows,
    neighbors,
    read_rows,
    table_stats,
    top_rows,
)

__all__ = ["Neighbor", "Overview", "Row", "TableStats", "dead_rows", "neighbors", "overview",
           "read_rows", "table_stats", "top_rows"]
