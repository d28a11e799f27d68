"""ShardLab's planner on fleets of synthetic tables, under its own cost model and under TorchRec's.

    python benchmarks/planner_fleets.py FLEET.json ...            # one line per fleet and model
    python benchmarks/planner_fleets.py --verify FLEET.json ...   # TorchRec's formulas, checked
    python benchmarks/planner_fleets.py --generate 10000x4096     # a fleet of that size

A fleet file holds ``tables`` (rows, dim, pooling, name), ``devices``, ``local_world_size``,
``batch_per_device``, memory sizes and TorchRec's bandwidths in bytes per ms.

  max     milliseconds of the slowest device, by the model that planned
  bound   proven: no plan of the options is faster;  gap = max / bound - 1
  cpu_s   CPU seconds of planning, from tables to plan

``--verify`` needs TorchRec: its enumerator prices every option of the fleets' first tables, and
every number of `planner.torchrec_model` is compared with it.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from shardlab.planner import Topology, plan, read_topology
from shardlab.planner.enumerate import SHARDING_TYPES
from shardlab.planner.solve import solve_model
from shardlab.planner.torchrec_model import KERNELS, TorchRecMachine, TorchRecModel
from shardlab.specs import EmbeddingBagConfig

_GIB = 1 << 30
_DIMS = (32, 64, 96, 128, 256)
_VERIFIED_TABLES = 30


def generate(size: str, seed: int) -> dict:
    """A fleet drawn like the benchmark's: log-uniform rows and pooling factors."""
    tables, devices = (int(part) for part in size.split("x"))
    rng = np.random.default_rng([seed, tables])
    rows = np.exp(rng.uniform(np.log(1e3), np.log(5e8), tables)).astype(np.int64)
    dims = rng.choice(_DIMS, tables)
    pooling = np.round(np.exp(rng.uniform(0.0, np.log(100.0), tables)), 2)
    return {
        "name": f"t{tables}_d{devices}", "batch_per_device": 1024, "devices": devices,
        "local_world_size": min(devices, 8), "hbm_bytes": 80 * _GIB, "ddr_bytes": 128 * _GIB,
        "hbm_bandwidth": 897 * _GIB / 1000, "ddr_bandwidth": 51 * _GIB / 1000,
        "hbm_to_ddr_bandwidth": 32 * _GIB / 1000, "intra_host_bandwidth": 600 * _GIB / 1000,
        "inter_host_bandwidth": 12.5 * _GIB / 1000,
        "tables": [{"rows": int(r), "dim": int(d), "pooling": float(p), "name": f"table_{i}"}
                   for i, (r, d, p) in enumerate(zip(rows, dims, pooling, strict=True))]}


def tables_of(fleet: dict) -> list[EmbeddingBagConfig]:
    """A fleet's tables."""
    return [EmbeddingBagConfig(table["rows"], table["dim"], table["name"],
                               pooling_factor=table["pooling"]) for table in fleet["tables"]]


def topology_of(fleet: dict, profile: str) -> Topology:
    """A profile in the fleet's size and with its memories; speeds are the profile's."""
    host = fleet["local_world_size"]
    base = read_topology(f"{fleet['devices'] // host}x{host}x{profile}")
    return replace(base, hbm_bytes=fleet["hbm_bytes"], ddr_bytes=host * fleet["ddr_bytes"])


def torchrec_model(fleet: dict) -> TorchRecModel:
    """TorchRec's cost model of a fleet."""
    machine = TorchRecMachine(
        fleet["devices"], fleet["local_world_size"], fleet["hbm_bytes"], fleet["ddr_bytes"],
        fleet["hbm_bandwidth"], fleet["hbm_to_ddr_bandwidth"], fleet["intra_host_bandwidth"],
        fleet["inter_host_bandwidth"])
    return TorchRecModel(tables_of(fleet), machine, fleet["batch_per_device"])


def plan_ours(fleet: dict, profile: str) -> dict:
    """Plans under ShardLab's model."""
    start = time.process_time()
    result = plan(tables_of(fleet), topology_of(fleet, profile), fleet["batch_per_device"])
    took = time.process_time() - start
    return {"model": f"shardlab, {profile}", "max": result.step_ms, "bound": result.lower_bound_ms,
            "gap": result.gap, "cpu_s": took, "start": result.start}


def plan_torchrec(fleet: dict) -> dict:
    """Plans under TorchRec's model and capacities."""
    start = time.process_time()
    solved = solve_model(torchrec_model(fleet))
    took = time.process_time() - start
    if solved is None:
        return {"model": "torchrec", "error": "nothing fits", "cpu_s": took}
    slowest = solved.solution.placement.slowest_ms
    bound = solved.solution.lower_bound_ms
    return {"model": "torchrec", "max": slowest, "bound": bound, "gap": slowest / bound - 1,
            "cpu_s": took, "start": solved.solution.start}


def verify(fleet: dict) -> dict:
    """Largest relative difference between our formulas and TorchRec's estimators."""
    from torch import device, nn
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.planner import EmbeddingShardingPlanner
    from torchrec.distributed.planner import Topology as TorchRecTopology
    from torchrec.distributed.planner.types import ParameterConstraints
    from torchrec.modules.embedding_configs import EmbeddingBagConfig as TorchRecConfig
    from torchrec.modules.embedding_modules import EmbeddingBagCollection

    fleet = {**fleet, "tables": fleet["tables"][:_VERIFIED_TABLES]}
    module = nn.Module()
    module.sparse = EmbeddingBagCollection(device=device("meta"), tables=[
        TorchRecConfig(name=table["name"], embedding_dim=table["dim"],
                       num_embeddings=table["rows"], feature_names=["feature_" + table["name"]])
        for table in fleet["tables"]])
    topology = TorchRecTopology(
        world_size=fleet["devices"], local_world_size=fleet["local_world_size"],
        compute_device="cuda", hbm_cap=fleet["hbm_bytes"], ddr_cap=fleet["ddr_bytes"],
        hbm_mem_bw=fleet["hbm_bandwidth"], ddr_mem_bw=fleet["ddr_bandwidth"],
        hbm_to_ddr_mem_bw=fleet["hbm_to_ddr_bandwidth"],
        intra_host_bw=fleet["intra_host_bandwidth"], inter_host_bw=fleet["inter_host_bandwidth"])
    planner = EmbeddingShardingPlanner(
        topology=topology, batch_size=fleet["batch_per_device"], stats=[],
        constraints={table["name"]: ParameterConstraints(pooling_factors=[table["pooling"]])
                     for table in fleet["tables"]})
    model = torchrec_model(fleet)
    problem = model.problem(model.tiers)
    options, costs = problem.options, problem.costs
    known = {(fleet["tables"][int(options.table[o])]["name"],
              SHARDING_TYPES[int(options.sharding[o])].value,
              "dense" if options.copied[o] else KERNELS[int(options.variant[o])]): o
             for o in range(len(options))}
    worst, compared = 0.0, 0
    for theirs in planner._enumerator.enumerate(module, [EmbeddingBagCollectionSharder()]):
        option = known.get((theirs.name, theirs.sharding_type, theirs.compute_kernel))
        if option is None:  # equal to an option of another type: not enumerated
            continue
        compared += 1
        shard = theirs.shards[0]
        pairs = [(costs.busy_ms[option, 0], shard.perf.total),
                 (costs.piece_bytes[option, 0], shard.storage.hbm),
                 (costs.piece_bytes[option, 1], shard.storage.ddr),
                 (options.pieces[option], len(theirs.shards))]
        worst = max(worst, *(abs(ours - own) / max(abs(own), 1.0) if own > 1
                             else abs(ours - own) / max(own, 1e-9) if own else abs(ours)
                             for ours, own in pairs))
    return {"options": compared, "not_compared": len(known) - compared,
            "largest_relative_difference": worst}


def main() -> None:
    """Reads arguments, prints one JSON line per fleet and model."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fleets", nargs="*", type=Path)
    parser.add_argument("--generate", action="append", default=[], metavar="TABLESxDEVICES")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--profile", default="h100", help="speeds under ShardLab's model")
    parser.add_argument("--model", choices=["both", "shardlab", "torchrec"], default="both")
    parser.add_argument("--verify", action="store_true", help="check the formulas of TorchRec")
    args = parser.parse_args()
    fleets = [json.loads(path.read_text()) for path in args.fleets]
    fleets += [generate(size, args.seed) for size in args.generate]
    for fleet in fleets:
        fields = {"fleet": fleet["name"], "tables": len(fleet["tables"]),
                  "devices": fleet["devices"]}
        if args.verify:
            print(json.dumps({**fields, **verify(fleet)}), flush=True)
            continue
        if args.model != "torchrec":
            print(json.dumps({**fields, **plan_ours(fleet, args.profile)}), flush=True)
        if args.model != "shardlab":
            print(json.dumps({**fields, **plan_torchrec(fleet)}), flush=True)


if __name__ == "__main__":
    main()
