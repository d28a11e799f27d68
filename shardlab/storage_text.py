"""Spellings of storages: from a job file or a plan to specs, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from shardlab.errors import ConfigError, nearest_name
from shardlab.storage_specs import (
    ADMISSIONS,
    DTYPES,
    POLICIES,
    PRUNED_ABSENT,
    PRUNED_ADMITTED,
    PRUNED_DTYPES,
    PRUNED_STARTS,
    ROUNDINGS,
    STATE_DTYPES,
    TENSOR_TRAIN_INITS,
    TOGETHER,
    Choice,
    LevelSpec,
    PrunedSpec,
    RowsSpec,
    StorageRequest,
    StorageSpec,
    TensorTrainSpec,
    Tier,
)
from shardlab.words import check_share, check_word, parse_enum, refuse_unknown

_MAX_WAYS = 64


def parse_storage(value: Any, where: str) -> StorageRequest:
    """Reads a ``storage:`` entry.

    Args:
        value: a dtype name; ``{dtype, tier}``; ``{levels: [...]}``; ``{kind: tensor_train, ...}``;
            ``{kind: pruned, ...}``; ``{choose: [...]}``; or a spec.
        where: the place to name in an error, such as "table 'user': storage".

    Raises:
        ConfigError: unknown word, key, dtype or tier, or a chain that cannot be.
    """
    if isinstance(value, RowsSpec | TensorTrainSpec | PrunedSpec | Choice):
        return value
    if value is None:
        return RowsSpec()
    if isinstance(value, str):
        return RowsSpec((_parse_level({"dtype": value}, where, home=True),))
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected a dtype name or a mapping, found {value!r}")
    if "choose" in value:
        return _parse_choice(value, where)
    kind = value.get("kind", "rows")
    if kind not in _PARSERS:
        raise ConfigError(f"{where}: unknown kind {kind!r}{nearest_name(str(kind), [*_PARSERS])}; "
                          f"known: {', '.join(_PARSERS)}")
    return _PARSERS[kind]({key: item for key, item in value.items() if key != "kind"}, where)


def _parse_choice(value: Mapping[str, Any], where: str) -> Choice:
    refuse_unknown(value, ["choose"], where)
    options = value["choose"]
    if not isinstance(options, Sequence) or isinstance(options, str) or len(options) < 2:
        raise ConfigError(f"{where}.choose: expected a list of two storages or more, found "
                          f"{options!r}")
    parsed = [parse_storage(option, f"{where}.choose[{i}]") for i, option in enumerate(options)]
    flat = tuple(option for option in parsed if not isinstance(option, Choice))
    if len(flat) < len(parsed):
        raise ConfigError(f"{where}.choose: an option cannot be a choice itself")
    if len(set(flat)) < len(flat):
        raise ConfigError(f"{where}.choose: names an option twice: {options!r}")
    return Choice(flat)


def _parse_rows(value: Mapping[str, Any], where: str) -> RowsSpec:
    common = {key: value[key] for key in ("rounding", "state_dtype") if key in value}
    rest = {key: item for key, item in value.items() if key not in common}
    for key, known in (("rounding", ROUNDINGS), ("state_dtype", STATE_DTYPES)):
        if key in common:
            check_word(common[key], known, f"{where}.{key}")
    if "levels" not in rest:
        return RowsSpec((_parse_level(rest, where, home=True),), **common)
    refuse_unknown(rest, ["levels"], where)
    levels = rest["levels"]
    if not isinstance(levels, Sequence) or isinstance(levels, str) or not levels:
        raise ConfigError(f"{where}.levels: expected a list of levels from near to far, the last "
                          f"one holding every row; found {levels!r}")
    last = len(levels) - 1
    parsed = tuple(_parse_level(level, f"{where}.levels[{i}]", home=i == last)
                   for i, level in enumerate(levels))
    _check_chain(parsed, where)
    return RowsSpec(parsed, **common)


def _check_chain(levels: tuple[LevelSpec, ...], where: str) -> None:
    order = list(Tier)
    for i, level in enumerate(levels[:-1]):
        below, place = levels[i + 1], f"{where}.levels[{i}]"
        if level.tier is Tier.SSD:
            raise ConfigError(f"{place}: tier ssd holds a home, not a cache; put this level on hbm "
                              "or ddr, or leave it out")
        if level.tier and below.tier and order.index(level.tier) > order.index(below.tier):
            raise ConfigError(f"{place}: tier {level.tier.value} lies below {below.tier.value} of "
                              "the next level; levels go from near to far: hbm, ddr, ssd")
        if level.fraction > below.fraction:
            raise ConfigError(f"{place}: fraction {level.fraction:g} is more than the next level's "
                              f"{below.fraction:g}; a cache is smaller than what it caches")


def _parse_level(value: Any, where: str, *, home: bool) -> LevelSpec:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected a mapping, found {value!r}")
    refuse_unknown(value, [field.name for field in fields(LevelSpec)], where)
    level = LevelSpec(**value)
    if level.policy == "lru":
        if value.get("admission") == "frequency":
            raise ConfigError(f"{where}.admission: frequency compares counts of uses, which policy "
                              "lru does not keep; take policy lfu or admission always")
        level = replace(level, admission="always")
    check_word(level.dtype, DTYPES, where, "storage dtype")
    check_word(level.policy, POLICIES, f"{where}.policy")
    check_word(level.admission, ADMISSIONS, f"{where}.admission")
    tier = None if level.tier is None else parse_enum(Tier, level.tier, where)
    share = check_share(level.fraction, f"{where}.fraction")
    if home and share != 1.0:
        raise ConfigError(f"{where}.fraction: the last level is the home and holds every row; "
                          f"found {share:g}, leave fraction out or add a level below")
    if not home and "fraction" not in value:
        raise ConfigError(f"{where}: a cache needs a fraction of the rows, such as fraction: 0.05")
    if not isinstance(level.ways, int) or not 1 <= level.ways <= _MAX_WAYS:
        raise ConfigError(f"{where}.ways: expected 1 to {_MAX_WAYS} slots a set, "
                          f"found {level.ways!r}")
    return replace(level, tier=tier, fraction=share)


def _parse_tensor_train(value: Mapping[str, Any], where: str) -> TensorTrainSpec:
    refuse_unknown(value, [field.name for field in fields(TensorTrainSpec)], where)
    if "rank" not in value:
        raise ConfigError(f"{where}: tensor_train needs a rank, such as rank: 32")
    data = {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
    spec = TensorTrainSpec(**data)
    ranks = spec.rank if isinstance(spec.rank, tuple) else (spec.rank,)
    if not all(isinstance(rank, int) and rank > 0 for rank in ranks):
        raise ConfigError(f"{where}.rank: expected a positive integer or one per bond, "
                          f"found {value['rank']!r}")
    if spec.cores not in (2, 3, 4):
        raise ConfigError(f"{where}.cores: expected 2, 3 or 4, found {spec.cores!r}")
    check_word(spec.dtype, ("fp32", "bf16"), f"{where}.dtype")
    check_word(spec.init, TENSOR_TRAIN_INITS, f"{where}.init")
    if spec.cache_fraction:
        check_share(spec.cache_fraction, f"{where}.cache_fraction")
    if isinstance(spec.lr_scale, bool) or not isinstance(spec.lr_scale, int | float) \
            or not spec.lr_scale > 0:
        raise ConfigError(f"{where}.lr_scale: expected a positive number, found "
                          f"{spec.lr_scale!r}")
    for key in ("cache_warmup_steps", "cache_refresh_steps"):
        steps = getattr(spec, key)
        if type(steps) is not int or steps < 0:
            raise ConfigError(f"{where}.{key}: expected a number of steps, 0 or more, found "
                              f"{steps!r}")
    return replace(spec, tier=_parse_memory_tier(spec.tier, where))


def _parse_pruned(value: Mapping[str, Any], where: str) -> PrunedSpec:
    known = [field.name for field in fields(PrunedSpec) if field.name not in ("ratio", "bytes")]
    refuse_unknown(value, ["budget", *known], where)
    budget = value.get("budget")
    if not isinstance(budget, Mapping) or len(budget) != 1 or \
            next(iter(budget)) not in ("ratio", "bytes"):
        raise ConfigError(f"{where}.budget: expected {{ratio: 0.05}} or {{bytes: 2GB}}, "
                          f"found {budget!r}")
    spec = PrunedSpec(**{key: item for key, item in value.items() if key != "budget"})
    if "ratio" in budget:
        spec = replace(spec, ratio=check_share(budget["ratio"], f"{where}.budget.ratio"))
    else:
        spec = replace(spec, bytes=_parse_bytes(budget["bytes"], f"{where}.budget.bytes"))
    check_word(spec.dtype, PRUNED_DTYPES, f"{where}.dtype")
    check_word(spec.start, PRUNED_STARTS, f"{where}.start")
    check_word(spec.absent, PRUNED_ABSENT, f"{where}.absent")
    check_word(spec.admitted, PRUNED_ADMITTED, f"{where}.admitted")
    _check_whole(spec, {"chunks": 0, "width": 0, "warmup": 0, "ramp": 0, "period": 1}, where)
    check_share(spec.gamma, f"{where}.gamma")
    for key, most in (("hysteresis", 100.0), ("headroom", 0.5), ("sketch", 64.0), ("slack", 10.0),
                      ("evidence", 1e6)):
        _check_number(getattr(spec, key), most, f"{where}.{key}")
    if not isinstance(spec.normalize, bool) and spec.normalize != TOGETHER:
        raise ConfigError(f"{where}.normalize: expected true, false or {TOGETHER}, found "
                          f"{spec.normalize!r}")
    return replace(spec, tier=_parse_memory_tier(spec.tier, where))


_BYTE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
               "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def _parse_bytes(value: Any, where: str) -> int:
    """A number of bytes, or a text such as 2GB or 512 MiB."""
    if isinstance(value, str):
        digits = value.strip().rstrip("BKMGTibkmgt ")
        unit = value.strip()[len(digits):].strip().upper() or "B"
        if unit in _BYTE_UNITS and digits.replace(".", "", 1).isdigit():
            value = round(float(digits) * _BYTE_UNITS[unit])
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{where}: expected a positive integer, or a text such as 2GB; "
                          f"found {value!r}")
    return value


def _check_whole(spec: PrunedSpec, least: Mapping[str, int], where: str) -> None:
    for key, low in least.items():
        found = getattr(spec, key)
        if isinstance(found, bool) or not isinstance(found, int) or found < low:
            what = "a positive integer" if low else "an integer of at least 0"
            raise ConfigError(f"{where}.{key}: expected {what}, found {found!r}")


def _check_number(value: Any, most: float, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise ConfigError(f"{where}: expected a number from 0 to {most:g}, found {value!r}")


def _parse_memory_tier(tier: Any, where: str) -> Tier | None:
    found = None if tier is None else parse_enum(Tier, tier, f"{where}.tier")
    if found is Tier.SSD:
        raise ConfigError(f"{where}.tier: lives in memory, on hbm or ddr; found ssd")
    return found


_PARSERS: dict[str, Callable[[Mapping[str, Any], str], StorageSpec]] = {
    "rows": _parse_rows, "tensor_train": _parse_tensor_train, "pruned": _parse_pruned}


def storage_to_data(spec: StorageSpec) -> dict[str, Any]:
    """A spec as plain data that `parse_storage` reads back to an equal spec."""
    if isinstance(spec, RowsSpec):
        levels = [_plain(asdict(level)) for level in spec.levels]
        return {"levels": levels, "rounding": spec.rounding, "state_dtype": spec.state_dtype}
    data = _plain(asdict(spec))
    if isinstance(spec, TensorTrainSpec):
        return {"kind": "tensor_train", **data}
    budget = {key: data.pop(key) for key in ("ratio", "bytes") if data[key] is not None}
    data = {key: value for key, value in data.items() if key not in ("ratio", "bytes")}
    return {"kind": "pruned", "budget": budget, **data}


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value.value if isinstance(value, Tier) else
            list(value) if isinstance(value, tuple) else value for key, value in data.items()}
