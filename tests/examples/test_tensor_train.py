"""The tensor-train jobs make their tables as much smaller as the paper says, in `shardlab plan`."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from shardlab.config import load_job
from shardlab.planner import local_cpu, plan
from shardlab.planner.report import print_report
from shardlab.specs import EmbeddingBagConfig
from shardlab.storage_specs import TensorTrainSpec
from tests.planner.fleets import machine

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
#: Job, tables compressed, ratio of all tables in the paper (its 221 and 112 are rounded down).
JOBS = [("kaggle_4x", 3, 4.1), ("kaggle_117x", 7, 117.4), ("kaggle_221x", 7, 222.0),
        ("terabyte_112x", 7, 112.5)]


@pytest.mark.parametrize(("name", "compressed", "ratio"), JOBS, ids=[job[0] for job in JOBS])
def test_job_prints_the_ratio(name, compressed, ratio):
    job = load_job(str(EXAMPLES / f"tensor_train_{name}.yaml"))
    result = plan(job.table_configs(), local_cpu(1), job.batch_size, job.optimizer.sparse.kind)
    trains = [entry for entry in result.plan.tables
              if isinstance(entry.storage, TensorTrainSpec)]
    assert len(trains) == compressed
    out = io.StringIO()
    print_report(result, out, width=120)
    (found,) = re.findall(r"all tables: .* \(([\d.]+)x\)", out.getvalue())
    assert float(found) == pytest.approx(ratio, abs=0.11)


def test_the_117x_job_takes_18_4_megabytes():
    job = load_job(str(EXAMPLES / "tensor_train_kaggle_117x.yaml"))
    result = plan(job.table_configs(), local_cpu(1), job.batch_size, "sgd")
    held = sum(entry.held.tables.total for entry in result.tables)
    assert round(held / 1e6, 1) == 18.4


@pytest.mark.parametrize(("megabytes", "rank"), [(20, 64), (5, 32), (1, 8)])
def test_the_planner_takes_the_largest_rank_that_fits(megabytes, rank):
    """Ranks in order of preference: memory decides."""
    ranks = [{"kind": "tensor_train", "rank": rank} for rank in (64, 32, 8)]
    table = EmbeddingBagConfig(10_131_227, 16, "t", storage={"choose": ranks})
    result = plan([table], machine("1xcpu", megabytes * 1e6), 64, "sgd")
    assert result.plan.tables[0].storage.rank == (rank, rank)
