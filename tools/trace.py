"""Follows every clause of SPEC.md into the contract and the tests (HP-ALN-1).

python tools/trace.py            write docs/traceability.md; prints what is wrong, exit 1 when something is
python tools/trace.py --check    write nothing; a stale page is wrong too

A MUST or SHOULD clause is covered when the contract names it in `x-spec`, or NOT_ON_THE_WIRE says why it cannot, and a
test that runs everywhere has it in `@pytest.mark.spec`. One that is not covered, or of which a part is not built, has a
line in tests/spec_pending.txt: its ID, a colon, and what is missing. In backticks such a line may name operations,
metrics, schemas and files that are to come; while one of them is missing the clause is open, whatever covers the rest
of it. A line whose clause is no longer open must go.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "codegen"))

from documents import METHODS, read_yaml

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "traceability.md"
PENDING = ROOT / "tests" / "spec_pending.txt"

NOT_ON_THE_WIRE = {
    "HP-SEC-1": "where a listener binds shows in no request and no answer",
    "HP-SEC-6": "a page of the documentation",
    "HP-SEC-7": "what logs and command lines leave out",
    "HP-OBS-5": "the log; no part of the API",
    "HP-ERR-3": "the client and a page; the headers that both follow are HP-ERR-2",
    "HP-PLC-4": "how the service is validated",
    "HP-DET-3": "a suite of tests",
    "HP-ALN-1": "about the contract as a whole, not a part of it",
    "HP-ALN-2": "about tests",
    "HP-ALN-4": "a suite of tests",
}

_clause = re.compile(r"^\*\*(HP-[A-Z]{3}-\d+)\*\* \(([A-Z ]+)\)", re.MULTILINE)
_pending_line = re.compile(r"(HP-[A-Z]{3}-\d+): (\S.*)")
_backticked = re.compile(r"`([^`]+)`")

Places = dict[str, list[str]]


class Contract(NamedTuple):
    """Where clauses are named, and the names of everything that the contract has."""

    places: Places
    names: set[str]


class Trace(NamedTuple):
    clauses: dict[str, str]  # ID -> key word
    contract: Contract
    tests: Places
    pending: dict[str, str]
    problems: list[str]

    def demanded(self) -> list[str]:
        return [clause for clause, word in self.clauses.items() if word in ("MUST", "SHOULD")]

    def open(self, clause: str) -> str:
        """Why the clause is not covered; empty where it is."""
        if not self.contract.places.get(clause) and clause not in NOT_ON_THE_WIRE:
            return "no operation or schema of the contract has it in x-spec"
        if not self.tests.get(clause):
            return "no test has it"
        to_come = [name for name in _backticked.findall(self.pending.get(clause, "")) if not self._exists(name)]
        return f"still to come: {', '.join(to_come)}" if to_come else ""

    def _exists(self, name: str) -> bool:
        return (ROOT / name).exists() if "/" in name else name in self.contract.names


# -- the four sources ------------------------------------------------------------------------------------------------


def read_contract(folder: Path) -> Contract:
    places: Places = {}
    names: set[str] = set()
    for path in sorted(folder.glob("*.yaml")):
        for name, node in named_parts(path):
            names.add(name)
            for clause in node.get("x-spec", ()):
                if name not in places.setdefault(clause, []):
                    places[clause].append(name)
    return Contract(places, names)


def named_parts(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Operations, components, metrics, and the configuration's schema."""
    document = read_yaml(path)
    if "openapi" not in document and "metrics" not in document:
        yield path.name, document
    for item in document.get("paths", {}).values():
        yield from ((item[method]["operationId"], item[method]) for method in METHODS if method in item)
    for components in document.get("components", {}).values():
        yield from components.items()
    yield from ((metric["name"], metric) for metric in document.get("metrics", ()))


def read_tests(folder: Path) -> Places:
    """Clause -> files with tests of it that run everywhere, from the source alone."""
    places: Places = {}
    for path in sorted(folder.rglob("test_*.py")):
        for clause in sorted(clauses_of(path.read_text())):
            places.setdefault(clause, []).append(path.relative_to(ROOT).as_posix())
    return places


class Marks(NamedTuple):
    clauses: set[str]
    is_conditional: bool  # skipped somewhere, or expected to fail

    def with_more(self, other: Marks) -> Marks:
        return Marks(self.clauses | other.clauses, self.is_conditional or other.is_conditional)


def clauses_of(source: str) -> set[str]:
    """The clauses of a test file's tests. One that is skipped, always or somewhere, or expected to fail proves none."""
    tree = ast.parse(source)
    named = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    of_module = named.get("pytestmark", ast.List([]))
    values = of_module.elts if isinstance(of_module, ast.List | ast.Tuple) else [of_module]
    return marked(tree.body, marks_of(values, named), named)


def marked(body: list[ast.stmt], outer: Marks, named: dict[str, ast.expr]) -> set[str]:
    found: set[str] = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test"):
            marks = outer.with_more(marks_of(node.decorator_list, named))
            found |= set() if marks.is_conditional else marks.clauses
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            marks = outer.with_more(marks_of(node.decorator_list, named))
            found |= marked(node.body, marks, named)
            if node.bases and not marks.is_conditional:  # its tests may be inherited, as those of a state machine are
                found |= marks.clauses
    return found


def marks_of(decorators: list[ast.expr], named: dict[str, ast.expr]) -> Marks:
    """`named`: what the module's names stand for, since a mark may have one."""
    clauses: set[str] = set()
    is_conditional = False
    for decorator in decorators:
        node = named.get(decorator.id, decorator) if isinstance(decorator, ast.Name) else decorator
        name = ast.unparse(node.func if isinstance(node, ast.Call) else node)
        if name.endswith("mark.spec") and isinstance(node, ast.Call):
            clauses |= {str(ast.literal_eval(argument)) for argument in node.args}
        is_conditional |= name.endswith(("mark.skip", "mark.skipif", "mark.xfail"))
    return Marks(clauses, is_conditional)


def read_pending(text: str) -> dict[str, str]:
    """Raises ValueError for a line that is not `ID: what is missing`, and for a second one of the same clause."""
    pending: dict[str, str] = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        match = _pending_line.fullmatch(line)
        if match is None or match[1] in pending:
            raise ValueError(f"tests/spec_pending.txt: not `HP-XXX-0: what is missing`, or there twice: {line}")
        pending[match[1]] = match[2]
    return pending


# -- together --------------------------------------------------------------------------------------------------------


def trace() -> Trace:
    contract, tests = read_contract(ROOT / "openapi"), read_tests(ROOT / "tests")
    clauses = dict(_clause.findall((ROOT / "SPEC.md").read_text()))
    pending = read_pending(PENDING.read_text())
    found = Trace(clauses, contract, tests, pending, [])
    found.problems.extend(problems(found))
    return found


def problems(found: Trace) -> Iterator[str]:
    sources = {
        "the contract": found.contract.places,
        "the tests": found.tests,
        "spec_pending.txt": found.pending,
        "NOT_ON_THE_WIRE": NOT_ON_THE_WIRE,
    }
    for source, named in sources.items():
        yield from (f"{clause}: in {source}, but not in SPEC.md" for clause in named if clause not in found.clauses)
    for clause in NOT_ON_THE_WIRE:
        if found.contract.places.get(clause):
            yield f"{clause}: the contract has it; take it out of NOT_ON_THE_WIRE"
    for clause in found.demanded():
        why = found.open(clause)
        if why and clause not in found.pending:
            yield f"{clause}: {why}, and it has no line in tests/spec_pending.txt"
        if not why and clause in found.pending:
            yield f"{clause}: it is covered; take its line out of tests/spec_pending.txt"
    for clause in found.pending:
        if clause in found.clauses and clause not in found.demanded():
            yield f"{clause}: neither MUST nor SHOULD; take its line out of tests/spec_pending.txt"


def page(found: Trace) -> str:
    lines = [
        "# From the specification to the tests",
        "",
        "Generated by `python tools/trace.py`. Which part of the contract carries a clause of SPEC.md, and which test",
        "files prove it. Open clauses are those of tests/spec_pending.txt.",
        "",
    ]
    demanded = found.demanded()
    covered = [clause for clause in demanded if clause not in found.pending]
    lines += [f"{len(covered)} of {len(demanded)} MUST and SHOULD clauses are covered.", ""]
    lines += ["| clause | | contract | tests | open |", "| --- | --- | --- | --- | --- |"]
    for clause, word in found.clauses.items():
        places = [f"`{name}`" for name in found.contract.places.get(clause, ())]
        if not places and clause in NOT_ON_THE_WIRE:
            places = [f"none: {NOT_ON_THE_WIRE[clause]}"]
        files = [name.removeprefix("tests/") for name in found.tests.get(clause, ())]
        cells = [clause, word, ", ".join(places), ", ".join(files), found.pending.get(clause, "")]
        lines.append(f"| {' | '.join(cells)} |".replace("  ", " "))
    return "\n".join(lines) + "\n"


def main() -> int:
    found = trace()
    text = page(found)
    stale = not PAGE.exists() or PAGE.read_text() != text
    if "--check" in sys.argv[1:]:
        found.problems.extend(["docs/traceability.md is stale; run: python tools/trace.py"] if stale else [])
    elif stale:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(text)
    print("\n".join(found.problems) or "every clause is followed")
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main())
