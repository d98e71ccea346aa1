"""From a seed to a run of the real core and runtime under faults, and what was wrong with it.

    python -m llama_orch.testing.simulator SEED...

prints the world and the trace of each seed. The same seed gives the same trace, byte for byte.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from llama_orch.engines.simulated import SimulatedWorker
from llama_orch.testing import scrape
from llama_orch.testing.checks import Checker
from llama_orch.testing.clients import Client
from llama_orch.testing.faults import Faults
from llama_orch.testing.imaginary import ImaginaryLibrary
from llama_orch.testing.loop import run
from llama_orch.testing.machine import Machine
from llama_orch.testing.stage import Stage, on_stage, settings_of
from llama_orch.testing.world import World, a_world

END_LIMIT_S = 400.0  # of virtual time after the last arrival: whatever happens, all has ended by then
TRACE_MAX = 5_000  # lines; a hundred are usual
QUIET_LIMIT_S = 300.0  # for tasks whose clients have left: longer than a load that hangs

Prepare = Callable[[Stage], None]


@dataclass(slots=True)
class Run:
    """What came of a seed."""

    world: World
    trace: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    admitted: int = 0
    seconds: float = 0.0

    @property
    def digest(self) -> str:
        return hashlib.sha256("\n".join(self.trace).encode()).hexdigest()[:16]


def simulate(seed: int, prepare: Prepare | None = None) -> Run:
    """Run the world of this seed. `prepare` sees the stage first: tests break it there."""
    return simulate_world(a_world(seed), prepare)


def simulate_world(world: World, prepare: Prepare | None = None) -> Run:
    result = Run(world)
    with _silence():
        try:
            run(_Simulation(world, result).run(prepare))
        except RuntimeError as error:  # a standstill, where nothing is ready and nothing is scheduled, or a circle
            result.violations.append(str(error))
        except ExceptionGroup as error:
            result.violations += [f"the service fell over: {one!r}" for one in _leaves(error)]
    return result


class _Simulation:
    def __init__(self, world: World, result: Run) -> None:
        self._world = world
        self._result = result
        self._clients: list[Client] = []
        self._checker: Checker
        self._faults: Faults

    def _note(self, text: str) -> None:
        if len(self._result.trace) >= TRACE_MAX:
            raise RuntimeError(f"more than {TRACE_MAX} lines of trace: it goes in circles")
        self._result.trace.append(f"{self._now():9.3f} {text}")

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    async def run(self, prepare: Prepare | None) -> None:
        world = self._world
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._unhandled)
        machine = Machine(
            world.cards,
            ImaginaryLibrary(world.models),
            pace=world.pace,
            strict_needs_exclusive=world.strict_needs_exclusive,
            backend=world.backend,
            on_launch=lambda worker, number: self._launched(worker, number),
        )

        def watch(stage: Stage) -> None:
            if prepare is not None:
                prepare(stage)
            self._checker = Checker(stage, self._note, self._now)
            self._checker.violations = self._result.violations
            self._faults = Faults(world, stage, self._note)

        async with on_stage(
            settings_of(world.pools, tasks=world.tasks, on_demand=world.on_demand), machine, watch
        ) as stage:
            await self._live(stage, self._checker, self._faults)
            self._finish(stage, self._checker)
        self._checker.check()  # once more, now that the service has ended

    def _launched(self, worker: SimulatedWorker, number: int) -> None:
        self._faults.launched(worker, number)
        self._checker.check_devices()

    async def _live(self, stage: Stage, checker: Checker, faults: Faults) -> None:
        """Until every client has what it came for, or would wait for ever."""
        self._clients = [Client(arrival, stage, checker, self._note) for arrival in self._world.arrivals]
        going = [asyncio.ensure_future(client.run()) for client in self._clients]
        acting = [asyncio.ensure_future(faults.run(fault)) for fault in self._world.faults]
        limit_s = self._world.arrivals[-1].at_s + END_LIMIT_S
        await asyncio.wait(going, timeout=limit_s)
        for client, task in zip(self._clients, going, strict=True):
            if not task.done():
                where = checker.whereabouts(client.request.task_id)
                checker.violate(f"{client.name} still waits after {limit_s:.0f} s: {where}")
                task.cancel()
        await asyncio.wait(going)
        for problem in scrape.problems(stage, checker):
            checker.violate(problem)
        quiet_by = self._now() + QUIET_LIMIT_S
        while not stage.scheduler.is_idle and self._now() < quiet_by:  # noqa: ASYNC110  # in virtual time
            await asyncio.sleep(0.5)
        for act in acting:
            act.cancel()
        for done in [*going, *acting]:
            with suppress(asyncio.CancelledError):
                await done

    def _finish(self, stage: Stage, checker: Checker) -> None:
        checker.check_end()
        for problem in scrape.problems(stage, checker):
            checker.violate(problem)
        self._compare_answers(checker)
        self._result.admitted = sum(checker.tally.admitted.values())
        self._result.seconds = self._now()

    def _compare_answers(self, checker: Checker) -> None:
        """Equal tasks have equal answers, wherever they ran and whatever else did (HP-DET-1)."""
        answers: dict[tuple[Any, ...], tuple[str, str]] = {}
        for client in self._clients:
            request = client.request
            if client.text is None or request.max_tokens is None or request.model_ref is None:
                continue
            inputs = tuple(request.inputs or ())
            key = request.model_ref, request.seed, request.prompt, inputs, request.max_tokens, repr(request.sampling)
            name, text = answers.setdefault(key, (client.name, client.text))
            checker.expect(
                text == client.text, f"{client.name} and {name} asked the same and were answered differently"
            )

    def _unhandled(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self._result.violations.append(f"unhandled: {context.get('message')}: {context.get('exception')!r}")


def _leaves(error: ExceptionGroup[Exception]) -> Iterator[Exception]:
    """What groups of groups hold in the end, each text once."""
    seen: dict[str, Exception] = {}
    for one in error.exceptions:
        for leaf in _leaves(one) if isinstance(one, ExceptionGroup) else [one]:
            seen.setdefault(repr(leaf), leaf)
    yield from seen.values()


@contextmanager
def _silence() -> Iterator[None]:
    """No log: worlds are full of losses, and lines about them cost more than the losses."""
    log = logging.getLogger("llama_orch")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(level)


def describe(world: World) -> Iterator[str]:
    """The world in words."""
    yield f"world {world.seed}: {', '.join(card.device_id for card in world.cards)}"
    for pool in world.pools:
        yield (
            f"  pool {pool.id}: {pool.model}, {pool.slots} slots, "
            f"queue {pool.queue.capacity} {pool.queue.full_policy}, replicas {pool.replicas} on {pool.devices}"
        )
    for arrival in world.arrivals:
        request = arrival.request
        yield (
            f"  {arrival.at_s:8.3f} client {arrival.number} {arrival.client} ({arrival.client_s:g} s): "
            f"{request.model_ref}, {request.priority.value}, {request.determinism or '-'}, "
            f"max_tokens {request.max_tokens}, deadline {request.deadline_ms}"
        )
    for fault in world.faults:
        yield f"  {fault.at_s:8.3f} {fault.kind} pick {fault.pick} for {fault.for_s:g} s"
    for number, fault in world.launch_faults.items():
        yield f"  launch {number}: {fault.kind} for {fault.for_s:g} s"


def main(seeds: list[str]) -> int:
    failed = 0
    for seed in map(int, seeds):
        result = simulate(seed)
        print("\n".join([*describe(result.world), *result.trace]))
        print(f"seed {seed}: {result.admitted} admitted, {result.seconds:.3f} s, digest {result.digest}")
        for violation in result.violations:
            print(f"VIOLATION {violation}")
        failed += bool(result.violations)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
