"""Spec, contract and tests follow one another: tools/trace.py finds nothing missing, and would find it."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Set
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load(path: Path) -> ModuleType:
    """By its path: the standard library has a module `trace` too."""
    spec = importlib.util.spec_from_file_location("llorch_trace", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tracing = load(ROOT / "tools" / "trace.py")
pytestmark = pytest.mark.spec("HP-ALN-1")


def test_every_clause_is_followed() -> None:
    """Each MUST and SHOULD is in the contract and in a test, or open and listed; every ID exists; nothing is stale."""
    assert tracing.trace().problems == []


def test_the_page_is_what_the_sources_say() -> None:
    """docs/traceability.md is what `python tools/trace.py` would write now."""
    assert tracing.PAGE.read_text() == tracing.page(tracing.trace())


def test_the_list_of_open_clauses_only_shrinks() -> None:
    """No clause is listed that the last commit's list does not have, where there is one to compare with."""
    git = shutil.which("git")
    if git is None:
        return
    show = [git, "-C", str(ROOT), "show", f"HEAD:{tracing.PENDING.relative_to(ROOT).as_posix()}"]
    committed = subprocess.run(show, capture_output=True, text=True, check=False)
    if committed.returncode == 0:
        listed = set(tracing.read_pending(tracing.PENDING.read_text()))
        assert listed - set(tracing.read_pending(committed.stdout)) == set()


def found(
    clauses: dict[str, str], places: Set[str] = frozenset(), tests: Set[str] = frozenset(), pending: str = ""
) -> list[str]:
    """The problems of a made-up project; the contract has one operation, `here`."""
    contract = tracing.Contract({clause: ["here"] for clause in places}, {"here"})
    parts = tracing.Trace(clauses, contract, {clause: ["t.py"] for clause in tests}, tracing.read_pending(pending), [])
    return [text for text in tracing.problems(parts) if text.split(":")[0] not in tracing.NOT_ON_THE_WIRE]


ONE = {"HP-AAA-1": "MUST"}


def test_a_covered_clause_is_no_problem() -> None:
    """In the contract and in a test: nothing to say."""
    assert found(ONE, {"HP-AAA-1"}, {"HP-AAA-1"}) == []


@pytest.mark.parametrize(
    ("places", "tests", "pending", "words"),
    [
        (set(), {"HP-AAA-1"}, "", "no operation"),
        ({"HP-AAA-1"}, set(), "", "no test"),
        ({"HP-AAA-1"}, {"HP-AAA-1"}, "HP-AAA-1: something", "take its line out"),
        ({"HP-AAA-1"}, {"HP-AAA-1"}, "HP-AAA-1: there by now: `here`", "take its line out"),
        ({"HP-AAA-1", "HP-AAA-2"}, {"HP-AAA-1"}, "", "in the contract, but not in SPEC.md"),
        ({"HP-AAA-1"}, {"HP-AAA-1", "HP-AAA-2"}, "", "in the tests, but not in SPEC.md"),
        ({"HP-AAA-1"}, {"HP-AAA-1"}, "HP-AAA-2: what", "in spec_pending.txt, but not in SPEC.md"),
    ],
)
def test_what_is_missing_or_stale_is_found(places: set[str], tests: set[str], pending: str, words: str) -> None:
    """Each way to be incomplete, or listed without need, is one problem."""
    (problem,) = found(ONE, places, tests, pending)
    assert words in problem


@pytest.mark.parametrize("pending", ["HP-AAA-1: later", "HP-AAA-1: a part: `there`", "HP-AAA-1: `docs/none.md`"])
def test_an_open_clause_may_be_listed(pending: str) -> None:
    """Nothing covers it, or a part that the line names is still to come."""
    covered = {"HP-AAA-1"} if "`" in pending else set()
    assert found(ONE, covered, covered, pending) == []


def test_may_and_must_not_are_not_demanded() -> None:
    """They need no test, and no line."""
    assert found({"HP-AAA-1": "MAY", "HP-AAA-2": "MUST NOT"}) == []


def test_a_test_that_may_not_run_proves_nothing() -> None:
    """Skipped, skipped somewhere, expected to fail, or no test at all: the clause stays open."""
    source = """
needs_it = pytest.mark.skipif(True, reason="")
@pytest.mark.spec("HP-AAA-1")
def test_counts(): ...
@pytest.mark.skip
@pytest.mark.spec("HP-AAA-2")
def test_skipped(): ...
@needs_it
@pytest.mark.spec("HP-AAA-3")
async def test_skipped_somewhere(): ...
@pytest.mark.xfail(strict=True)
@pytest.mark.spec("HP-AAA-4")
class TestExpectedToFail(Machine.TestCase): ...
@pytest.mark.spec("HP-AAA-5")
def helper(): ...
@pytest.mark.spec("HP-AAA-6")
class TestMachine(Machine.TestCase): ...
class TestGroup:
    @pytest.mark.spec("HP-AAA-7", "HP-AAA-8")
    def test_inside(self): ...
"""
    assert tracing.clauses_of(source) == {"HP-AAA-1", "HP-AAA-6", "HP-AAA-7", "HP-AAA-8"}
    assert tracing.clauses_of(f'pytestmark = pytest.mark.skip("all")\n{source}') == set()
    assert "HP-AAA-9" in tracing.clauses_of(f'pytestmark = [pytest.mark.spec("HP-AAA-9")]\n{source}')


def test_a_malformed_line_is_refused() -> None:
    """A line that is not an ID and what is missing, or a second one of a clause, is an error."""
    for text in ("HP-AAA-1", "HP-AAA-1: ", "something", "HP-AAA-1: a\nHP-AAA-1: b"):
        with pytest.raises(ValueError, match="spec_pending"):
            tracing.read_pending(text)
