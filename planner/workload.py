"""What one training step asks of every table: bags, ids and different ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardlab.planner.access import Access, build_access
from shardlab.planner.statistics import Statistics
from shardlab.specs import EmbeddingBagConfig

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Workload:
    """Per table, arrays [T]; the batch of one rank unless said otherwise.

    Attributes:
        rows: rows of the table.
        columns: columns of the table.
        features: features that read it.
        bags: bags of one feature.
        ids: ids of one feature, bags x pooling factor.
        unique: different ids of all features together.
        step_unique: different ids of all features and all ranks together: the rows of the
            table that one step touches.
        access: which rows are used how often.
    """

    rows: Floats
    columns: Floats
    features: Floats
    bags: Floats
    ids: Floats
    unique: Floats
    step_unique: Floats
    access: Access


def build_workload(tables: Sequence[EmbeddingBagConfig], world_size: int, batch_size: int,
                   statistics: Statistics | None = None) -> Workload:
    """Expected work of a step with ``batch_size`` samples on each of ``world_size`` ranks.

    Args:
        tables: the tables.
        world_size: ranks.
        batch_size: samples of a rank.
        statistics: measured ids; their pooling factors replace those of the tables. None: the
            Zipf assumption of `zipf`.

    Raises:
        ConfigError: the statistics lack a feature of the tables.
    """
    access = build_access(tables, statistics)
    bags = np.full(len(tables), float(batch_size))
    return Workload(
        rows=np.array([table.num_embeddings for table in tables], dtype=np.float64),
        columns=np.array([table.embedding_dim for table in tables], dtype=np.float64),
        features=np.array([len(table.feature_names) for table in tables], dtype=np.float64),
        bags=bags, ids=bags * access.pooling, unique=access.unique(batch_size),
        step_unique=access.unique(world_size * batch_size), access=access)
