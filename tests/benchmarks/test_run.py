"""The report of benchmarks/run.py: the cheapest programs, rehearsed, so that they and what gathers them do not rot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from memory_slope import slope
from run import HERE, SECTIONS, Section, Target, peer_arguments

MB = 1_000_000


def test_a_rehearsal_reports_sections_with_command_and_targets(tmp_path: Path) -> None:
    out = tmp_path / "report.md"
    only = ("queue_length", "memory_slope")
    command = [sys.executable, str(HERE / "run.py"), "--quick", "--out", str(out), "--only", *only]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    report = out.read_text()
    assert done.returncode == 0, report
    for name in only:
        assert f"`python benchmarks/{name}.py" in report
    for target in ("the dearest operation", "memory by 100,000 tasks"):
        assert (
            sum(line.startswith(("- reached: ", "- missed: ")) and target in line for line in report.splitlines()) == 1
        )
    assert "not printed" not in report
    assert "A rehearsal" in report


def test_every_section_has_its_program() -> None:
    assert [section.name for section in SECTIONS if not (HERE / f"{section.name}.py").is_file()] == []


def test_a_target_is_judged_by_what_was_printed() -> None:
    """The worst of several; one that is not there is missed, not skipped."""
    target = Target("cost", r"^cost: (\S+)", 1.5)
    assert target.line("cost: 1.5").startswith("- reached: cost: 1.5")
    assert target.line("cost: 1.2\ncost: 1.6").startswith("- missed: cost: 1.6")
    assert target.line("nothing") == "- missed: cost: not printed"


def test_a_peer_that_could_not_be_installed_is_named_with_why(tmp_path: Path) -> None:
    (tmp_path / "litellm.log").write_text("No solution found\nthey disagree about a pin\n")
    more, remark = peer_arguments(Section("peers", "", ()), tmp_path / "litellm")
    assert more == []
    assert "they disagree about a pin" in remark


@pytest.mark.parametrize("leak_mb", [0.0, 40.0])
def test_the_slope_of_memory_is_found_behind_jumps(leak_mb: float) -> None:
    """Megabytes by 100,000 tasks; every seventh sample catches something large in flight."""
    samples = [
        (tasks, int((80 + leak_mb * tasks / 100_000 + (6 if n % 7 == 0 else 0)) * MB))
        for n, tasks in enumerate(range(0, 100_000, 500))
    ]
    found = slope(samples)
    assert found.mb == pytest.approx(leak_mb, abs=0.1)
    assert found.error_mb < 1
