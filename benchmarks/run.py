"""All benchmarks that need no card, one after the other, as one report in Markdown.

    python benchmarks/run.py [--quick] [--only NAME …] [--litellm FOLDER] [--out FILE]

Each section has its command, the load of the machine when it began, what the program printed, and its targets with
whether they were reached. `--quick` rehearses: a few seconds for each, figures that mean nothing. `--litellm` is an
environment that litellm_venv.py made; a peer that is not there is named, with why. `tox -e bench` does both. Ends with
1 when a program failed; a target that is missed is in the report.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from litellm_venv import executable, why_not
from verdict import MISSED, REACHED, at_least, at_most

HERE = Path(__file__).resolve().parent
LIMIT_S = 3600.0


@dataclass(frozen=True)
class Target:
    """A figure of a program that prints no verdicts: the last group of the pattern's last match."""

    what: str
    pattern: str
    bound: float
    unit: str = ""
    is_least: bool = False

    def line(self, printed: str) -> str:
        found = re.findall(self.pattern, printed, re.MULTILINE)
        if not found:
            return f"{MISSED}{self.what}: not printed"
        judge = at_least if self.is_least else at_most
        return judge(self.what, max(map(float, found)), self.bound, self.unit)


@dataclass(frozen=True)
class Section:
    """`quick`: the arguments of a rehearsal. `arguments`: those of a real run."""

    name: str
    title: str
    quick: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    targets: tuple[Target, ...] = ()

    def command(self, more: Sequence[str], *, is_quick: bool) -> list[str]:
        return [f"benchmarks/{self.name}.py", *(self.quick if is_quick else self.arguments), *more]


RATIO = r"\| (\d+\.\d+) \|$"
SECTIONS = (
    Section(
        "added_latency", "Added time to the first token", ("--rounds", "5"),
        targets=(Target("added, median", r"^added, pair by pair +\S+ +(\S+)", 2.0, " ms"),),
    ),
    Section("peers", "Beside LiteLLM's proxy", ("--rounds", "1", "--requests", "8", "--seconds", "1")),
    Section(
        "relay", "CPU by relayed token", ("--rounds", "1", "--seconds", "1", "--streams", "4"),
        targets=(Target("over bare Connexion", r"^ratio of the medians: (\S+)", 1.5),),
    ),
    Section(
        "admission", "CPU by admitted task", ("--rounds", "1", "--requests", "100"),
        targets=(Target("over bare Connexion", r"^ratio of the medians: (\S+)", 0.5),),
    ),
    Section(
        "queue_length", "Operations with a long queue", ("--long", "1000", "--rounds", "5"),
        targets=(Target("the dearest operation, long over short", RATIO, 1.5),),
    ),
    Section("open_streams", "Open streams", ("--streams", "20", "--decoding", "2", "--seconds", "1", "--rounds", "1")),
    Section("memory_slope", "Memory by tasks served", ("--tasks", "400", "--clients", "4")),
    Section("cold_start", "Cold start", ("--rounds", "1")),
    Section(
        "sessions", "Warm turns of a session", ("--rounds", "1"),
        targets=(Target("warm over cold, the worst of four", r"\| (\d+\.\d+) \| \d+ \|$", 0.25),),
    ),
    Section(
        "placement", "Placement", ("--loads", "2"), ("--loads", "200"),
    ),
    Section(
        "prediction", "Predicted starts", ("--simulated", "--loads", "1"), ("--simulated", "--real"),
    ),
    Section("calibration", "Chances", ("--loads", "1", "--tasks", "20")),
    Section("memory", "Predicted memory", ("--only", "bge")),
    Section("flames", "Where the time goes", ("--seconds", "2", "--out", ".tox/flames"), ("--out", ".tox/flames")),
)  # fmt: skip


def peer_arguments(section: Section, litellm: Path | None) -> tuple[list[str], str]:
    """What is added to the command, and what the report says of a peer that is not there."""
    if section.name != "peers":
        return [], ""
    if litellm is None:
        return [], "LiteLLM could not be measured: no environment was given (`--litellm`).\n\n"
    if not executable(litellm).exists():
        return [], f"LiteLLM could not be measured, since it could not be installed: {why_not(litellm)}\n\n"
    return ["--litellm", str(executable(litellm).absolute())], ""


def run(section: Section, litellm: Path | None, *, is_quick: bool) -> tuple[str, bool]:
    """The section of the report, and whether its program ended well."""
    more, remark = peer_arguments(section, litellm)
    command = section.command(more, is_quick=is_quick)
    load = os.getloadavg()[0]
    began = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=HERE.parent, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
        printed, failure = done.stdout, "" if done.returncode == 0 else f"ended with {done.returncode}: {done.stderr}"
    except subprocess.TimeoutExpired:
        printed, failure = "", f"did not end within {LIMIT_S:g} s"
    took = time.perf_counter() - began
    kept = [line for line in printed.strip().splitlines() if not line.startswith((REACHED, MISSED))]
    verdicts = [line for line in printed.splitlines() if line.startswith((REACHED, MISSED))]
    # "not printed" says nothing more where the program itself failed
    verdicts += [target.line(printed) for target in section.targets if not failure]
    parts = [
        f"## {section.title}\n\n`python {' '.join(command)}`, {took:.0f} s, load average {load:.2f} at its start\n"
    ]
    parts.append(remark + "\n".join(kept).strip())
    if verdicts:
        parts.append("\n" + "\n".join(verdicts))
    if failure:
        parts.append(f"\n{MISSED}the program {failure.strip()[-2000:]}")
    return "\n".join(parts) + "\n", not failure


def machine() -> str:
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    gib = int(memory[1]) / 2**20 if memory else 0.0
    name = cpu[1] if cpu else platform.machine()
    python = f"Python {platform.python_version()}"
    return f"{os.cpu_count()} cores of {name}, {gib:.0f} GiB, Linux {platform.release()}, {python}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=[section.name for section in SECTIONS], default=None)
    parser.add_argument("--litellm", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    head = f"# Benchmarks, {time.strftime('%-d %B %Y')}\n\n{machine()}\n"
    if given.quick:
        head += "\n**A rehearsal: the figures mean nothing.**\n"
    report, is_well = [head], True
    for section in SECTIONS:
        if given.only is None or section.name in given.only:
            text, ended_well = run(section, given.litellm, is_quick=given.quick)
            is_well &= ended_well
            report.append(text)
            print(text, flush=True)
    if given.out is not None:
        given.out.write_text("\n".join(report))
    lines = "\n".join(report).splitlines()
    reached, missed = (sum(line.startswith(mark) for line in lines) for mark in (REACHED, MISSED))
    print(f"{reached} targets reached, {missed} missed")
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
