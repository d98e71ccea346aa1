"""How far off is `predicted_start_ms`? What tasks are told at their admission, against when they then start.

    python benchmarks/prediction.py --simulated [--loads 40]
    python benchmarks/prediction.py --real [--tasks 120]

Both keep about 20 tasks waiting in front of one model on two unequal cards and look at the tasks that came in with 15
to 25 ahead of them. `--simulated` is the real core on an imaginary RTX 3090 and RTX 3060, in virtual time. `--real` is
a service of its own with two declared devices of 24 and 12 GB, on which real llama.cpp workers compute with the CPU:
they share its cores, and so does everything else on the machine. Answers end by themselves, in the simulation with
lengths that vary as much as they can (geometric); where they are told, the client says `expected_tokens` and is right.
Prints Markdown: the error relative to the true wait.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from llama_orch.contract.config import PoolSettings, QueueSettings
from llama_orch.contract.models import TaskRequest
from llama_orch.engines.simulated import ServiceModel
from llama_orch.testing.cards import Card, parse_cards
from llama_orch.testing.imaginary import ImaginaryLibrary, ImaginaryModel, a_model, physical_pace
from llama_orch.testing.loop import run
from llama_orch.testing.machine import Machine
from llama_orch.testing.stage import on_stage, settings_of

sys.path.insert(0, str(Path(__file__).parent))

from served import a_service

AHEAD = range(15, 26)
WAITING = 20
KINDS = {"strict": 1.0, "best effort": 0.0, "half of each": 0.5}  # the share of strict tasks


@dataclass(frozen=True)
class Told:
    """One task: what it was told, and what came. Seconds from its admission; None: nothing was foretold."""

    ahead: int
    predicted_s: float | None
    true_s: float


def a_body(dice: random.Random, model: str, strict_share: float) -> dict[str, Any]:
    return {
        "task_id": str(uuid.UUID(int=dice.getrandbits(128))),
        "model_ref": model,
        "inputs": ["Once upon a time " * dice.randint(1, 40)],
        "max_tokens": 1000,
        "seed": dice.randrange(1000),
        "determinism": "strict" if dice.random() < strict_share else "best_effort",
    }


# -- simulated -----------------------------------------------------------------------------------------------------


def simulated(strict_share: float, seed: int, *, is_told: bool, tasks: int = 80) -> list[Told]:
    dice = random.Random(f"prediction:{seed}")
    physical = physical_pace()
    mean = dice.choice([60, 150, 300])

    def pace(model: ImaginaryModel, cards: list[Card]) -> ServiceModel:
        return replace(physical(model, cards), mean_tokens=None if is_told else mean)

    def request(reference: str) -> TaskRequest:
        body = a_body(dice, reference, strict_share)
        if is_told:  # of the same lengths, but the client has them from somewhere
            body["max_tokens"] = body["expected_tokens"] = min(1000, 1 + round(dice.expovariate(1 / mean)))
        return msgspec.convert(body, TaskRequest)

    async def play() -> list[Told]:
        model = a_model("8b", gib=dice.choice([2.0, 4.6, 7.5]))
        machine = Machine(parse_cards("3090,3060"), ImaginaryLibrary([model]), pace=pace)
        pool = PoolSettings(id="p", model=model.reference, slots=2, ctx=2048, queue=QueueSettings(capacity=1000))
        async with on_stage(settings_of([pool]), machine) as stage:
            await asyncio.sleep(10.0)  # both replicas have loaded
            told: dict[str, tuple[int, float | None]] = {}
            for _ in range(tasks):
                while len(stage.scheduler.pools["p"].queue) >= WAITING:  # noqa: ASYNC110  # in virtual time
                    await asyncio.sleep(0.05)
                answer = await stage.service.submit(request(model.reference))
                start = answer.predicted_start_ms
                told[answer.task_id] = (answer.queue_position or 0, None if start is None else start / 1000)
            while not stage.scheduler.is_idle:  # noqa: ASYNC110
                await asyncio.sleep(1.0)
            found = []
            for task_id, (ahead, predicted_s) in told.items():
                task = stage.scheduler.tasks[task_id]
                assert task.started_s is not None
                found.append(Told(ahead, predicted_s, task.started_s - task.created_s))
            return found

    return run(play())


# -- real ----------------------------------------------------------------------------------------------------------


async def real(strict_share: float, tasks: int) -> list[Told]:
    gb = 10**9
    configuration = {
        "devices": [
            {"id": "a", "backend": "simulated", "vram_bytes": 24 * gb},
            {"id": "b", "backend": "simulated", "vram_bytes": 12 * gb},
        ],
        "pools": [{"id": "p", "slots": 2, "ctx": 2048, "queue": {"capacity": 1000}}],
        "logs": {"level": "warning"},
    }
    dice = random.Random(f"prediction:real:{strict_share}")
    with tempfile.TemporaryDirectory() as folder:
        async with a_service(configuration, Path(folder)) as served:
            client = served.client

            async def pool(path: str = "") -> Any:
                return (await client.get(f"/v1/pools/p{path}")).json()

            while not all(one["state"] == "ready" for one in (await pool("/health"))["replicas"]):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            told: list[dict[str, Any]] = []
            for number in range(tasks):
                # Not before each one: the question costs about as much as a task.
                while number % 4 == 0 and sum((await pool())["queue_depth"].values()) >= WAITING:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
                body = a_body(dice, "builtin:tiny", strict_share)
                body |= {"inputs": body["inputs"] * 3, "max_tokens": 1500}  # long enough for a queue to build up
                told.append((await client.post("/v1/tasks", json=body)).raise_for_status().json())
            while sum((await pool())["queue_depth"].values()):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            return [await _seen(client, one) for one in told]


async def _seen(client: Any, one: dict[str, Any]) -> Told:
    task = (await client.get(f"/v1/tasks/{one['task_id']}")).json()
    created, started = (datetime.fromisoformat(task[name]) for name in ("created_at", "started_at"))
    start = one["predicted_start_ms"]
    return Told(
        one["queue_position"] or 0, None if start is None else start / 1000, (started - created).total_seconds()
    )


# -- the report ----------------------------------------------------------------------------------------------------


def row(name: str, told: Sequence[Told]) -> str:
    known = [one for one in told if one.ahead in AHEAD and one.true_s > 0]
    pairs = [(one.predicted_s, one.true_s) for one in known if one.predicted_s is not None]
    errors = sorted(abs(predicted - true) / true for predicted, true in pairs)
    if not errors:
        return f"| {name} | {len(known)} | - | - | - | - |"
    bias = statistics.median((predicted - true) / true for predicted, true in pairs)
    p90 = errors[round(0.9 * (len(errors) - 1))]
    figures = f"{statistics.median(errors):.1%} | {p90:.1%} | {errors[-1]:.1%} | {bias:+.1%}"
    return f"| {name} | {len(errors)} of {len(known)} | {figures} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulated", action="store_true")
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--loads", type=int, default=40)
    parser.add_argument("--tasks", type=int, default=120)
    given = parser.parse_args()
    if not (given.simulated or given.real):
        parser.error("say --simulated, --real or both")
    print("| tasks | foretold, with 15 to 25 ahead | median error | 90 % | worst | median bias |")
    print("| --- | --- | --- | --- | --- | --- |")
    for kind, share in KINDS.items():
        if given.simulated:
            for is_told, words in ((True, "lengths told"), (False, "lengths unknown")):
                told = [one for seed in range(given.loads) for one in simulated(share, seed, is_told=is_told)]
                print(row(f"simulated, {kind}, {words}", told), flush=True)
        if given.real:
            print(row(f"llama.cpp on the CPU, {kind}", asyncio.run(real(share, given.tasks))), flush=True)


if __name__ == "__main__":
    main()
