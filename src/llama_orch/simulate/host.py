"""One host under one load: the run, and its figures."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from typing import NamedTuple

from msgspec import Struct

from llama_orch.contract.config import OnDemandSettings
from llama_orch.contract.models import Determinism
from llama_orch.core.ledger import RESERVE_BYTES
from llama_orch.simulate.agents import Agent, Felt, Turn, turns
from llama_orch.simulate.bound import Work, lower_bound
from llama_orch.simulate.load import AgentLoad, Load
from llama_orch.simulate.recorder import Recorder, Span, busy_s
from llama_orch.testing.cards import GIB, GIGA, Card
from llama_orch.testing.imaginary import ImaginaryLibrary, ImaginaryModel, Pace, physical_pace
from llama_orch.testing.loop import run
from llama_orch.testing.machine import Machine
from llama_orch.testing.stage import on_stage, settings_of

END_LIMIT_S = 30 * 86_400.0  # of virtual time: a load that takes a month does not end


class CardFigures(Struct, kw_only=True):
    """One card over the whole run."""

    card: str
    memory_gib: float
    busy: float  # part of the time with a task on it
    tasks: int
    tokens_out: int
    tokens_per_s: float  # over the whole run
    loads: int
    loading_s: float
    evictions: int


class AgentFigures(Struct, kw_only=True):
    """One agent, all copies together. Seconds; None where nothing was seen."""

    agent: str
    model: str
    tasks_done: int
    tasks_failed: int
    refusals: int
    wait_p50_s: float | None
    wait_p95_s: float | None
    first_token_p50_s: float | None
    first_token_p95_s: float | None
    problems: list[str]


class HostFigures(Struct, kw_only=True):
    """What came of one host."""

    devices: str
    makespan_s: float
    lower_bound_s: float
    ratio: float | None
    cards: list[CardFigures]
    agents: list[AgentFigures]


class HostRun(Struct, kw_only=True):
    """The figures, and what a chart is drawn from."""

    figures: HostFigures
    spans: list[Span]
    depth: list[tuple[float, int]]
    models: list[str]


def simulate_host(load: Load, devices: str, seed: int) -> HostRun:
    """The load on these cards. The same seed gives the same run."""
    log = logging.getLogger("llama_orch")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)  # the service's log tells of a server, and there is none
    try:
        return run(_simulate(load, devices, load.host(devices), seed))
    finally:
        log.setLevel(level)


async def _simulate(load: Load, devices: str, cards: list[Card], seed: int) -> HostRun:
    pace = physical_pace(load_bytes_per_s=load.assume.disk_gb_s * GIGA, batch_slowdown=load.assume.batch_slowdown)
    recorder = Recorder(asyncio.get_running_loop().time)
    machine = Machine(cards, ImaginaryLibrary(load.models.values()), pace=pace, on_launch=recorder.launched)
    on_demand = OnDemandSettings(
        slots=load.assume.slots, min_residency_ms=round(load.assume.min_residency_s * 1000), keep_alive_ms=900_000
    )
    felt = {agent.name: Felt() for agent in load.agents}
    copies = [
        (agent, turns(agent, number, load.assume.spread, seed))
        for agent in load.agents
        for number in range(agent.count)
    ]
    async with on_stage(settings_of(load.pools, on_demand=on_demand), machine, recorder.watch) as stage:
        going = [
            asyncio.ensure_future(Agent(agent, given, number, load, felt[agent.name]).run(stage, recorder))
            for number, (agent, given) in enumerate(copies)
        ]
        async with asyncio.timeout(END_LIMIT_S):
            await asyncio.gather(*going)
        spans = recorder.finished()
        makespan_s = max((s.end_s or 0.0 for s in spans if s.kind == "task"), default=0.0)
    bound_s = _bound(load, cards, copies, pace)
    figures = HostFigures(
        devices=devices,
        makespan_s=makespan_s,
        lower_bound_s=bound_s,
        ratio=makespan_s / bound_s if bound_s else None,
        cards=[_card_figures(card, spans, recorder, makespan_s) for card in cards],
        agents=[_agent_figures(agent, felt[agent.name]) for agent in load.agents],
    )
    return HostRun(figures=figures, spans=spans, depth=recorder.depth, models=list(load.models))


def _card_figures(card: Card, spans: list[Span], recorder: Recorder, makespan_s: float) -> CardFigures:
    name = card.device_id
    here = [span for span in spans if name in span.devices and span.start_s <= makespan_s]
    tasks, loads = [s for s in here if s.kind == "task"], [s for s in here if s.kind == "load"]
    tokens = sum(span.tokens_out for span in tasks)
    total_s = makespan_s or 1.0
    return CardFigures(
        card=name,
        memory_gib=round(card.vram_bytes / GIB, 1),
        busy=busy_s(here, name) / total_s,
        tasks=len(tasks),
        tokens_out=tokens,
        tokens_per_s=tokens / total_s,
        loads=len(loads),
        loading_s=sum((s.end_s or s.start_s) - s.start_s for s in loads),
        evictions=recorder.evictions.get(name, 0),
    )


def _agent_figures(agent: AgentLoad, felt: Felt) -> AgentFigures:
    return AgentFigures(
        agent=agent.name,
        model=agent.model,
        tasks_done=felt.done,
        tasks_failed=felt.failed,
        refusals=felt.refusals,
        wait_p50_s=percentile(felt.waits_s, 0.5),
        wait_p95_s=percentile(felt.waits_s, 0.95),
        first_token_p50_s=percentile(felt.first_token_s, 0.5),
        first_token_p95_s=percentile(felt.first_token_s, 0.95),
        problems=felt.problems,
    )


def percentile(values: Sequence[float], part: float) -> float | None:
    """The smallest value that at least this part of them does not exceed."""
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)] if values else None


# -- the bound -----------------------------------------------------------------------------------------------------


def _bound(load: Load, cards: list[Card], copies: list[tuple[AgentLoad, list[Turn]]], pace: Pace) -> float:
    works, chains = [], []
    for agent, given in copies:
        is_strict = agent.determinism is Determinism.STRICT
        slots = 1 if is_strict else max([load.assume.slots, *(pool.slots for pool in load.pools)])
        ways = [way(load.models[agent.model], card, load.ctx[agent.model], slots, pace) for card in cards]
        own = [work_on(ways, turn.prompt_tokens, turn.answer_tokens) for turn in given]
        if all(work.fits for work in own):
            works += own
            first = min(map(sum, zip(own[0].load_s, own[0].alone_s, strict=True)))
            rest = sum(turn.think_s + work.fastest_s for turn, work in zip(given[1:], own[1:], strict=True))
            chains.append(first + rest)
    return lower_bound(works, chains)


class Way(NamedTuple):
    """How a model runs on a card. Seconds; `part`: of the card, that one task takes with as many slots as fit."""

    prefill_s: float
    decode_s: float
    part: float
    load_s: float


def way(model: ImaginaryModel, card: Card, ctx: int, slots: int, pace: Pace) -> Way | None:
    """None where not even one slot fits."""
    room = card.vram_bytes - RESERVE_BYTES
    fitting = [count for count in range(1, slots + 1) if model.need(ctx, count, "simulated") <= room]
    if not fitting:
        return None
    service = pace(model, [card])
    part = min((1 + service.batch_slowdown * (count - 1)) / count for count in fitting)
    return Way(service.prefill_s_per_token, service.decode_s_per_token, part, service.load_s)


def work_on(ways: Sequence[Way | None], prompt_tokens: int, answer_tokens: int) -> Work:
    """A task on each card."""
    alone = [math.inf if one is None else prompt_tokens * one.prefill_s + answer_tokens * one.decode_s for one in ways]
    return Work(
        share_s=tuple(
            math.inf if one is None else seconds * one.part for one, seconds in zip(ways, alone, strict=True)
        ),
        alone_s=tuple(alone),
        load_s=tuple(math.inf if one is None else one.load_s for one in ways),
    )
