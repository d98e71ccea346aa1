"""The fuzz gate on one operation: python tests/contract/mutants/fuzz_one.py DOCUMENT OPERATION[,…] PHASES [DEFECT]

Prints what the gate prints, and a line `problem: …` for everything else that is wrong.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tests import live_service
from tests.contract.fuzz import run as gate
from tests.contract.mutants.program import program
from tests.live.elsewhere import elsewhere


def main() -> int:
    document, operations, phases, *defect = sys.argv[1:]
    if defect:
        live_service.PROGRAM[:] = program(defect[0])
    names = operations.split(",")
    with tempfile.TemporaryDirectory(prefix="llorch-mutant-") as folder, elsewhere() as (there, _):
        files = gate.files_in(Path(folder))
        options = ["--config-file", str(gate.HERE / "schemathesis.toml"), "--no-color", "run"]
        options += [str(gate.DOCUMENTS / f"{document}.json"), "--phases", phases]
        options += [word for name in names for word in ("--include-operation-id", name)]
        with live_service.live_service(gate.configuration(files, there)) as service:
            gate.submit_and_wait(service, files)
            found = list(gate.fuzz(service, document, options, files, there, Path(folder), is_gate=True))
            problems = [*relevant(found, names, phases), *gate.judge(service, must_succeed=0)]
    for problem in problems:
        print(f"problem: {problem}")
    return 1 if problems else 0


def relevant(problems: list[str], operations: list[str], phases: str) -> Iterator[str]:
    """The gate asks for more than one operation can show. Coverage alone shows each of its documented answers."""
    for problem in problems:
        _, is_missing, key = problem.partition(": the run never saw: ")
        if not is_missing or (phases == "coverage" and key.split()[0] in operations):
            yield problem


if __name__ == "__main__":
    sys.exit(main())
