"""The walls of the house: sizes, layers, and what must not be found anywhere. A wall is moved here and nowhere else."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src" / "llama_orch"
FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 60

MAY_CATCH_EVERYTHING = {
    ("runtime/decoding.py", "_run_task"),  # around one task's run
    ("runtime/fetches.py", "_run"),  # around one fetch
    ("runtime/replicas.py", "_one_life"),  # around one replica's supervision
    ("runtime/replicas.py", "_stop"),  # and around its end
    ("api/edge.py", "_http"),  # the border of one request: nothing but our envelope goes out
    ("outbound/plugins.py", "_answer"),  # somebody else's code judges: whatever it is, the answer is no
    ("workers/lifeline.py", "run"),  # the border of another process: whatever it is, the load has failed
}
VIRTUAL_TIME = "llama_orch.testing.loop"  # under this loop asyncio.sleep takes no time
# Put together here, so that this file does not hold what it looks for.
UNFINISHED = re.compile(r"(?<![\w-])(?:" + "|".join(["TO" + "DO", "FIX" + "ME", "X" * 3]) + r")\b")
FOREIGN = [f"/{'work'}/", f"/{'root'}/", f"/{'tmp'}/v/", f"{'pypi'}.org", f"{'pythonhosted'}.org"]

TEXTS = {".py", ".pyi", ".yaml", ".yml", ".json", ".toml", ".ini", ".cfg", ".md", ".txt", ".html"}
FOLDERS = ("src", "tests", "codegen", "tools", "openapi", "pacts", "docs", "benchmarks")


def python_files(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


SOURCES = [path for path in python_files(SRC) if "contract" not in path.relative_to(SRC).parts]
TESTS = python_files(ROOT / "tests")


def texts(*folders: str) -> Iterator[Path]:
    """Text files of these folders, hidden and built ones left out."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            parts = path.relative_to(ROOT).parts
            if path.suffix in TEXTS and path.is_file() and not any(p.startswith((".", "__")) for p in parts[:-1]):
                yield path


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def functions(module: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(module) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def catches_everything(handler: ast.ExceptHandler) -> bool:
    """`except:`, `except Exception` and the like that swallow; whoever raises again has let it pass."""
    caught = [] if handler.type is None else [node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)]
    is_broad = handler.type is None or not {"Exception", "BaseException"}.isdisjoint(caught)
    return is_broad and not isinstance(handler.body[-1], ast.Raise)


def imported(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sleeps(module: ast.Module) -> Iterator[int]:
    """Lines of calls of anything that is named sleep; asyncio's own is none where the file runs in virtual time."""
    is_virtual = any(one.startswith(VIRTUAL_TIME) for one in imported(module))
    for node in ast.walk(module):
        function = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if function.split(".")[-1] == "sleep" and not (is_virtual and function == "asyncio.sleep"):
            yield node.lineno


def test_files_are_small_enough_to_read() -> None:
    """A source file has at most 400 lines; beyond that it is two files."""
    sizes = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {path: lines for path, lines in sizes.items() if lines > FILE_LINES_MAX} == {}


def test_functions_are_small_enough_to_read() -> None:
    """A function has at most 60 lines, its docstring included."""
    found = {
        f"{name(path)}:{f.name}": (f.end_lineno or 0) - f.lineno + 1 for path in SOURCES for f in functions(tree(path))
    }
    assert {function: lines for function, lines in found.items() if lines > FUNCTION_LINES_MAX} == {}


def test_every_module_says_what_it_is() -> None:
    """Each source module starts with a docstring."""
    assert [name(path) for path in SOURCES if not ast.get_docstring(tree(path))] == []


def test_no_test_waits_for_real_time() -> None:
    """Tests use events or virtual time: a call named sleep is a guess about somebody else's speed."""
    assert [f"{name(path)}:{line}" for path in TESTS for line in sleeps(tree(path))] == []


def test_no_test_mocks() -> None:
    """The seams take fakes with behaviour; a mock only repeats what the code under test does."""
    mocking = re.compile(r"unittest\.mock\b|mock\b|pytest_mock\b")
    assert [name(path) for path in TESTS if any(map(mocking.match, imported(tree(path))))] == []


def test_nothing_is_left_for_later() -> None:
    """No marker of unfinished work: what is missing is in the documentation or is done."""
    found = [
        f"{name(path)}:{number}"
        for path in texts("src", "tests", "codegen", "tools", "openapi")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if UNFINISHED.search(line)
    ]
    assert found == []


def test_nothing_names_the_machine_that_it_was_made_on() -> None:
    """No path of a workplace and no host of a package registry: the project is read and built elsewhere."""
    pages = [*texts(*FOLDERS), *sorted(ROOT.glob("*.md")), ROOT / "pyproject.toml", *sorted(ROOT.glob("tox.ini"))]
    found = [
        f"{name(path)}:{number}: {foreign}"
        for path in pages
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for foreign in FOREIGN
        if foreign in line
    ]
    assert found == []


def test_everything_is_caught_in_few_places_only() -> None:
    """Elsewhere an unforeseen error is not swallowed: it is a defect, and shows as one."""
    found = [
        (path.relative_to(SRC).as_posix(), function.name)
        for path in SOURCES
        for function in functions(tree(path))
        for node in ast.walk(function)
        if isinstance(node, ast.ExceptHandler) and catches_everything(node)
    ]
    assert set(found) - MAY_CATCH_EVERYTHING == set()
    assert len(found) == len(set(found)), "one of these places catches everything twice"


@pytest.mark.spec("HP-ALN-1")
def test_the_layers_hold() -> None:
    """The import contracts of pyproject.toml are kept: the core stays pure and nothing imports upwards."""
    lint = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as lint; lint()", "--no-cache"]
    done = subprocess.run(lint, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
