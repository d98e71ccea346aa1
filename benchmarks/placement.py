"""How good is placement? Makespans of random mixed loads on an RTX 3090 beside an RTX 3060, in virtual time.

    python benchmarks/placement.py [--loads 200] [--json FILE]

Ours is the real core and runtime on the simulated engine (what `llama-orch simulate` runs). It is held against a lower
bound that no scheduler can beat (simulate/bound.py: the best spread of the work over the cards, each used card loading
one model first; the longest task) and against two simple policies on the same engine, with the same memory and speeds:

* round robin: tasks go to the cards in turn, where their model fits, and wait in the card's own queue;
* largest free first: a task is bound at its arrival to the card that has most memory free, and waits there.

All tasks arrive at once, in random order. Both policies know the future as little as ours does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from llama_orch.contract.models import Determinism
from llama_orch.core.ledger import RESERVE_BYTES
from llama_orch.engines.base import Completion, Job, ReplicaSpec, Sampling
from llama_orch.engines.simulated import SimulatedWorker
from llama_orch.simulate.agents import turns
from llama_orch.simulate.host import simulate_host
from llama_orch.simulate.load import AgentLoad, Assumptions, Load, ModelLoad, _model
from llama_orch.testing.cards import GIGA
from llama_orch.testing.imaginary import ImaginaryLibrary, ImaginaryModel, physical_pace
from llama_orch.testing.loop import run
from llama_orch.testing.machine import Machine

HOST = "3090,3060"
SLOTS = 4
MODELS = (
    ModelLoad(name="3b", parameters_b=3.2, quantization="Q8_0"),
    ModelLoad(name="8b", parameters_b=8, quantization="Q4_K_M"),
    ModelLoad(name="14b", parameters_b=14, quantization="Q4_K_M"),
    ModelLoad(name="32b", parameters_b=32, quantization="Q4_K_M"),  # fits the large card only
)
CTX = 4096


def a_load(seed: int, *, strict_share: float = 1.0) -> Load:
    """One to three models, 30 to 150 tasks of all lengths."""
    dice = random.Random(f"placement:{seed}")
    models = [_model(one) for one in dice.sample(MODELS, dice.randint(1, 3))]
    agents = [
        AgentLoad(
            name=f"t{number}",
            model=dice.choice(models).name,
            tasks=1,
            prompt_tokens=dice.randint(100, 2000),
            answer_tokens=round(dice.lognormvariate(5.3, 0.7)) % 1500 + 20,
            determinism=Determinism.STRICT if dice.random() < strict_share else Determinism.BEST_EFFORT,
        )
        for number in range(dice.randint(30, 150))
    ]
    assume = Assumptions(slots=SLOTS, spread=0.0, min_residency_s=0.0)
    return Load({one.name: one for one in models}, dict.fromkeys((m.name for m in models), CTX), agents, [], assume, {})


# -- the simple policies -------------------------------------------------------------------------------------------


@dataclass
class Loaded:
    """One model on a card."""

    worker: SimulatedWorker
    need_bytes: int
    slots: int
    busy: set[int] = field(default_factory=set)
    is_exclusive: bool = False
    used_at: float = 0.0


@dataclass
class Shelf:
    """One card with its queue: first in, first out; the head loads its model, and waits for room if there is none."""

    name: str
    room_bytes: int
    machine: Machine
    queue: list[AgentLoad] = field(default_factory=list)
    loaded: dict[str, Loaded] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def free_bytes(self) -> int:
        return self.room_bytes - sum(one.need_bytes for one in self.loaded.values())

    async def work(self, load: Load, number: int) -> None:
        """Until the queue is done."""
        running: list[asyncio.Task[None]] = []
        for count, task in enumerate(self.queue):
            one = await self._loaded(load.models[task.model], f"{self.name}-{number}-{count}")
            is_strict = task.determinism is Determinism.STRICT
            while one.is_exclusive or (one.busy if is_strict else len(one.busy) >= one.slots):
                await self._change()
            slot = min(set(range(one.slots)) - one.busy)
            one.busy.add(slot)
            one.is_exclusive = is_strict
            running.append(asyncio.ensure_future(self._run(one, task, slot, load)))
        await asyncio.gather(*running)

    async def _change(self) -> None:
        self.changed.clear()
        await self.changed.wait()

    async def _loaded(self, model: ImaginaryModel, replica_id: str) -> Loaded:
        if (known := self.loaded.get(model.name)) is not None:
            return known
        while (fitting := self._fitting(model, self.free_bytes())) is None:
            idle = [name for name, one in self.loaded.items() if not one.busy]
            if idle:
                oldest = min(idle, key=lambda name: self.loaded[name].used_at)
                await self.loaded.pop(oldest).worker.stop(0)
            else:
                await self._change()
        slots, need = fitting
        spec = ReplicaSpec(replica_id, "p", model.path, slots, CTX, "simulated", (self.name,))
        worker = await self.machine.engine.launch(spec)
        one = self.loaded[model.name] = Loaded(worker, need, slots)
        await worker.ready()
        return one

    def _fitting(self, model: ImaginaryModel, room_bytes: int) -> tuple[int, int] | None:
        """As many slots as fit, as ours does."""
        fitting = [(n, need) for n in range(1, SLOTS + 1) if (need := model.need(CTX, n, "simulated")) <= room_bytes]
        return max(fitting, default=None)

    def could_hold(self, model: ImaginaryModel) -> bool:
        return self._fitting(model, self.room_bytes) is not None

    async def _run(self, one: Loaded, task: AgentLoad, slot: int, load: Load) -> None:
        (turn,) = turns(task, 0, load.assume.spread, 0)
        prompt = "w " * (turn.prompt_tokens - 1)
        job = Job(task.name, prompt, turn.answer_tokens, 1, Sampling(), slot)
        async for item in one.worker.generate(job):
            if isinstance(item, Completion):
                break
        one.busy.discard(slot)
        one.is_exclusive, one.used_at = False, asyncio.get_running_loop().time()
        self.changed.set()


Bind = Callable[[Load, list[Shelf]], None]


def round_robin(load: Load, shelves: list[Shelf]) -> None:
    for number, task in enumerate(load.agents):
        able = [s for s in shelves if s.could_hold(load.models[task.model])]
        able[number % len(able)].queue.append(task)


def largest_free_first(load: Load, shelves: list[Shelf]) -> None:
    """By the memory that is left beside the models that were bound to a card before."""
    bound: dict[str, dict[str, int]] = {shelf.name: {} for shelf in shelves}
    for task in load.agents:
        model = load.models[task.model]
        able = [shelf for shelf in shelves if shelf.could_hold(model)]
        shelf = max(able, key=lambda one: one.room_bytes - sum(bound[one.name].values()))
        bound[shelf.name][model.name] = model.need(CTX, 1, "simulated")
        shelf.queue.append(task)


def makespan_s(load: Load, bind: Bind) -> float:
    async def play() -> float:
        cards = load.host(HOST)
        pace = physical_pace(load_bytes_per_s=load.assume.disk_gb_s * GIGA, batch_slowdown=load.assume.batch_slowdown)
        machine = Machine(cards, ImaginaryLibrary(load.models.values()), pace=pace)
        shelves = [Shelf(card.device_id, card.vram_bytes - RESERVE_BYTES, machine) for card in cards]
        bind(load, shelves)
        await asyncio.gather(*(shelf.work(load, number) for number, shelf in enumerate(shelves)))
        return asyncio.get_running_loop().time()

    return run(play())


# -- the report ----------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """Seconds."""

    seed: int
    ours: float
    bound: float
    robin: float
    largest: float


def one(seed: int) -> Outcome:
    load = a_load(seed)
    figures = simulate_host(load, HOST, 0).figures
    failed = sum(agent.tasks_failed for agent in figures.agents)
    if failed:
        raise RuntimeError(f"load {seed}: {failed} tasks failed: {[a.problems for a in figures.agents if a.problems]}")
    return Outcome(
        seed,
        figures.makespan_s,
        figures.lower_bound_s,
        makespan_s(load, round_robin),
        makespan_s(load, largest_free_first),
    )


def row(name: str, ratios: list[float]) -> str:
    ordered = sorted(ratios)
    p90 = ordered[round(0.9 * (len(ordered) - 1))]
    return f"| {name} | {statistics.median(ordered):.3f} | {p90:.3f} | {ordered[-1]:.3f} |"


def main(loads: int, out: Path | None) -> None:
    outcomes = [one(seed) for seed in range(loads)]
    print(f"{loads} loads, {HOST}\n")
    print("| makespan of ours against | median | 90 % | worst |\n| --- | --- | --- | --- |")
    print(row("the lower bound", [o.ours / o.bound for o in outcomes]))
    print(row("round robin", [o.ours / o.robin for o in outcomes]))
    print(row("largest free first", [o.ours / o.largest for o in outcomes]))
    worse = [o for o in outcomes if o.ours > 1.02 * min(o.robin, o.largest)]
    print(f"\nworse than the better of the two by more than 2 %: {len(worse)} of {loads}")
    for o in sorted(worse, key=lambda o: -o.ours / min(o.robin, o.largest))[:10]:
        print(
            f"  load {o.seed}: ours {o.ours:.1f} s, robin {o.robin:.1f}, largest {o.largest:.1f}, bound {o.bound:.1f}"
        )
    if out is not None:
        out.write_text(json.dumps([vars(o) for o in outcomes], indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--loads", type=int, default=200)
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    main(given.loads, given.json)
