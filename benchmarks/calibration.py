"""Does `on_time_probability` mean what it says? The chance that tasks are told at their admission, against the part of
them that then met their deadlines.

    python benchmarks/calibration.py [--loads 12] [--tasks 250]

The real core and runtime in virtual time, on an imaginary RTX 3090, alone or beside an RTX 3060. Tasks arrive at
random, at 0.7 to 1.4 times the rate that the cards can serve, now and then several at once; two of three have a
deadline, half to twenty times the mean time of a task after their admission; their clients know nothing of the queue.
Answers end by themselves: geometric lengths vary as much as their mean, uniform ones from a tenth of the mean to twice
it; where lengths are told, the client says `expected_tokens` and is right, or is off by up to a third either way.
Prints Markdown: of the tasks that were told about so much, how many were on time.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from llama_orch.contract.config import PoolSettings, QueueSettings
from llama_orch.contract.models import Determinism, TaskRequest, TaskState
from llama_orch.core.task import Task
from llama_orch.engines.simulated import ServiceModel
from llama_orch.errors import LlorchError
from llama_orch.testing.cards import Card, parse_cards
from llama_orch.testing.imaginary import ImaginaryLibrary, ImaginaryModel, a_model, physical_pace
from llama_orch.testing.loop import run
from llama_orch.testing.machine import Machine
from llama_orch.testing.stage import Stage, on_stage, settings_of

BINS = 10
SHARES = {"strict": 1.0, "best effort": 0.0, "half of each": 0.5}
LENGTHS = ("told", "about told", "geometric", "uniform")
HOSTS = ("3090", "3090,3060")
MEANS = (60, 150, 300)  # tokens


@dataclass(frozen=True)
class Load:
    lengths: str
    cards: str
    strict_share: float
    seed: int
    tasks: int


@dataclass(frozen=True)
class Told:
    """One task that was told a chance, and what came of it."""

    chance: float
    is_on_time: bool


def told(load: Load) -> list[Told]:
    """Every task of the load that had a deadline and was told a chance. What is refused at once is told nothing."""
    dice = random.Random(f"calibration:{load.seed}")
    mean = dice.choice(MEANS)
    model = a_model("8b", gib=dice.choice([2.0, 4.6, 7.5]))
    physical = physical_pace()

    def pace(of: ImaginaryModel, cards: list[Card]) -> ServiceModel:
        alone = physical(of, cards)
        if load.lengths == "geometric":
            return replace(alone, mean_tokens=mean)
        return replace(alone, uniform_tokens=_bounds(mean))

    machine = Machine(parse_cards(load.cards), ImaginaryLibrary([model]), pace=pace)
    pool = PoolSettings(id="p", model=model.reference, slots=4, ctx=4096, queue=QueueSettings(capacity=1000))

    async def play() -> list[Told]:
        async with on_stage(settings_of([pool]), machine) as stage:
            await asyncio.sleep(10.0)  # the replicas have loaded
            found = await _play(stage, load, dice, mean, pace(model, list(machine.cards.values())[:1]))
            while not stage.scheduler.is_idle:  # noqa: ASYNC110  # in virtual time
                await asyncio.sleep(1.0)
            return [Told(chance, task.state is TaskState.SUCCEEDED) for task, chance in found]

    return run(play())


async def _play(
    stage: Stage, load: Load, dice: random.Random, mean: int, alone: ServiceModel
) -> list[tuple[Task, float]]:
    service_s = mean * alone.decode_s_per_token
    at_once = 1.0 + 1.8 * (1 - load.strict_share)  # four slots that slow each other
    rate = dice.uniform(0.7, 1.4) * at_once * (1.4 if "," in load.cards else 1.0) / service_s
    found = []
    for _ in range(load.tasks):
        if dice.random() > 0.2:  # else it comes together with the one before
            await asyncio.sleep(dice.expovariate(rate * 0.8))
        request = _request(dice, load, mean, service_s, next(iter(stage.machine.library._models)))
        try:
            await stage.service.submit(request)
        except LlorchError:  # a deadline that cannot be met
            continue
        task = stage.scheduler.tasks[str(request.task_id)]
        now = asyncio.get_running_loop().time()
        chance = stage.scheduler.predictor.on_time(task.pool, task, stage.scheduler.tasks, now)
        if chance is not None:
            found.append((task, chance))
    return found


def _bounds(mean: int) -> tuple[int, int]:
    """Of uniform lengths, in tokens."""
    return mean // 10, 2 * mean


def _request(dice: random.Random, load: Load, mean: int, service_s: float, reference: str) -> TaskRequest:
    seed, prompt = dice.randrange(1 << 30), "Once upon a time " * dice.randint(1, 60)
    body = {
        "task_id": str(uuid.UUID(int=dice.getrandbits(128))),
        "model_ref": reference,
        "prompt": prompt,
        "max_tokens": 2000,
        "seed": seed,
        "determinism": Determinism.STRICT if dice.random() < load.strict_share else Determinism.BEST_EFFORT,
    }
    if dice.random() < 2 / 3:
        body["deadline_ms"] = max(1, round(1000 * service_s * 0.5 * 40 ** dice.random()))
    if load.lengths in ("told", "about told"):
        length = random.Random(f"{seed}:{prompt}").randint(*_bounds(mean))  # as the engine draws it
        off = 1.0 if load.lengths == "told" else dice.uniform(2 / 3, 4 / 3)
        body["expected_tokens"] = round(off * length)
    return msgspec.convert(body, TaskRequest)


def table(name: str, found: Sequence[Told]) -> list[str]:
    """One row: of those told up to 0.1, 0.2 and so on, the part that was on time, with their number."""
    cells = []
    for part in range(BINS):
        bin_ = [one for one in found if min(BINS - 1, int(one.chance * BINS)) == part]
        share = sum(one.is_on_time for one in bin_) / len(bin_) if bin_ else 0.0
        cells.append(f"{share:.0%} of {len(bin_)}" if bin_ else "-")
    return [name, *cells]


def around(found: Sequence[Told], chance: float, width: float = 0.05) -> tuple[float, int]:
    """Of those told the chance, or as much as `width` more or less: the part that was on time, and their number."""
    near = [one for one in found if abs(one.chance - chance) <= width]
    return (sum(one.is_on_time for one in near) / len(near) if near else 0.0), len(near)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", type=int, default=12)
    parser.add_argument("--tasks", type=int, default=250)
    given = parser.parse_args()
    print(
        "| load | " + " | ".join(f"{n / BINS:.1f} to {(n + 1) / BINS:.1f}" for n in range(BINS)) + " | 0.75 to 0.85 |"
    )
    print("| --- |" + " --- |" * (BINS + 1))
    logging.disable(logging.CRITICAL)
    everything: list[Told] = []
    for lengths in LENGTHS:
        for cards in HOSTS:
            for kind, share in SHARES.items():
                found = [
                    one for seed in range(given.loads) for one in told(Load(lengths, cards, share, seed, given.tasks))
                ]
                everything += found
                part, count = around(found, 0.8)
                row = [*table(f"{lengths}, {cards}, {kind}", found), f"**{part:.0%}** of {count}"]
                print(f"| {' | '.join(row)} |", flush=True)
    part, count = around(everything, 0.8)
    print(f"| {' | '.join([*table('all', everything), f'**{part:.0%}** of {count}'])} |")


if __name__ == "__main__":
    main()
