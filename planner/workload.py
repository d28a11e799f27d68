"""What one training step asks of every table: bags, ids and different ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardlab.planner.zipf import unique_ids
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
    """

    rows: Floats
    columns: Floats
    features: Floats
    bags: Floats
    ids: Floats
    unique: Floats
    step_unique: Floats


def build_workload(tables: Sequence[EmbeddingBagConfig], world_size: int,
                   batch_size: int) -> Workload:
    """Expected work of a step with ``batch_size`` samples on each of ``world_size`` ranks.

    The skew of ids is the Zipf assumption of `zipf.ZIPF_EXPONENT`; features that share a table
    are taken to draw from the same distribution.
    """
    rows = np.array([table.num_embeddings for table in tables], dtype=np.float64)
    features = np.array([len(table.feature_names) for table in tables], dtype=np.float64)
    bags = np.full(len(tables), float(batch_size))
    ids = bags * np.array([table.pooling_factor for table in tables])
    return Workload(
        rows=rows,
        columns=np.array([table.embedding_dim for table in tables], dtype=np.float64),
        features=features, bags=bags, ids=ids, unique=unique_ids(rows, features * ids),
        step_unique=unique_ids(rows, world_size * features * ids))
