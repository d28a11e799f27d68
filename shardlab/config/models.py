"""The sections of a job file as frozen pydantic models; every field says meaning and unit."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
)
from pydantic_core import PydanticCustomError

from shardlab.errors import ConfigError
from shardlab.presets import CRITEO_DENSE_NAMES
from shardlab.specs import UNBOUNDED, BoundsMode, ExchangeKind, PoolingType, ShardingType
from shardlab.storage_text import parse_storage


def _refuse_bool(value: Any) -> Any:
    """pydantic reads true as 1; in a job file that is a mistake."""
    if isinstance(value, bool):
        raise PydanticCustomError("bool_for_number", "Input should be a number")
    return value


def _auto_is_none(value: Any) -> Any:
    return None if value == "auto" else value


def _unbounded_is_a_count(value: Any) -> Any:
    if isinstance(value, str) and value != "unbounded" and not value.strip().isdigit():
        raise PydanticCustomError("placed", "{line}", {
            "line": f": must be a whole number or 'unbounded', found {value!r}"})
    return UNBOUNDED if value == "unbounded" else value


def _count_or_auto(value: Any) -> Any:
    """One message for a union, whose arms would each refuse the value under a name of their own."""
    if isinstance(value, str) and value.strip().isdigit():
        value = int(value)
    is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if not is_count and value not in ("auto", None):
        raise PydanticCustomError("placed", "{line}", {
            "line": f": must be a whole number above 0 or 'auto', found {value!r}"})
    return value


def _one_or_many(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def one_wire(value: Any) -> Any:
    """``wire: int8`` means both directions of the tables; the dense part has its own key."""
    return {"forward": value, "backward": value} if isinstance(value, str) else value


def _check_storage(value: Any) -> Any:
    """Keeps what the user wrote; the specs alone know what it means."""
    try:
        parse_storage(value, "")
    except ConfigError as error:
        raise PydanticCustomError("placed", "{line}", {"line": str(error)}) from None
    return value


Count = Annotated[int, BeforeValidator(_refuse_bool), Field(gt=0)]
Index = Annotated[int, BeforeValidator(_refuse_bool), Field(ge=0)]
Positive = Annotated[float, BeforeValidator(_refuse_bool), Field(gt=0)]
NotNegative = Annotated[float, BeforeValidator(_refuse_bool), Field(ge=0)]
Share = Annotated[float, BeforeValidator(_refuse_bool), Field(ge=0, lt=1)]
Name = Annotated[str, Field(min_length=1)]
RowRange = tuple[Index, Index | None]
HotRowCount = Annotated[int | Literal["auto"] | None, BeforeValidator(_count_or_auto),
                        Field(description=(
    "rows copied to every rank, those that ids take most often: how many, or auto: as many as "
    "relieve the busiest rank; docs/exchange.md"))]
Sharding = Annotated[tuple[ShardingType, ...] | None, BeforeValidator(_one_or_many),
                     BeforeValidator(_auto_is_none)]
Storage = Annotated[Any, AfterValidator(_check_storage), Field(description=(
    "how rows are held, as docs/storage.md says: a dtype name such as fp32, {dtype, tier}, "
    "{levels: [...]} or {choose: [...]}"))]


class Section(BaseModel):
    """A part of a job: frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TableConfig(Section):
    """One embedding table; the fields are those of `shardlab.EmbeddingBagConfig`."""

    name: Name = Field(description="unique name of the table")
    num_embeddings: Annotated[Count, BeforeValidator(_unbounded_is_a_count)] = Field(
        description="rows of the table; unbounded: any int64 id, in a pruned table")
    embedding_dim: Count = Field(description="columns, fp32 elements as the model sees them")
    feature_names: Annotated[tuple[Name, ...], BeforeValidator(_one_or_many)] = Field(
        default=(), description="features that read this table; empty: one, named like the table")
    pooling: PoolingType = Field(
        default=PoolingType.SUM, description="how a bag becomes one vector")
    pooling_factor: Positive = Field(
        default=1.0, description="ids per bag that the planner assumes")
    storage: Storage = "fp32"
    sharding: Sharding = Field(
        default=None, description="wanted sharding type, or a list of those allowed; auto lets "
        "the planner choose")
    ranks: tuple[Index, ...] = Field(
        default=(), description="the only ranks that may hold a part of the table; empty: all")
    max_column_splits: Count | None = Field(
        default=None, description="most column blocks that the planner may cut")
    exchange: ExchangeKind = Field(
        default=ExchangeKind.AUTO, description="what crosses the wire: unique rows or pooled bags")
    bounds: BoundsMode = Field(
        default=BoundsMode.ERROR, description="what happens to an id outside the table")
    hot_rows: HotRowCount = None
    weight_init_min: float | None = Field(
        default=None, description="lower end of the uniform initial weights; absent: -1/sqrt(rows)")
    weight_init_max: float | None = Field(
        default=None, description="upper end of the uniform initial weights; absent: +1/sqrt(rows)")


class TablesPreset(Section):
    """A known set of tables instead of a list."""

    preset: Literal["criteo_kaggle"] = Field(description="name of the set of tables")
    embedding_dim: Count = Field(default=16, description="columns of every table, fp32 elements")
    max_rows: Count | None = Field(
        default=None, description="rows that no table may exceed; absent: the full cardinalities")
    storage: Storage = "fp32"
    storages: dict[Name, Storage] = Field(
        default={}, description="how single tables are held, by name such as t_C3, in place of "
        "storage")
    sharding: Sharding = Field(
        default=None,
        description="wanted sharding type of every table, or a list of those allowed; auto lets "
        "the planner choose")
    exchange: ExchangeKind = Field(
        default=ExchangeKind.AUTO, description="what crosses the wire, for every table")
    bounds: BoundsMode = Field(
        default=BoundsMode.ERROR, description="what happens to an id outside its table")
    hot_rows: HotRowCount = None


def _kind_of_tables(value: Any) -> str:
    return "@TablesPreset" if isinstance(value, dict | TablesPreset) else "@TableConfig"


#: The tags start with "@" so that an error's place can leave them out.
Tables = Annotated[
    Annotated[tuple[TableConfig, ...], Tag("@TableConfig")]
    | Annotated[TablesPreset, Tag("@TablesPreset")],
    Discriminator(_kind_of_tables),
]


class ModelConfig(Section):
    """The dense model over the embeddings."""

    kind: Literal["dlrm", "deepfm", "dcn"] = Field(default="dlrm", description="architecture")
    bottom_mlp: tuple[Count, ...] = Field(
        default=(512, 256),
        description="dlrm: widths of the layers over the dense features; the embedding dimension "
        "is appended where the last width differs from it")
    top_mlp: tuple[Count, ...] = Field(
        default=(512, 256),
        description="widths of the hidden layers before the logit (deepfm, dcn: of the deep "
        "network)")
    cross_layers: Count = Field(default=3, description="dcn: number of cross layers")
    cross_rank: Count | None = Field(
        default=None, description="dcn: rank of the cross layers' weights; absent: full rank")


class ColumnsConfig(Section):
    """Which column is what; the Criteo kinds know their label and dense columns themselves."""

    label: Name = Field(default="label", description="parquet: column of the label, 0 or 1")
    dense: tuple[Name, ...] = Field(
        default=(), description="parquet: columns of the dense features, in order")
    sparse: dict[str, Name] = Field(
        default={},
        description="feature name -> column of its ids; a feature that is not listed reads the "
        "column of its own name")
    log_dense: bool = Field(
        default=False,
        description="parquet: dense values x become log(max(x, 0) + 1), as for counts")
    raw_integers: bool = Field(
        default=False,
        description="parquet: integer columns hold row numbers of the tables, and are not hashed")


class DataConfig(Section):
    """Where samples come from, and which of them train and which validate."""

    kind: Literal["synthetic_criteo", "criteo_tsv", "criteo_parquet", "parquet"] = Field(
        default="synthetic_criteo",
        description="format of the data; synthetic_criteo needs no file")
    path: Annotated[tuple[Name, ...], BeforeValidator(_one_or_many)] = Field(
        default=(),
        description="file, glob pattern, or list of them, read in the order given; relative to the "
        "working directory")
    train_rows: RowRange | None = Field(
        default=None,
        description="rows [start, stop) to train on, counted over all files; stop null: to the "
        "end; absent: all rows before those that validate, or behind them if they come first")
    validation_rows: RowRange | None = Field(
        default=None,
        description="rows [start, stop) to validate on; absent, and no validation_fraction: none")
    validation_fraction: Share | None = Field(
        default=None, description="share of all rows, taken from the end, to validate on")
    columns: ColumnsConfig = Field(
        default=ColumnsConfig(), description="which column of the data is what")
    on_bad_row: Literal["error", "skip"] = Field(
        default="error",
        description="of a file; a row that cannot be read: stop and name it, or count and skip it")
    seed: Index = Field(default=0, description="synthetic_criteo: seed of the generator")

    @property
    def num_dense(self) -> int:
        """Number of dense features of a sample."""
        if self.kind == "parquet":
            return len(self.columns.dense)
        return len(CRITEO_DENSE_NAMES)


class SparseOptimizerConfig(Section):
    """The optimiser fused into the tables' update."""

    kind: Literal["sgd", "adagrad", "row_wise_adagrad", "adam", "row_wise_adam"] = Field(
        default="row_wise_adagrad", description="update rule")
    lr: NotNegative = Field(default=0.05, description="learning rate")
    eps: Positive | None = Field(
        default=None, description="adagrad, adam: added to the denominator; absent: the rule's own")
    betas: tuple[Share, Share] | None = Field(
        default=None,
        description="adam: decay of the first and second moment; absent: the rule's own")
    weight_decay: NotNegative | None = Field(
        default=None, description="sgd: L2 penalty; absent: none")
    clip_value: Positive | None = Field(
        default=None, description="limit of each element of a row's gradient; absent: none")
    clip_norm: Positive | None = Field(
        default=None,
        description="limit of the norm of all rows' gradients of a step together; absent: none")


class DenseOptimizerConfig(Section):
    """The optimiser of the dense layers."""

    kind: Literal["sgd", "adagrad", "adam", "adamw"] = Field(
        default="adam", description="update rule")
    lr: NotNegative = Field(default=0.001, description="learning rate")
    eps: Positive | None = Field(
        default=None,
        description="adagrad, adam, adamw: added to the denominator; absent: torch's own")
    betas: tuple[Share, Share] | None = Field(
        default=None, description="adam, adamw: decay of the moments; absent: torch's own")
    momentum: Share | None = Field(default=None, description="sgd: momentum; absent: none")
    weight_decay: NotNegative | None = Field(
        default=None, description="L2 penalty (adamw: decoupled); absent: torch's own")


class ScheduleConfig(Section):
    """Factor on both learning rates over the steps."""

    kind: Literal["constant", "linear_warmup", "cosine", "linear_decay"] = Field(
        default="constant", description="shape of the factor")
    warmup_steps: Index = Field(
        default=0, description="steps over which the factor rises linearly from near 0 to 1")
    steps: Count | None = Field(
        default=None,
        description="cosine, linear_decay: step at which the factor reaches final_factor")
    final_factor: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="cosine, linear_decay: factor from then on")


class OptimizerConfig(Section):
    """Optimisers of tables and dense layers, and the schedule of both."""

    sparse: SparseOptimizerConfig = Field(
        default=SparseOptimizerConfig(), description="optimiser of the tables")
    dense: DenseOptimizerConfig = Field(
        default=DenseOptimizerConfig(), description="optimiser of the dense layers")
    schedule: ScheduleConfig = Field(default=ScheduleConfig(), description="learning-rate schedule")


DenseWireCodec = Literal["fp32", "fp16", "bf16", "fp8", "fp8_e5m2", "int8", "int4"]
WireCodec = Literal[DenseWireCodec, "auto"]


class TableWireConfig(Section):
    """Codecs of one table; what is absent is that of all."""

    forward: WireCodec | None = Field(default=None, description="codec of rows")
    backward: WireCodec | None = Field(default=None, description="codec of gradients")
    rounding: Literal["stochastic", "nearest"] | None = Field(
        default=None, description="how gradients are rounded")
    error_feedback: bool | None = Field(default=None, description="as for all tables")


class WireConfig(Section):
    """Codecs of what ranks exchange; docs/wire.md."""

    forward: WireCodec = Field(
        default="fp32", description="codec of rows on the wire; auto: the cheapest whose error on "
        "the first batches stays below bound")
    backward: WireCodec = Field(
        default="fp32", description="codec of gradients on the wire; auto: as for rows")
    dense: DenseWireCodec = Field(
        default="fp32", description="codec of the dense part's gradients on the wire; wire: CODEC "
        "leaves it as it is")
    rounding: Literal["stochastic", "nearest"] = Field(
        default="stochastic", description="how gradients are rounded; rows go to the nearest")
    error_feedback: bool = Field(
        default=False, description="add what rounding took from a row's gradient to its next one; "
        "4 bytes per element of the tables on every rank, tables of exchange rows only")
    bound: Positive = Field(
        default=0.02, description="auto: largest relative error (L2) that any sampled row may have")
    tables: dict[Name, TableWireConfig] = Field(
        default={}, description="by table: what differs from the above")


class ExchangeConfig(Section):
    """How ranks talk, and how far ahead of the step they do it."""

    transport: Literal["auto", "gloo", "shared_memory"] = Field(
        default="auto", description="CPU ranks: shared_memory, where all share a host, or gloo; "
        "auto takes shared memory where it can")
    timeout_s: Positive = Field(
        default=600.0, description="seconds after which a collective has failed, and the run with "
        "it; the error names phase and rank")
    hierarchy: Literal["auto", "flat", "two_stage"] = Field(
        default="auto", description="how ids, rows and gradients cross hosts: flat, rank by rank, "
        "or two_stage, united and merged per host first; auto takes what the plan's byte count "
        "says is faster")
    depth: Index | None = Field(
        default=None, description="batches whose ids and rows are exchanged while earlier ones "
        "train; 0: none; absent: 0 where ranks share memory and no table is on disk, else 1, and "
        "between CPUs of several hosts what of both trains faster, tried on the first 50 batches")
    staleness: Literal[0, 1] = Field(
        default=0, description="0: rows are as if nothing ran ahead, bit by bit; 1: all rows may "
        "lack the last update, so that their whole exchange can be hidden")


class ParallelConfig(Section):
    """Groups of ranks that each hold all tables; docs/exchange.md."""

    replicas: Count = Field(
        default=1, description="groups of ranks that each hold all tables and exchange rows among "
        "themselves alone; divides the number of ranks")
    sync_every_steps: Count = Field(
        default=1, description="1: groups merge the gradients of every step, and train as one; N: "
        "each steps by its own, and every N steps rows that they have changed become the mean")


class TrainConfig(Section):
    """How long to train, and what to write down on the way."""

    epochs: Count = Field(default=1, description="passes over the training rows")
    max_steps: Count | None = Field(
        default=None, description="steps to stop after; absent: no limit")
    log_every: Count = Field(default=50, description="steps between two lines of metrics")
    validate_every: Count | None = Field(
        default=None, description="steps between two validations; absent: only at the end")
    checkpoint_every: Count | None = Field(
        default=None, description="steps between two checkpoints; absent: only at the end")
    checkpoint_keep: Count = Field(default=2, description="newest checkpoints that are kept")
    checkpoint_background: bool = Field(
        default=True, description="train on while a checkpoint is written")
    checkpoint_incremental: bool = Field(
        default=False,
        description="save only the rows that changed since the last full checkpoint")
    checkpoint_full_every: Count = Field(
        default=8, description="then, how many checkpoints there are to a full one")
    ssd_dir: Name | None = Field(
        default=None, description="folder on a disk for tables with a level on ssd; every rank "
        "makes one of its own in it; absent: no table may have one")
    run_dir: Name | None = Field(
        default=None,
        description="folder of metrics, plan and checkpoints; absent: runs/<date-time>")
    seed: Index = Field(default=0, description="seed of the initial weights")
    tensorboard: bool = Field(
        default=False, description="write TensorBoard events into the run folder")
    time_phases: bool = Field(
        default=False,
        description="on GPUs, too, record the milliseconds of every phase of a step; on CPUs they "
        "always are")
    trace: Count | None = Field(
        default=None, description="first steps of this start to record in the run folder's "
        "trace.json, for chrome://tracing; absent: none")
    resume: Name = Field(
        default="auto",
        description="auto: continue from the newest checkpoint of the run folder, if any; never: "
        "start anew; else the path of a checkpoint to continue from")
    elastic: bool = Field(
        default=False,
        description="go on with another number of ranks than topology or plan name, planned anew "
        "for those that are there")
    on_nan: Literal["stop", "skip_batch"] = Field(
        default="stop",
        description="a loss or gradient that is NaN or infinite: stop and name where it is first, "
        "or leave the batch out on all ranks")
    stall_timeout_s: Positive | None = Field(
        default=600.0,
        description="seconds without a finished step or batch of validation, or a byte of a "
        "checkpoint, after which a run ends and names the rank and phase that it waits for; "
        "null: never")
    check_memory: bool = Field(
        default=True,
        description="before the first step, refuse a job that is predicted not to fit the memory "
        "that is free")
    deterministic: bool = Field(
        default=True,
        description="use torch's deterministic algorithms, so that a run repeats bit by bit")
