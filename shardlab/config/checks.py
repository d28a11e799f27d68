"""Checks of a job that look at more than one field.

Each check names the parts it needs, such as ``optimizer.sparse.kind``, and runs wherever these
are valid: a mistake in one place hides no mistake in another.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from shardlab.config.models import (
    ColumnsConfig,
    DataConfig,
    DenseOptimizerConfig,
    ModelConfig,
    RowRange,
    ScheduleConfig,
    Section,
    SparseOptimizerConfig,
    TableConfig,
    TablesPreset,
)
from shardlab.errors import ConfigError, nearest_name
from shardlab.presets import CRITEO_SPARSE_NAMES, criteo_kaggle_tables
from shardlab.specs import EmbeddingBagConfig, check_tables
from shardlab.storage_text import parse_storage

_PARQUET_COLUMNS = {"label", "dense", "log_dense", "raw_integers"}
#: (place of the kind, place, section, kind -> the fields that only this kind and its like take).
_KINDS: tuple[tuple[str, str, type[Section], dict[str, set[str]]], ...] = (
    ("model.kind", "model", ModelConfig, {
        "dlrm": {"bottom_mlp"}, "deepfm": set(), "dcn": {"cross_layers", "cross_rank"}}),
    ("data.kind", "data", DataConfig, {
        "synthetic_criteo": {"seed"}, "criteo_tsv": {"path", "on_bad_row"},
        "criteo_parquet": {"path", "on_bad_row"}, "parquet": {"path", "on_bad_row"}}),
    ("data.kind", "data.columns", ColumnsConfig, {
        "synthetic_criteo": set(), "criteo_tsv": set(), "criteo_parquet": set(),
        "parquet": _PARQUET_COLUMNS}),
    ("optimizer.sparse.kind", "optimizer.sparse", SparseOptimizerConfig, {
        "sgd": {"weight_decay"}, "adagrad": {"eps"}, "row_wise_adagrad": {"eps"},
        "adam": {"eps", "betas"}, "row_wise_adam": {"eps", "betas"}}),
    ("optimizer.dense.kind", "optimizer.dense", DenseOptimizerConfig, {
        "sgd": {"weight_decay", "momentum"}, "adagrad": {"eps", "weight_decay"},
        "adam": {"eps", "betas", "weight_decay"}, "adamw": {"eps", "betas", "weight_decay"}}),
    ("optimizer.schedule.kind", "optimizer.schedule", ScheduleConfig, {
        "constant": set(), "linear_warmup": {"warmup_steps"},
        "cosine": {"warmup_steps", "steps", "final_factor"},
        "linear_decay": {"warmup_steps", "steps", "final_factor"}}),
)

#: The part that holds (index, table) of every valid entry of an explicit list of tables.
VALID_TABLES = "tables (valid entries)"

Problems = Iterator[str]


@dataclass(frozen=True)
class Check:
    """A check and the parts that it takes, in order.

    Attributes:
        of_files: it looks for what only the machine that trains needs to have.
    """

    parts: tuple[str, ...]
    problems: Callable[..., Problems]
    of_files: bool = False


def table_spec(table: TableConfig) -> EmbeddingBagConfig:
    """One entry of a job's list as a spec."""
    fields: dict[str, Any] = {name: getattr(table, name) for name in type(table).model_fields
                              if name != "hot_rows"}  # which rows is for the plan to say
    return EmbeddingBagConfig(**fields)


def table_specs(tables: tuple[TableConfig, ...] | TablesPreset) -> list[EmbeddingBagConfig]:
    """The tables of a job as specs."""
    if isinstance(tables, TablesPreset):
        specs = criteo_kaggle_tables(
            tables.embedding_dim, tables.max_rows, storage=parse_storage(tables.storage, "tables"),
            sharding=tables.sharding, exchange=tables.exchange, bounds=tables.bounds)
        return [replace(spec, storage=tables.storages.get(spec.name, spec.storage))
                for spec in specs]
    return [table_spec(table) for table in tables]


def _preset_problems(tables: tuple[TableConfig, ...] | TablesPreset) -> Problems:
    if not isinstance(tables, TablesPreset):
        return
    known = [spec.name for spec in criteo_kaggle_tables(tables.embedding_dim)]
    for name in tables.storages:
        if name not in known:
            yield (f"tables.storages: {name!r} is not a table of {tables.preset}; its tables are "
                   f"{known[0]} to {known[-1]}")


def _table_problems(valid: tuple[tuple[int, TableConfig], ...]) -> Problems:
    specs = []
    for index, table in valid:
        try:
            spec = table_spec(table)
        except ConfigError as error:
            yield from (f"tables[{index}]: {line}" for line in error.problems)
            continue
        specs.append(spec)
        low, high = spec.init_range
        if low > high:
            yield f"tables[{index}].weight_init_min: {low} lies above weight_init_max, {high}"
    try:
        check_tables(specs)
    except ConfigError as error:
        yield from (f"tables: {line}" for line in error.problems)


def _dims_problems(kind: str, tables: tuple[TableConfig, ...] | TablesPreset) -> Problems:
    dims: dict[int, str] = {}
    if not isinstance(tables, TablesPreset):
        for table in tables:
            dims.setdefault(table.embedding_dim, table.name)
    if kind in ("dlrm", "deepfm") and len(dims) > 1:
        found = ", ".join(f"{name!r} has {dim}" for dim, name in dims.items())
        yield (f"model.kind: {kind} needs one embedding_dim for all tables, but {found}; "
               "make them equal or use kind dcn")


def _kind_problems(place: str, default: Any, takes: dict[str, set[str]], kind: str,
                   value: Any) -> Problems:
    """A field that was given although the section's kind does not take it."""
    field = place.rpartition(".")[2]
    if field not in takes[kind] and value != default:
        own = f"; it takes {', '.join(sorted(takes[kind]))}" if takes[kind] else ""
        yield f"{place}: kind {kind} does not take it{own}"


def _kind_checks() -> Iterator[Check]:
    """One check for every field that only some kinds take."""
    for kind, place, section, takes in _KINDS:
        for field in sorted(set[str]().union(*takes.values())):
            problems = partial(_kind_problems, f"{place}.{field}",
                               section.model_fields[field].default, takes)
            yield Check((kind, f"{place}.{field}"), problems)


def _missing_problems(kind: str, path: tuple[str, ...]) -> Problems:
    if kind != "synthetic_criteo" and not path:
        yield f"data.path: kind {kind} needs a file, none is given"


def _path_problems(path: tuple[str, ...]) -> Problems:
    for index, pattern in enumerate(path):
        place = f"data.path[{index}]" if len(path) > 1 else "data.path"
        # A file may have a name that also reads as a pattern.
        files = [pattern] if os.path.exists(pattern) else glob.glob(pattern)
        if not files:
            yield f"{place}: no file matches {pattern!r} (looked in {os.getcwd()})"
        for file in files:
            if not os.path.isfile(file) or not os.access(file, os.R_OK):
                yield f"{place}: {file!r} is not a file that can be read"


def _rows_problems(name: str, kind: str, rows: RowRange | None) -> Problems:
    needed = rows is not None or name == "train_rows"
    if kind == "synthetic_criteo" and needed and (rows is None or rows[1] is None):
        yield f"data.{name}: the generated data has no end of its own; give [start, stop]"
    if rows and rows[1] is not None and rows[1] <= rows[0]:
        yield f"data.{name}: [{rows[0]}, {rows[1]}) holds no row"


def _split_problems(kind: str, train: RowRange | None, validation: RowRange | None,
                    fraction: float | None) -> Problems:
    if fraction is not None and kind == "synthetic_criteo":
        yield "data.validation_fraction: the generated data has no end; give validation_rows"
    elif fraction is not None and validation is not None:
        yield "data.validation_fraction: validation_rows is given too; keep one of them"
    if train and validation and \
            (train[1] is None or validation[0] < train[1]) and \
            (validation[1] is None or train[0] < validation[1]):
        yield (f"data.validation_rows: {list(validation)} overlaps train_rows {list(train)}; "
               "a row may train or validate, not both")


def _columns_problems(kind: str, columns: Mapping[str, str],
                      tables: tuple[TableConfig, ...] | TablesPreset) -> Problems:
    """Every mapped column needs a feature, and every feature a column."""
    try:
        features = [feature for spec in table_specs(tables) for feature in spec.feature_names]
    except ConfigError:
        return  # listed by the tables' own check
    for feature in columns:
        if feature not in features:
            yield (f"data.columns.sparse.{feature}: no table has this feature"
                   f"{nearest_name(feature, features)}")
    if kind == "parquet":  # only the files know their columns
        return
    for feature in features:
        column = columns.get(feature, feature)
        if column not in CRITEO_SPARSE_NAMES:
            yield (f"data.columns.sparse: feature {feature!r} reads column {column!r}, but kind "
                   f"{kind} has C1 to C26; map it, such as {{{feature}: C1}}")


def _schedule_problems(kind: str, warmup_steps: int, steps: int | None) -> Problems:
    if kind == "linear_warmup" and warmup_steps == 0:
        yield "optimizer.schedule.warmup_steps: kind linear_warmup needs at least 1 step"
    if kind not in ("cosine", "linear_decay"):
        return
    if steps is None:
        yield f"optimizer.schedule.steps: kind {kind} needs the step at which it ends"
    elif steps <= warmup_steps:
        yield (f"optimizer.schedule.steps: {steps} does not lie after the "
               f"{warmup_steps} warmup_steps")


def _wire_problems(wires: dict[str, Any],
                   tables: tuple[TableConfig, ...] | TablesPreset) -> Problems:
    names = [spec.name for spec in table_specs(tables)]
    for name in wires:
        if name not in names:
            yield f"wire.tables.{name}: no table has this name{nearest_name(name, names)}"


def _resume_problems(resume: str) -> Problems:
    if resume not in ("auto", "never") and not os.path.exists(resume):
        yield (f"train.resume: no checkpoint at {resume!r}"
               f"{nearest_name(resume, ['auto', 'never'])}; give auto, never or a path")


def _plan_problems(plan: str | None) -> Problems:
    if plan is not None and not os.path.isfile(plan):
        yield f"plan: no file {plan!r} (looked in {os.getcwd()})"


def _parallel_problems(replicas: int, sync_every_steps: int) -> Problems:
    if sync_every_steps > 1 and replicas == 1:
        yield (f"parallel.sync_every_steps: {sync_every_steps} steps between averages of one "
               "replica mean nothing; set parallel.replicas, or leave it out")


def _hierarchy_problems(replicas: int, hierarchy: str) -> Problems:
    if replicas > 1 and hierarchy == "two_stage":
        yield ("exchange.hierarchy: two_stage was asked for, but replica groups of the tables "
               "exchange flat; leave exchange.hierarchy or parallel.replicas out")


def _hot_row_problems(replicas: int, hierarchy: str,
                      tables: tuple[TableConfig, ...] | TablesPreset) -> Problems:
    parts = [("tables", tables)] if isinstance(tables, TablesPreset) else \
        [(f"tables.{number}", table) for number, table in enumerate(tables)]
    other = "parallel.replicas" if replicas > 1 else "exchange.hierarchy: two_stage"
    if replicas > 1 or hierarchy == "two_stage":
        for place, table in parts:
            if table.hot_rows is not None:
                yield (f"{place}.hot_rows: copies of hot rows are not made beside {other}; leave "
                       "one of them out")


CHECKS: tuple[Check, ...] = (
    *_kind_checks(),
    Check((VALID_TABLES,), _table_problems),
    Check(("tables",), _preset_problems),
    Check(("model.kind", "tables"), _dims_problems),
    Check(("data.kind", "data.path"), _missing_problems),
    Check(("data.path",), _path_problems, of_files=True),
    Check(("data.kind", "data.train_rows"), partial(_rows_problems, "train_rows")),
    Check(("data.kind", "data.validation_rows"), partial(_rows_problems, "validation_rows")),
    Check(("data.kind", "data.train_rows", "data.validation_rows", "data.validation_fraction"),
          _split_problems),
    Check(("data.kind", "data.columns.sparse", "tables"), _columns_problems),
    Check(("optimizer.schedule.kind", "optimizer.schedule.warmup_steps",
           "optimizer.schedule.steps"), _schedule_problems),
    Check(("wire.tables", "tables"), _wire_problems),
    Check(("train.resume",), _resume_problems, of_files=True),
    Check(("plan",), _plan_problems),
    Check(("parallel.replicas", "parallel.sync_every_steps"), _parallel_problems),
    Check(("parallel.replicas", "exchange.hierarchy"), _hierarchy_problems),
    Check(("parallel.replicas", "exchange.hierarchy", "tables"), _hot_row_problems),
)


def run_checks(parts: dict[str, Any], files: bool = True) -> list[str]:
    """Runs every check whose parts are all there.

    Args:
        parts: valid values of a job by place, such as ``optimizer.sparse.kind``.
        files: whether data and checkpoints must be on this machine.
    """
    return [problem for check in CHECKS if all(part in parts for part in check.parts)
            and (files or not check.of_files)
            for problem in check.problems(*(parts[part] for part in check.parts))]
