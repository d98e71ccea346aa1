"""The real core and runtime in thousands of small worlds where things go wrong (testing/simulator.py).

A seed that fails prints its violations; `python -m llama_orch.testing.simulator SEED` prints its whole trace. Keep it:
a line in seeds.txt, with what was wrong.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from llama_orch.testing.simulator import simulate
from llama_orch.testing.world import a_world

SEEDS = 2000
PARTS = 20
KEPT = [
    (int(line.split(maxsplit=1)[0]), line.split(maxsplit=1)[1])
    for line in Path(__file__).with_name("seeds.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]


OPEN = [
    (int(seed), re.compile(pattern), why)
    for seed, pattern, why in re.findall(
        r"^(\d+) `([^`]+)` (\S.*)$", Path(__file__).with_name("open.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
]
# What follows where something else went wrong, and is no finding of its own.
FOLLOWS = re.compile(r"the scheduler is not idle, though|still waits after \d+ s: (failed|canceled|not admitted)")


def unexplained(seed: int, violations: Sequence[str]) -> list[str]:
    """Without those that are known and open of this seed, and what follows from them."""
    patterns = [pattern for number, pattern, _ in OPEN if number == seed]
    known = [violation for violation in violations if any(pattern.search(violation) for pattern in patterns)]
    return [v for v in violations if v not in known and not (known and FOLLOWS.search(v))]


def failures(seeds: Iterable[int]) -> dict[int, list[str]]:
    runs = ((seed, unexplained(seed, simulate(seed).violations)) for seed in seeds)
    return {seed: violations for seed, violations in runs if violations}


@pytest.mark.spec("HP-ADM-1", "HP-ADM-2", "HP-ADM-8", "HP-STR-1", "HP-STR-6", "HP-PLC-6", "HP-PLC-7", "HP-OBS-1")
@pytest.mark.parametrize("part", range(PARTS))
def test_nothing_is_broken_in_any_world(part: int) -> None:
    """Queues keep their order and limit, no slot and no card is given twice, each task ends once and says so once."""
    count = SEEDS // PARTS
    assert failures(range(part * count, (part + 1) * count)) == {}


def test_seeds_that_once_failed_hold() -> None:
    """What was found and mended stays mended."""
    assert failures(seed for seed, _ in KEPT) == {}


@pytest.mark.parametrize(("seed", "pattern", "why"), OPEN)
def test_what_is_open_is_still_open(seed: int, pattern: re.Pattern[str], why: str) -> None:
    """A line of open.txt whose seed no longer shows it must go, to seeds.txt."""
    assert any(pattern.search(violation) for violation in simulate(seed).violations), why


def test_a_seed_is_one_run() -> None:
    """The same seed gives the same trace within a process, and another seed another one."""
    digests = [simulate(seed).digest for seed in (7, 8, 7)]
    assert digests[0] == digests[2] != digests[1]


def test_a_seed_is_one_run_in_every_process() -> None:
    """Neither the order of sets nor anything else of a process shows in a trace: a failing seed fails for everybody."""
    seeds = [str(seed) for seed in range(40, 50)]

    def trace(hash_seed: str) -> str:
        command = [sys.executable, "-m", "llama_orch.testing.simulator", *seeds]
        env = os.environ | {"PYTHONHASHSEED": hash_seed}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout

    first = trace("1")
    assert "digest" in first
    assert trace("2") == first


def test_worlds_are_various() -> None:
    """Every kind of client and fault, every policy and both kinds of determinism are met among the first worlds."""
    worlds = [a_world(seed) for seed in range(200)]
    clients = {arrival.client for world in worlds for arrival in world.arrivals}
    kinds = {fault.kind for world in worlds for fault in [*world.faults, *world.launch_faults.values()]}
    assert clients == {"reads", "returns", "leaves", "cancels", "repeats", "contradicts", "looks"}
    assert kinds >= {"crash", "hang", "freeze", "no_memory", "take_vram", "lose_card", "drain", "reload"}
    assert kinds >= {"slow_load", "fail_load", "crash_load", "hang_load"}
    assert {pool.queue.full_policy for world in worlds for pool in world.pools} == {"reject", "drop-lru"}
    assert {world.strict_needs_exclusive for world in worlds} == {True, False}


def test_much_happens_in_them() -> None:
    """The worlds are not so hostile that nothing runs, nor so kind that all goes well: states, refusals and faults in
    the traces of the first hundred."""
    text = "\n".join("\n".join(simulate(seed).trace) for seed in range(100))
    for words, least in {
        " succeeded": 300,
        " CANCELED": 30,
        " WORKER_RESET": 10,
        " DECODE_TIMEOUT": 3,
        " DEADLINE_UNMET": 30,
        " QUEUE_FULL_DROP_LRU": 5,
        "refused: ADMISSION_REJECT": 20,
        "refused: POOL_UNREADY": 10,
        "which loads": 2,
        "which decodes": 5,
        "which idles": 5,
        "fault lose_card": 3,
        "fault take_vram": 3,
    }.items():
        assert text.count(words) >= least, words
