"""The cases of torchrec_dlrm.py, by suite."""

from __future__ import annotations

import itertools

SHARDINGS = ["table_wise", "row_wise", "column_wise", "table_row_wise", "table_column_wise",
             "grid_shard", "data_parallel", "mixed", "planner"]
QCOMMS = ["fp32", "fp16", "bf16", "fp8", "int8", "mx4"]
PIPELINES = ["none", "base", "sparse_dist"]
DEFAULT_CASE = {"framework": "torchrec", "sharding": "table_wise", "qcomm": "fp32",
                "pipeline": "none", "dim": 16, "optimizer": "rowwise_adagrad",
                "weights": "fp32", "plan": "planner", "dense_dtype": "fp32"}
ROW_KINDS = ("row_wise", "table_row_wise", "grid_shard", "mixed")  # the planner refuses on CPU


# ---------------------------------------------------------------- suites
def suite(name: str, dims: list[int]) -> list[dict]:
    table_wise = {"sharding": "table_wise"}
    row_wise = {"sharding": "row_wise", "plan": "manual"}
    shardings = [{"sharding": s} for s in SHARDINGS]
    shardings += [{"sharding": s, "plan": "manual"} for s in ROW_KINDS]
    qcomms = [{**s, "qcomm": q} for s in (table_wise, row_wise) for q in QCOMMS[1:]]
    qcomms += [{"sharding": "column_wise", "qcomm": "fp16"}]
    pipelines = [{**s, "pipeline": p} for s in (table_wise, row_wise) for p in PIPELINES[1:]]
    weights = [{"weights": w} for w in ("fp16", "int8")]
    optimizers = [{"optimizer": o} for o in ("sgd", "adam")]
    plain = [{"framework": f, "optimizer": "sgd"} for f in ("torch_manual", "torch_single")]
    ours = [{"framework": "shardlab", "sharding": s, "dense_dtype": t}
            for s in ("table_wise", "row_wise") for t in ("fp32", "bf16")]
    chosen = {"ours": ours, "sharding": shardings, "qcomm": qcomms, "pipeline": pipelines,
              "other": weights + optimizers, "plain": plain}
    picked = list(itertools.chain(*chosen.values())) if name == "all" else chosen[name]
    return [{**DEFAULT_CASE, **case, "dim": dim} for dim in dims for case in picked]
