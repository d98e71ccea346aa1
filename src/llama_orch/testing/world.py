"""From a seed to a world: cards, models, pools, the tasks that arrive, and what goes wrong. Nothing runs here.

Worlds are small, so that thousands of them can be run, and crowded, so that something happens in each.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from msgspec import UNSET, structs

from llama_orch.contract.config import OnDemandSettings, PoolSettings, QueueSettings, TasksSettings
from llama_orch.contract.models import Determinism, Priority, Sampling, TaskRequest
from llama_orch.devices.inventory import Backend
from llama_orch.engines.simulated import ServiceModel
from llama_orch.testing.cards import GIB, Card, parse_cards
from llama_orch.testing.imaginary import ImaginaryModel, a_model

HOSTS = ("3090,3060", "3090,3060", "3090,3060", "3090", "3060,3060", "3090,3060,3060", "4090,3060")
SLOWNESS = {"3090": 1.0, "4090": 0.8, "3060": 2.5}
SIZES_GIB = {"3b": 1.9, "8b": 4.6, "14b": 8.4, "32b": 18.5}

# What a client does with its task besides waiting for the end of it.
CLIENTS = ("reads", "reads", "reads", "returns", "leaves", "cancels", "repeats", "contradicts", "looks")

# At a time of their own; the others are acts on the n-th launch of a worker.
TIMED = ("crash", "crash", "hang", "freeze", "no_memory", "take_vram", "lose_card", "drain", "reload")
AT_LAUNCH = ("slow_load", "fail_load", "crash_load", "hang_load")


@dataclass(frozen=True, slots=True)
class Arrival:
    """One task and its client. `client_s`: the time of what the client does besides reading, after the admission."""

    number: int
    at_s: float
    request: TaskRequest
    client: str
    client_s: float


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong, or that a person does. `pick` chooses among those that are there, modulo their
    number; `for_s` is how long it lasts, 0 for ever."""

    kind: str
    at_s: float
    pick: int
    for_s: float
    part: float  # of a card's memory, where memory is taken


@dataclass(frozen=True, slots=True)
class World:
    """All of a run that is decided before it. `launch_faults` are by the number of the launch."""

    seed: int
    cards: list[Card]
    models: list[ImaginaryModel]
    pools: list[PoolSettings]
    tasks: TasksSettings
    service: dict[tuple[str, str], ServiceModel]  # by model and card
    strict_needs_exclusive: bool
    arrivals: list[Arrival]
    faults: list[Fault]
    launch_faults: dict[int, Fault] = field(default_factory=dict)
    on_demand: OnDemandSettings = field(default_factory=OnDemandSettings)
    backend: Backend = "simulated"

    def pace(self, model: ImaginaryModel, cards: list[Card]) -> ServiceModel:
        return max((self.service[model.name, card.device_id] for card in cards), key=lambda one: one.decode_s_per_token)


def a_world(seed: int) -> World:
    """The world of this number: the same one at every call, on every machine."""
    dice = random.Random(f"llama-orch world {seed}")
    cards = parse_cards(dice.choice(HOSTS))
    names = dice.sample(list(SIZES_GIB), k=dice.choice([1, 2, 2, 3]))
    models = [a_model(name, gib=SIZES_GIB[name]) for name in names]
    pools = _pools(dice, models[: dice.randint(1, len(models))], cards)  # the others come on demand
    arrivals = _arrivals(dice, seed, models, pools)
    return World(
        seed=seed,
        cards=cards,
        models=models,
        pools=pools,
        tasks=TasksSettings(
            retain_ms=dice.choice([600_000, 600_000, 600_000, 2_000]),
            decode_idle_timeout_ms=dice.choice([1_000, 3_000]),
        ),
        service=_services(dice, models, cards),
        strict_needs_exclusive=dice.random() < 0.7,
        arrivals=arrivals,
        faults=_faults(dice, arrivals[-1].at_s + 3.0),
        launch_faults=_launch_faults(dice),
        on_demand=OnDemandSettings(
            slots=dice.choice([1, 2, 4]),
            keep_alive_ms=dice.choice([0, 500, 5_000, 900_000]),
            min_residency_ms=dice.choice([0, 1_000, 4_000]),
        ),
        backend=dice.choice(["simulated", "cuda"]),
    )


def _pools(dice: random.Random, models: list[ImaginaryModel], cards: list[Card]) -> list[PoolSettings]:
    pools = []
    for number, model in enumerate(models):
        devices: Any = "auto"
        if dice.random() < 0.15:
            devices = [card.device_id for card in dice.sample(cards, k=dice.randint(1, len(cards)))]
        pools.append(
            PoolSettings(
                id=f"p{number}",
                model=model.reference,
                devices=devices,
                replicas=dice.choice(["auto", "auto", "auto", 1, 2]),
                slots=dice.choice([1, 2, 2, 3, 4]),
                ctx=2048,
                max_tokens=12,
                keep_alive_ms=dice.choice([None, None, 0, 700, 5_000]),
                queue=QueueSettings(
                    capacity=dice.choice([64, 64, 6, 3, 1, 0]), full_policy=dice.choice(["reject", "drop-lru"])
                ),
            )
        )
    return pools


def _services(
    dice: random.Random, models: list[ImaginaryModel], cards: list[Card]
) -> dict[tuple[str, str], ServiceModel]:
    token_s, cancel_s, unload_s = dice.choice([0.03, 0.1, 0.25]), dice.choice([0.0, 0.02, 0.4]), dice.choice([0.0, 0.3])
    batch_slowdown, load_s_per_gib = dice.choice([0.0, 0.2]), dice.choice([0.05, 0.3])
    mean_tokens, card_slowdown = dice.choice([None, 6]), dice.choice([0.0, 1.0])
    services = {}
    for model in models:
        gib = model.weights_bytes / GIB
        for card in cards:
            slow = SLOWNESS[card.device_id.split("-")[0]] * gib / 4.6
            services[model.name, card.device_id] = ServiceModel(
                load_s=gib * load_s_per_gib,
                prefill_s_per_token=token_s * slow / 50,
                decode_s_per_token=token_s * slow,
                cancel_s=cancel_s,
                unload_s=unload_s,
                mean_tokens=mean_tokens,
                batch_slowdown=batch_slowdown,
                card_slowdown=card_slowdown,
            )
    return services


def _arrivals(dice: random.Random, seed: int, models: list[ImaginaryModel], pools: list[PoolSettings]) -> list[Arrival]:
    arrivals, at_s = [], 0.0
    pause_s = dice.choice([0.05, 0.3, 1.0])
    sessions = [_id(seed, 0xFFFF - n) for n in range(3)]
    for number in range(dice.randint(5, 16)):
        at_s += 0.0 if dice.random() < 0.3 else round(dice.expovariate(1 / pause_s), 3)
        reference = dice.choice(models).reference
        request = _request(dice, _id(seed, number), reference, sessions)
        if all(pool.model != reference for pool in pools) and request.max_tokens is None:
            request = structs.replace(request, max_tokens=12)  # a pool on demand would give it hundreds
        arrivals.append(Arrival(number, at_s, request, dice.choice(CLIENTS), round(dice.uniform(0.0, 2.0), 3)))
    return arrivals


def _id(seed: int, number: int) -> str:
    return f"{number:08x}-0000-4000-8000-{seed:012x}"


def _request(dice: random.Random, task_id: str, reference: str, sessions: list[str]) -> TaskRequest:
    words = dice.choice([3, 3, 10, 40]) if dice.random() < 0.97 else 3000  # the last fits no context
    prompt = " ".join(dice.choice(["ha", "ho", "hum"]) for _ in range(words))
    deadline_ms = dice.choice([None, None, None, None, 150, 1_000, 5_000, 30_000])
    stop = Sampling(stop=["ka"]) if dice.random() < 0.1 else UNSET
    return TaskRequest(
        task_id=task_id,
        session_id=dice.choice([None, None, *sessions]),
        model_ref=reference,
        priority=dice.choice([Priority.INTERACTIVE, Priority.BATCH]),
        determinism=dice.choice([Determinism.STRICT, Determinism.BEST_EFFORT]),
        seed=dice.randrange(3),  # few, so that some tasks are the same and must answer the same
        prompt=prompt if words % 2 else None,
        inputs=[prompt, "ha ho"] if words % 2 == 0 else None,
        max_tokens=dice.choice([None, 1, 3, 8, 20]),
        deadline_ms=deadline_ms,
        expected_tokens=dice.choice([None, None, 5]),
        sampling=stop,
    )


def _faults(dice: random.Random, end_s: float) -> list[Fault]:
    count = dice.choice([0, 0, 1, 1, 2, 4])
    faults = [_fault(dice, dice.choice(TIMED), round(dice.uniform(0.0, end_s), 3)) for _ in range(count)]
    return sorted(faults, key=lambda fault: fault.at_s)


def _launch_faults(dice: random.Random) -> dict[int, Fault]:
    if dice.random() < 0.6:
        return {}
    return {number: _fault(dice, dice.choice(AT_LAUNCH), 0.0) for number in dice.sample(range(6), k=dice.randint(1, 3))}


def _fault(dice: random.Random, kind: str, at_s: float) -> Fault:
    return Fault(kind, at_s, dice.randrange(1000), dice.choice([0.0, 0.5, 4.0, 20.0]), dice.choice([0.2, 0.5, 0.95]))
