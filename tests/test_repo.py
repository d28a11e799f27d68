"""The shape of the sources: import order, sizes, docstrings, and what must not appear in them."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import LONGEST

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("shardlab", "planner", "launch")
ALL_FOLDERS = (*SOURCES, "csrc", "tests", "benchmarks", "examples")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 80
HELP_LIMIT_S = 0.3

#: Each may import those before it, and itself. Parts of a layer follow it by name.
DATA = ("errors", "words", "cache_layout", "chunk_layout", "pages", "log_layout",
        "tensor_train_shapes", "storage_specs", "storage_bytes", "wire_bytes", "storage_text",
        "row_sets", "replication", "specs", "presets", "table_plan", "plan_problems", "plan",
        "phases", "config")
ORDER = (*DATA, "_jagged", "jagged", "codecs", "ops", "optim",
         "tiers", "storage", "comm", "sharded", "models", "data", "train", "inference",
         "interop", "inspection", "launch", "cli")
PLANNER_MAY_IMPORT = {*DATA, "planner"}
MAY_IMPORT_PLANNER = {"planner", "launch", "cli"}
WITHOUT_TORCH = {*DATA, "planner"}


def files(*suffixes: str, folders: tuple[str, ...] = ALL_FOLDERS) -> list[Path]:
    """The repository's files with these suffixes, as paths from its root."""
    return sorted(path.relative_to(ROOT) for folder in folders
                  for path in (ROOT / folder).rglob("*")
                  if path.suffix in suffixes and "__pycache__" not in path.parts)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), str(path))


def layer_of(path: Path) -> str:
    """The layer of a source file: ``shardlab/ops/rows.py`` is ops, ``planner/exact.py`` planner."""
    parts = path.with_suffix("").parts
    return parts[1] if parts[0] == "shardlab" else parts[0]


def package_parts(path: Path) -> tuple[str, ...]:
    return path.parts if path.parts[0] == "shardlab" else ("shardlab", *path.parts)


def imports(path: Path, *, of_module: bool = False) -> Iterator[tuple[int, str]]:
    """(line, module) of every import; ``from a import b`` gives a.b.

    Args:
        path: of the source file.
        of_module: only those that stand in no function; those for types alone count.
    """
    package = package_parts(path)
    top = [node for part in tree(path).body
           for node in (part.body if isinstance(part, ast.If) else [part])]
    for node in top if of_module else ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[:-node.level]) if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)


def imported_layers(path: Path) -> Iterator[tuple[int, str]]:
    for line, module in imports(path):
        parts = module.split(".")
        if parts[0] == "shardlab" and len(parts) > 1:
            yield line, parts[1]


def modules() -> list[Path]:
    """Source modules that belong to a layer: all but the package's own face."""
    return [path for path in files(".py", folders=SOURCES)
            if path != Path("shardlab/__init__.py")]


def test_every_module_belongs_to_a_layer():
    assert {layer_of(path) for path in modules()} <= {*ORDER, "planner"}


def test_imports_go_one_way():
    wrong = []
    for path in modules():
        layer = layer_of(path)
        if layer == "planner":
            continue
        before = {*ORDER[:ORDER.index(layer) + 1], "_native"}
        if layer in MAY_IMPORT_PLANNER:
            before.add("planner")
        wrong += [f"{path}:{line}: {layer} may not import {other}"
                  for line, other in imported_layers(path) if other not in before]
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other():
    """Also not for types: who reads one of them need not know the other."""
    names = {".".join(package_parts(path.with_suffix(""))).removesuffix(".__init__"): path
             for path in modules()}
    graph = {}
    for name, path in names.items():
        found = {module if module in names else module.rpartition(".")[0]
                 for _, module in imports(path, of_module=True)}
        graph[name] = found & names.keys() - {name}
    graphlib.TopologicalSorter(graph).prepare()  # raises a CycleError that names the circle


def test_planner_imports_only_plain_data():
    wrong = [f"{path}:{line}: planner may not import {other}" for path in modules()
             if layer_of(path) == "planner" for line, other in imported_layers(path)
             if other not in PLANNER_MAY_IMPORT]
    assert not wrong, "\n".join(wrong)


def test_plain_data_never_names_torch():
    wrong = [f"{path}:{line}: imports {module}" for path in modules()
             if layer_of(path) in WITHOUT_TORCH for line, module in imports(path)
             if module.split(".")[0] == "torch"]
    assert not wrong, "\n".join(wrong)


def test_sources_import_no_tests():
    wrong = [f"{path}:{line}: imports {module}" for path in modules()
             for line, module in imports(path)
             if module.split(".")[0] in ("tests", "benchmarks", "pytest")]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("code", [
    "import shardlab",
    "import shardlab.planner, shardlab.planner.report",
    "import shardlab.config; shardlab.config.load_job(None).table_configs()",
    "import shardlab.cli.main",
])
def test_starts_without_torch(code):
    check = f"import sys; {code}; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)


def test_plan_command_imports_no_torch():
    check = ("import sys; from shardlab.cli.main import _run; "
             "code = _run(['plan', '--demo']); "
             "assert code == 0 and 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60, capture_output=True)


def test_help_answers_at_once():
    best = float("inf")
    for _ in range(5):  # CPU time of the quickest: on an idle machine that is what it takes
        before = os.times()
        done = subprocess.run([sys.executable, "-m", "shardlab.cli", "--help"], check=True,
                              timeout=60, capture_output=True, text=True)
        after = os.times()
        best = min(best, after.children_user - before.children_user
                   + after.children_system - before.children_system)
    assert "train" in done.stdout
    assert best < HELP_LIMIT_S


def test_files_are_short():
    long = [f"{path}: {lines} lines" for path in files(".py", ".cpp", ".h", ".cu", ".cuh")
            if (lines := len((ROOT / path).read_text().splitlines())) > MAX_FILE_LINES]
    assert not long, f"over {MAX_FILE_LINES} lines:\n" + "\n".join(long)


def test_python_functions_are_short():
    long = []
    for path in files(".py"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long.append(f"{path}:{node.lineno}: {node.name}: {lines} lines")
    assert not long, f"over {MAX_FUNCTION_LINES} lines:\n" + "\n".join(long)


#: Preprocessor lines, comments, raw strings, strings and characters.
_CPP_NOISE = re.compile("|".join([
    r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", r"//[^\n]*", r"/\*.*?\*/", r'R"(\w*)\(.*?\)\1"',
    r'"(?:\\.|[^"\\\n])*"', r"'(?:\\.|[^'\\\n])+'"]), re.DOTALL | re.MULTILINE)
_CPP_NO_BODY = re.compile(
    r"\s*(?:template\s*<.*>\s*)?(?:namespace|struct|class|enum|union|extern)\b", re.DOTALL)


def cpp_functions(text: str) -> Iterator[tuple[int, int]]:
    """(first line of the body, lines) of every outermost function body in C++ text."""
    text = _CPP_NOISE.sub(lambda found: "\n" * found.group(0).count("\n"), text)
    head, line, open_blocks, body = "", 1, [], None
    for char in text:
        if char == "{":
            # A block after a parameter list is a body; namespaces, types and tables are not.
            is_body = body is None and ")" in head and not _CPP_NO_BODY.match(head) and \
                "=" not in head.split("(")[0]
            body = len(open_blocks) if is_body else body
            open_blocks.append(line)
        elif char == "}":
            start = open_blocks.pop()
            if body == len(open_blocks):
                yield start, line - start + 1
                body = None
        line += char == "\n"
        head = "" if char in "{};" else head + char


def test_cpp_function_lengths_are_found():
    text = ('#if defined(X)\n#define Y(a) \\\n  {\n#endif\nnamespace a {\nstruct S { int x; };\n'
            "int f(int x) {  // {\n  if (x) {\n    return 1;\n  }\n"
            '  const char* s = "}";\n  return 0;\n}\nvoid g() {}\n}  // namespace a\n')
    assert list(cpp_functions(text)) == [(7, 7), (14, 1)]


def test_cpp_functions_are_short():
    long = [f"{path}:{line}: {lines} lines" for path in files(".cpp", ".h", ".cu", ".cuh")
            for line, lines in cpp_functions((ROOT / path).read_text())
            if lines > MAX_FUNCTION_LINES]
    assert not long, f"over {MAX_FUNCTION_LINES} lines:\n" + "\n".join(long)


def test_cpp_prefetches_are_inlined():
    """A function that only prefetches has no effect for a compiler, which drops calls of it."""
    define = re.compile(r"^.*\b(?:void|auto) prefetch\w*\(.*\{", re.MULTILINE)
    found = [(path, line) for path in files(".cpp", ".h", folders=("csrc",))
             for line in define.findall((ROOT / path).read_text())]
    assert len(found) > 5
    assert not [f"{path}: {line.strip()}" for path, line in found
                if "SHARDLAB_INLINE" not in line and "always_inline" not in line]


def test_csrc_knows_no_torch():
    wrong = [str(path) for path in files(".cpp", ".h", ".cu", ".cuh", folders=("csrc",))
             if re.search(r"#include\s*[<\"](torch|ATen|c10)/", (ROOT / path).read_text())]
    assert not wrong


def test_public_functions_and_classes_have_docstrings():
    missing = []
    for path in files(".py", folders=SOURCES):
        if ast.get_docstring(tree(path)) is None:
            missing.append(f"{path}: the module")
        missing += [f"{path}:{node.lineno}: {node.name}" for node in tree(path).body
                    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
                    and not node.name.startswith("_") and ast.get_docstring(node) is None]
    assert not missing, "\n".join(missing)


_UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve"}
#: Calls that run what they read, directly or by pickle.
_UNSAFE_CALLS = {
    "eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all",
    "torch.save", "all_gather_object", "gather_object", "broadcast_object_list",
    "scatter_object_list", "send_object_list", "recv_object_list", "os.system",
}


#: Where other frameworks are spoken to: what they write is read by an unpickler that makes the
#: classes of an index only; what they read is a file of torch's.
_AT_THE_BORDER = {"shardlab/interop/dcp.py": "pickle", "shardlab/interop/export.py": "torch.save"}


def unsafe_calls(path: Path) -> Iterator[str]:
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        short = name.rpartition(".")[2] if name.endswith(("_object", "_object_list")) else name
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if short in _UNSAFE_CALLS or keywords.get("shell") == "True" or \
                (name == "torch.load" and keywords.get("weights_only") != "True"):
            if _AT_THE_BORDER.get(path.as_posix()) == name:
                continue
            yield f"{path}:{node.lineno}: {name}"


def test_nothing_read_is_executed():
    wrong = [call for path in files(".py", folders=SOURCES) for call in unsafe_calls(path)]
    wrong += [f"{path}:{line}: imports {module}" for path in files(".py", folders=SOURCES)
              for line, module in imports(path) if module.split(".")[0] in _UNSAFE_MODULES
              and _AT_THE_BORDER.get(path.as_posix()) != module]
    assert not wrong, "\n".join(wrong)


def test_no_unfinished_work_and_no_machine_paths():
    words = re.compile("|".join(["TO" + "DO", "FIX" + "ME", r"/(?:wo" + r"rk|ro" + r"ot)/\w"]))
    found = []
    suffixes = (".py", ".cpp", ".h", ".cu", ".cuh", ".yaml", ".toml", ".md")
    tops = [path.relative_to(ROOT) for path in ROOT.glob("*") if path.suffix in suffixes]
    for path in [*files(*suffixes, folders=(*ALL_FOLDERS, "docs")), *tops]:
        found += [f"{path}:{number}: {line.strip()}" for number, line in
                  enumerate((ROOT / path).read_text().splitlines(), 1) if words.search(line)]
    assert not found, "\n".join(found)


def test_tests_mirror_the_sources():
    """tests/a/b/test_c.py tests a module or folder of that name, or one folder as a whole."""
    known = {path.with_suffix("").as_posix() for path in modules()}
    known |= {path.parent.as_posix() for path in modules()}
    strange = []
    for path in files(".py", folders=("tests",)):
        if path.parent in (Path("tests"), Path("tests/bench")) or not path.name.startswith("test_"):
            continue
        if path.parent.relative_to("tests").as_posix() not in {*known, "examples", "benchmarks"}:
            strange.append(f"{path}: no folder {path.parent.relative_to('tests')} in the sources")
    assert not strange, "\n".join(strange)


def test_files_that_run_first_exist():
    assert [name for name in LONGEST if not (ROOT / "tests" / name).is_file()] == []
