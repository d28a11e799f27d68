"""A job file: YAML and overrides in, one valid frozen `JobConfig` out, or every problem at once.

Precedence: ``--set key=value`` overrides the file, the file overrides the defaults.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from shardlab.config.checks import run_checks, table_specs
from shardlab.config.messages import problem_lines
from shardlab.config.models import (
    Count,
    DataConfig,
    ExchangeConfig,
    ModelConfig,
    Name,
    OptimizerConfig,
    ParallelConfig,
    Section,
    Tables,
    TrainConfig,
    WireConfig,
    one_wire,
)
from shardlab.config.parts import valid_parts, valid_parts_of
from shardlab.config.source import apply_overrides, read_source
from shardlab.errors import ConfigError
from shardlab.specs import EmbeddingBagConfig

__all__ = ["DEMO_JOB", "JobConfig", "load_job"]

#: The job that runs where none is given: Criteo-like data, made on the fly.
DEMO_JOB = Path(__file__).with_name("demo.yaml")
_FILES = "files"


class JobConfig(Section):
    """Everything a run needs to know; the same file serves plan, train and launch."""

    batch_size: Count = Field(default=2048, description="samples per rank and step")
    ranks: Count = Field(
        default=1,
        description="processes to start on this machine where torchrun or srun started none; for "
        "plan: the world size where no topology is given")
    tables: Tables = Field(description="list of tables, or {preset: criteo_kaggle, ...}")
    model: ModelConfig = Field(default=ModelConfig(), description="dense model over the embeddings")
    data: DataConfig = Field(
        default=DataConfig(train_rows=(0, 2_000_000), validation_rows=(2_000_000, 2_100_000)),
        description="where samples come from; absent: generated Criteo-like data")
    optimizer: OptimizerConfig = Field(
        default=OptimizerConfig(), description="optimisers and learning-rate schedule")
    dense_dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description="compute dtype of the dense layers; bf16: by autocast")
    exchange: ExchangeConfig = Field(
        default=ExchangeConfig(), description="how ranks talk, and how far ahead of the step")
    wire: Annotated[WireConfig, BeforeValidator(one_wire)] = Field(
        default=WireConfig(), description="codecs of what ranks exchange; a codec's name stands "
        "for both directions")
    parallel: ParallelConfig = Field(
        default=ParallelConfig(), description="replica groups of the tables")
    topology: Name | None = Field(
        default=None, description="machine to plan for: a name or a file; absent: this one")
    statistics: Name | None = Field(
        default=None, description="file of `shardlab stats` that planning reads; absent: a Zipf "
        "assumption")
    plan: Name | None = Field(
        default=None, description="path of a plan as JSON to execute; absent: plan here, now")
    train: TrainConfig = Field(
        default=TrainConfig(), description="how long to train, what to write")

    @model_validator(mode="after")
    def _check_together(self, info: ValidationInfo) -> JobConfig:
        files = (info.context or {}).get(_FILES, True)
        problems = run_checks(valid_parts(self), files)
        if problems:
            raise PydanticCustomError("job", "{problems}", {"problems": "\n".join(problems)})
        return self

    def table_configs(self) -> list[EmbeddingBagConfig]:
        """The tables as specs, a preset written out."""
        return table_specs(self.tables)

    def resolved_yaml(self) -> str:
        """The whole job, defaults written out, as YAML that `load_job` reads to an equal job."""
        text = yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False,
                              allow_unicode=True, default_flow_style=None, width=100)
        return str(text)


def load_job(path: str | Path | None, overrides: list[str] | None = None,
             files: bool = True) -> JobConfig:
    """Reads a job file and applies overrides.

    Args:
        path: YAML file; None: the demo job.
        overrides: ``a.b[2].c=value`` lines, each value read as YAML.
        files: whether the job's data and checkpoints must be on this machine; a plan is made
            without them.

    Raises:
        ConfigError: lists every problem found, each line starting with its YAML path.
    """
    data, problems = read_source(Path(path) if path is not None else DEMO_JOB)
    problems += apply_overrides(data, overrides or [])
    job = None
    try:
        job = JobConfig.model_validate(data, context={_FILES: files})
    except ValidationError as error:
        problems += problem_lines(JobConfig, data, error)
        problems += run_checks(valid_parts_of(JobConfig, data), files)
    if job is None or problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return job
