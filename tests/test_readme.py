"""What README.md and docs/ show is true: code runs, jobs load, tables name what exists."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import types
import typing
from enum import Enum
from pathlib import Path

import pytest
import torch
import yaml
from pydantic.fields import FieldInfo

from shardlab.cli.main import app
from shardlab.config import JobConfig, load_job
from shardlab.config.models import (
    ColumnsConfig,
    DataConfig,
    DenseOptimizerConfig,
    ExchangeConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    Section,
    SparseOptimizerConfig,
    TableConfig,
    TablesPreset,
    TableWireConfig,
    TrainConfig,
    WireConfig,
)
from shardlab.launch.train import run_job
from shardlab.ops.registry import FACES, OPS
from shardlab.planner import local_cpu, plan
from shardlab.specs import ShardingType

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")] + \
    sorted((ROOT / "docs").glob("*.md"))
README = (ROOT / "README.md").read_text()
QUICK_START_LINES = 12


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def readme_job(tmp_path: Path) -> Path:
    (block,) = blocks(README, "yaml")
    path = tmp_path / "job.yaml"
    path.write_text(block)
    return path


# ---------------------------------------------------------------------- README
def test_quick_start_runs(tmp_path):
    (code,) = blocks(README, "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= QUICK_START_LINES
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=tmp_path,
                          capture_output=True, text=True)
    found = re.fullmatch(r"loss (0\.\d+), tables ([\d,]+) bytes\n", done.stdout)
    assert found, done.stdout
    assert float(found[1]) < 0.56  # a constant gives 0.57
    rows = 1_460 + 1_000_000 + 3 + 27
    assert found[2] == f"{rows * (8 + 1) * 4:,}"  # 8 columns and one state each


def test_quick_start_is_the_example():
    (code,) = blocks(README, "python")
    example = ast.parse((ROOT / "examples" / "quickstart.py").read_text())
    assert ast.get_docstring(example)
    assert ast.dump(ast.Module(example.body[1:], [])) == ast.dump(ast.parse(code))


def test_readme_job_is_valid_and_can_be_planned(tmp_path):
    job = load_job(readme_job(tmp_path), [])
    result = plan(job.table_configs(), local_cpu(job.ranks), job.batch_size,
                  job.optimizer.sparse.kind)
    result.plan.check(job.table_configs(), job.ranks)
    steps = -(-job.data.train_rows[1] // (job.batch_size * job.ranks))
    assert job.optimizer.schedule.steps == steps


def test_readme_job_trains(tmp_path):
    job = load_job(readme_job(tmp_path), [
        "ranks=1", "batch_size=16", "train.max_steps=2", "data.validation_rows=[400000, 400032]",
        f"train.run_dir={tmp_path / 'run'}"])
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        assert run_job(job) == 0
    finally:
        torch.use_deterministic_algorithms(deterministic)


def test_readme_names_every_sharding_type_and_command():
    rows = set(re.findall(r"^\| `([\w ]+?)(?: JOB\.yaml)?` \|", README, re.MULTILINE))
    assert rows == {kind.value for kind in ShardingType} | \
        {f"shardlab {command}" for command in app.commands}


# ---------------------------------------------------------------------- all pages
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_named_files_exist(page):
    """Paths in backticks such as `shardlab/sharded/cells.py`, from the root or a source folder."""
    named = re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|cpp|h|yaml|md))`", page.read_text())
    missing = [name for name in named
               if not (ROOT / name).exists() and not (ROOT / "shardlab" / name).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_yaml_parts_of_jobs_are_valid(page, tmp_path):
    """Every YAML block is a job, or some keys of one laid over a complete job."""
    for number, block in enumerate(blocks(page.read_text(), "yaml")):
        whole = yaml.safe_load(readme_job(tmp_path).read_text())
        part = tmp_path / f"{number}.yaml"
        part.write_text(yaml.safe_dump({**whole, **yaml.safe_load(block)}))
        data = tmp_path / "clicks"
        data.write_text("")
        needs_file = "path" in (yaml.safe_load(block).get("data") or {})
        load_job(part, [f"data.path={data}"] if needs_file else [])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_of_pages_compile(page):
    for block in blocks(page.read_text(), "python"):
        compile(block, page.name, "exec")


def test_ops_page_lists_the_registry():
    page = (ROOT / "docs" / "ops.md").read_text()
    rows = re.findall(r"^\| `([a-z_]+)` \|[^|]+\| (yes|no) \| (yes|no) \|$", page, re.MULTILINE)
    listed = {op: tuple(face for face, has in zip(FACES[1:], cells, strict=True) if has == "yes")
              for op, *cells in rows}
    assert listed == OPS


# ---------------------------------------------------------------------- the job file's reference
SECTIONS: tuple[tuple[str, type[Section]], ...] = (
    ("The job", JobConfig), ("tables[i]", TableConfig), ("tables, as a preset", TablesPreset),
    ("model", ModelConfig), ("data", DataConfig), ("data.columns", ColumnsConfig),
    ("optimizer", OptimizerConfig), ("optimizer.sparse", SparseOptimizerConfig),
    ("optimizer.dense", DenseOptimizerConfig), ("optimizer.schedule", ScheduleConfig),
    ("exchange", ExchangeConfig), ("wire", WireConfig), ("wire.tables", TableWireConfig),
    ("parallel", ParallelConfig), ("train", TrainConfig))


def words_of(annotation: object) -> list[str]:
    """The words that a field of this type takes, if it takes words only."""
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return [str(member.value) for member in annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return list(map(str, arguments))
    if origin in (typing.Annotated, typing.Union, types.UnionType, tuple):
        return [word for part in arguments for word in words_of(part)]
    return []


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, Section) or value is None or value in ((), {}, ""):
        return ""
    value = list(value) if isinstance(value, tuple) else getattr(value, "value", value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def reference_of(title: str, section: type[Section]) -> str:
    """One section of docs/job_file.md."""
    lines = [f"## {title}", "", section.__doc__.splitlines()[0], "",
             "| key | default | meaning |", "|---|---|---|"]
    for name, field in section.model_fields.items():
        words = words_of(field.annotation)
        one_of = f"; one of {', '.join(f'`{word}`' for word in words)}" if len(words) > 1 else ""
        lines.append(f"| `{name}` | {default_of(field)} | {field.description}{one_of} |")
    return "\n".join(lines)


@pytest.mark.parametrize(("title", "section"), SECTIONS, ids=[title for title, _ in SECTIONS])
def test_job_file_page_holds_every_key(title, section):
    wanted = reference_of(title, section)
    page = (ROOT / "docs" / "job_file.md").read_text()
    assert wanted in page, f"docs/job_file.md: write this section as\n\n{wanted}\n"
