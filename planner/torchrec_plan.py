"""TorchRec's sharding plans as ours, from plain data.

A plan is read as JSON: ``ParameterSharding`` by table, or by module and table, with TorchRec's own
field names (`examples/torchrec_plan_to_json.py` writes it):

    {"sparse.ebc": {"t_user": {
        "sharding_type": "row_wise", "compute_kernel": "fused", "ranks": [0, 1],
        "sharding_spec": {"shards": [
            {"shard_offsets": [0, 0], "shard_sizes": [500, 64], "placement": "rank:0/cuda:0"},
            {"shard_offsets": [500, 0], "shard_sizes": [500, 64], "placement": "rank:1/cuda:1"}]}}}}

Rectangles, ranks and sharding types are taken as they are. A compute kernel says where rows lie:

    dense, fused           hbm
    fused_uvm              ddr
    fused_uvm_caching      ddr, behind a cache on hbm of cache_params.load_factor of the rows
    key_value              ssd, behind such a cache

What TorchRec's plans do not say comes from the job's tables: the dtype of rows, and what crosses
the wire. Kernels of inference and virtual tables have no counterpart here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardlab.errors import ConfigError, PlanError, nearest_name
from shardlab.plan import ShardingPlan
from shardlab.specs import EmbeddingBagConfig, ShardingType
from shardlab.storage_specs import (
    Choice,
    LevelSpec,
    RowsSpec,
    StorageSpec,
    Tier,
    place_home,
)
from shardlab.table_plan import Shard, TablePlan, build_table_plan

#: Compute kernel -> tier of the rows, and whether a cache on hbm stands before them.
KERNELS: dict[str, tuple[Tier, bool]] = {
    "dense": (Tier.HBM, False), "fused": (Tier.HBM, False), "fused_uvm": (Tier.DDR, False),
    "fused_uvm_caching": (Tier.DDR, True), "key_value": (Tier.SSD, True)}
#: TorchRec's load factor and algorithm of a cache whose plan names none.
_LOAD_FACTOR, _ALGORITHM = 0.2, "lru"
_PLACEMENT = re.compile(r"rank:(\d+)(/.*)?")


def read_torchrec_plan(path: Path, tables: Sequence[EmbeddingBagConfig],
                       world_size: int) -> ShardingPlan:
    """Reads a TorchRec plan that was written as JSON.

    Args:
        path: the file.
        tables: the job's tables; the plan must place exactly these.
        world_size: ranks it is for.

    Raises:
        PlanError: the file is no such plan, or what it asks for cannot be said here; lists every
            problem by table.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"TorchRec plan {path}: cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"TorchRec plan {path}: not JSON: {error}; write it with "
                        "examples/torchrec_plan_to_json.py") from None
    try:
        return import_plan(data, tables, world_size)
    except PlanError as error:
        raise PlanError(f"TorchRec plan {path}:\n{error}") from None


def import_plan(data: Any, tables: Sequence[EmbeddingBagConfig], world_size: int) -> ShardingPlan:
    """A TorchRec plan as ours.

    Args:
        data: what its JSON holds.
        tables: the job's tables.
        world_size: ranks it is for.

    Raises:
        PlanError: lists every problem by table.
    """
    problems: list[str] = []
    entries: dict[str, Mapping[str, Any]] = {}
    for name, entry in _entries(data, ""):
        if name in entries:
            problems.append(f"table {name!r}: placed by two modules; give one module's plan")
        entries[name] = entry
    if not entries:
        raise PlanError("holds no ParameterSharding; expected {table: {sharding_type: ...}}, or "
                        "one level of modules around it")
    known = {table.name: table for table in tables}
    problems += [f"table {name!r}: the job has no such table{nearest_name(name, list(known))}"
                 for name in entries if name not in known]
    plans = []
    for table in tables:
        if table.name not in entries:
            problems.append(f"table {table.name!r}: not in the plan; add it, or plan without "
                            "--import-torchrec")
            continue
        try:
            plans.append(_table_plan(table, entries[table.name], world_size))
        except (PlanError, ConfigError) as error:
            problems.append(f"table {table.name!r}: {error}")
    plan = ShardingPlan(world_size, tuple(plans))
    if not problems:
        try:
            plan.check(tables, world_size)
        except PlanError as error:
            problems.append(str(error))
    if problems:
        raise PlanError("\n".join(problems))
    return plan


def _entries(data: Any, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(table, its ParameterSharding), through any levels of modules."""
    if not isinstance(data, Mapping):
        place = f" under {where!r}" if where else ""
        raise PlanError(f"expected a mapping of tables{place}, found {data!r:.60}")
    for key, value in data.items():
        if isinstance(value, Mapping) and "sharding_type" in value:
            yield str(key), value
        else:
            yield from _entries(value, f"{where}.{key}" if where else str(key))


def _table_plan(table: EmbeddingBagConfig, entry: Mapping[str, Any], world_size: int) -> TablePlan:
    name = str(entry["sharding_type"]).lower()
    types = [kind.value for kind in ShardingType]
    if name not in types:
        raise PlanError(f"unknown sharding_type {name!r}{nearest_name(name, types)}; known: "
                        f"{', '.join(types)}")
    sharding = ShardingType(name)
    storage = _storage(table, entry)
    spec = entry.get("sharding_spec")
    if sharding is ShardingType.DATA_PARALLEL:
        return build_table_plan(table, sharding, list(range(world_size)), storage=storage)
    if spec is None:
        return _from_ranks(table, sharding, entry, world_size, storage)
    if not isinstance(spec, Mapping) or not isinstance(spec.get("shards"), list):
        raise PlanError(f"sharding_spec: expected {{shards: [...]}}, found {spec!r:.60}")
    shards = [_shard(shard, f"sharding_spec.shards[{index}]")
              for index, shard in enumerate(spec["shards"])]
    # TorchRec leaves ranks empty where the rows run out.
    held = tuple(shard for shard in shards if shard.rows and shard.columns)
    return TablePlan(table.name, sharding, table.exchange, held, storage)


def _from_ranks(table: EmbeddingBagConfig, sharding: ShardingType, entry: Mapping[str, Any],
                world_size: int, storage: StorageSpec) -> TablePlan:
    """A plan without rectangles: even cuts over the ranks."""
    if sharding not in (ShardingType.TABLE_WISE, ShardingType.ROW_WISE, ShardingType.COLUMN_WISE):
        raise PlanError(f"{sharding.value} without a sharding_spec does not say where its shards "
                        "lie; write the plan with its sharding_spec")
    ranks = entry.get("ranks")
    if ranks is None and sharding is ShardingType.ROW_WISE:
        ranks = list(range(world_size))
    if not isinstance(ranks, list) or not all(type(rank) is int for rank in ranks):
        raise PlanError(f"ranks: expected a list of ranks, found {ranks!r}")
    return build_table_plan(table, sharding, ranks, storage=storage)


def _shard(data: Any, where: str) -> Shard:
    try:
        rows, columns = (int(start) for start in data["shard_offsets"])
        height, width = (int(size) for size in data["shard_sizes"])
        placement = str(data["placement"])
    except (KeyError, TypeError, ValueError):
        raise PlanError(f"{where}: expected shard_offsets [row, column], shard_sizes [rows, "
                        f"columns] and placement, found {data!r:.100}") from None
    match = _PLACEMENT.fullmatch(placement)
    if match is None:
        raise PlanError(f"{where}.placement: expected rank:R/device, found {placement!r}")
    return Shard(int(match[1]), rows, rows + height, columns, columns + width)


def _storage(table: EmbeddingBagConfig, entry: Mapping[str, Any]) -> StorageSpec:
    """Rows of the job's dtype, on the tier of the kernel."""
    kernel = str(entry.get("compute_kernel", "fused")).lower()
    if kernel not in KERNELS:
        raise PlanError(f"compute_kernel {kernel!r} has no counterpart"
                        f"{nearest_name(kernel, list(KERNELS))}; these have: {', '.join(KERNELS)}")
    tier, cached = KERNELS[kernel]
    asked = table.storage
    if not isinstance(asked, RowsSpec):
        if tier is not Tier.HBM or isinstance(asked, Choice):
            raise PlanError(f"compute_kernel {kernel!r} holds plain rows, the job asks for "
                            f"{type(asked).__name__.removesuffix('Spec')}; name a dtype as the "
                            "table's storage")
        return place_home(asked, tier)
    if len(asked.levels) > 1 or asked.home.tier not in (None, tier):
        return _same_levels(asked, kernel, tier, cached)
    home = LevelSpec(asked.home.dtype, tier)
    levels: tuple[LevelSpec, ...] = (home,)
    if cached:
        levels = (_cache(asked.home.dtype, entry.get("cache_params") or {}), home)
    return RowsSpec(levels, asked.rounding, asked.state_dtype)


def _same_levels(asked: RowsSpec, kernel: str, tier: Tier, cached: bool) -> StorageSpec:
    """The job's own chain, where it does not contradict the kernel."""
    fits = asked.home.tier in (None, tier) and (len(asked.levels) > 1) == cached
    if not fits:
        raise PlanError(f"compute_kernel {kernel!r} holds rows on {tier.value}"
                        f"{' behind a cache' if cached else ''}, the job's storage asks for "
                        "something else; leave tier and levels out of the job's storage")
    near = [level if level.tier else LevelSpec(level.dtype, Tier.HBM, level.fraction, level.policy,
                                               level.ways, level.admission)
            for level in asked.levels[:-1]]
    return RowsSpec((*near, LevelSpec(asked.home.dtype, tier)), asked.rounding, asked.state_dtype)


def _cache(dtype: str, params: Mapping[str, Any]) -> LevelSpec:
    share = params.get("load_factor")
    share = _LOAD_FACTOR if share is None else share
    if not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise PlanError(f"cache_params.load_factor: expected a share of the rows in (0, 1], found "
                        f"{share!r}")
    policy = str(params.get("algorithm") or _ALGORITHM).lower()
    if policy not in ("lru", "lfu"):
        raise PlanError(f"cache_params.algorithm: expected lru or lfu, found {policy!r}")
    return LevelSpec(dtype, Tier.HBM, float(share), policy)
