"""A machine with two unequal cards, as far as the driver's library tells: fake_nvml.c behind the real pynvml.

The library is found by its name, so what is under test runs in a process of its own (program.py), with `environment`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from select import select
from typing import Any

MIB = 1 << 20
LIMIT_S = 60.0  # a program that hangs fails; nothing waits for it
ROOT = Path(__file__).resolve().parents[2]

# What the driver answers; the numbers are NVML's.
OK, NOT_SUPPORTED, DRIVER_NOT_LOADED, LOST, NEEDS_RESET, UNKNOWN = 0, 3, 9, 15, 16, 999


@dataclass
class FakeCard:
    uuid: str
    name: str
    total_mib: int
    used_mib: int
    utilization: int = 0  # percent; -1: the driver does not know
    code: int = OK
    hangs: bool = False

    @property
    def free_bytes(self) -> int:
        return (self.total_mib - self.used_mib) * MIB


def _small() -> FakeCard:
    return FakeCard("GPU-30600000-0000-0000-0000-000000000002", "NVIDIA GeForce RTX 3060", 12288, 150)


def _large() -> FakeCard:
    return FakeCard("GPU-30900000-0000-0000-0000-000000000001", "NVIDIA GeForce RTX 3090", 24576, 300, utilization=37)


@dataclass
class FakeMachine:
    """What the library says, from the next call on: change it, then `apply`."""

    library: Path  # the folder with libnvidia-ml.so.1
    state: Path
    small: FakeCard = field(default_factory=_small)
    large: FakeCard = field(default_factory=_large)
    driver: int = OK
    processes: list[tuple[FakeCard, int, int]] = field(default_factory=list)  # card, pid, MiB or -1
    processes_code: int = OK
    xids: list[tuple[FakeCard, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.apply()

    @property
    def cards(self) -> list[FakeCard]:
        """In NVML's order, by bus. CUDA by itself would count the fastest first."""
        return [self.small, self.large]

    @property
    def environment(self) -> dict[str, str]:
        paths = [str(self.library), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        return {"LD_LIBRARY_PATH": os.pathsep.join(paths), "FAKE_NVML": str(self.state)}

    def apply(self) -> None:
        lines = [f"driver {self.driver}", f"processes {self.processes_code}"]
        for card in self.cards:
            lines.append(
                f"card {card.uuid} {card.total_mib} {card.used_mib} {card.utilization} {card.code} {card.name}"
            )
            if card.hangs:
                lines.append(f"hang {card.uuid}")
        lines += [f"process {card.uuid} {pid} {mib}" for card, pid, mib in self.processes]
        lines += [f"xid {number} {card.uuid} {code}" for number, (card, code) in enumerate(self.xids, 1)]
        fresh = self.state.with_suffix(".new")
        fresh.write_text("\n".join(lines) + "\n")
        fresh.replace(self.state)  # at once: the library reads it at every call


@dataclass
class Program:
    """program.py at work: one question, one answer."""

    process: subprocess.Popen[str]

    def ask(self, what: str, **details: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"what": what, **details}) + "\n")
        self.process.stdin.flush()
        assert select([self.process.stdout], [], [], LIMIT_S)[0], "the program does not answer"
        return json.loads(self.process.stdout.readline())

    def read(self, at: float = 0.0) -> dict[str, dict[str, Any]]:
        """All cards' readings at this time, by UUID."""
        readings: dict[str, dict[str, Any]] = self.ask("read", at=at)
        return readings

    def warnings(self) -> list[str]:
        return [text for level, text in self.ask("log") if level == "WARNING"]


@contextmanager
def a_program(machine: FakeMachine) -> Iterator[Program]:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.devices.program"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | machine.environment,
    ) as process:
        try:
            program = Program(process)
            program.ask("log")  # answered once the driver was opened
            yield program
        finally:
            assert process.stdin is not None
            process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                process.wait(LIMIT_S)
            process.kill()  # nothing, if it has ended
    assert process.returncode == 0
