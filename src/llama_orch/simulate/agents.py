"""The agents of a load: prompt, answer, think, again; as well-behaved clients they wait when they are told to."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

from llama_orch.contract.models import TaskRequest, TaskState
from llama_orch.errors import LlorchError
from llama_orch.simulate.load import AgentLoad, Load
from llama_orch.simulate.recorder import Recorder
from llama_orch.testing import frames
from llama_orch.testing.stage import Stage

TRIES_MAX = 10_000  # of one task that is told to come back


@dataclass(frozen=True, slots=True)
class Turn:
    """One task of an agent, and the pause before it."""

    think_s: float
    prompt_tokens: int
    answer_tokens: int


@dataclass(slots=True)
class Felt:
    """What an agent met with, of all of its copies together. Seconds from the first try of each task."""

    waits_s: list[float] = field(default_factory=list)  # to the start on a slot
    first_token_s: list[float] = field(default_factory=list)
    done: int = 0
    failed: int = 0
    refusals: int = 0
    problems: list[str] = field(default_factory=list)


def turns(agent: AgentLoad, number: int, spread: float, seed: int) -> list[Turn]:
    """The same ones for the same seed, whatever the cards are: hosts are compared on the same work."""
    dice = random.Random(f"{seed}:{agent.name}:{number}")

    def drawn(mean: float) -> float:
        return mean * dice.uniform(1 - spread, 1 + spread)

    return [
        Turn(
            think_s=0.0 if turn == 0 else drawn(agent.think_s),
            prompt_tokens=max(1, round(drawn(agent.prompt_tokens))),
            answer_tokens=max(1, round(drawn(agent.answer_tokens))),
        )
        for turn in range(agent.tasks)
    ]


class Agent:
    """One copy of an agent. `number` counts the copies of all agents."""

    def __init__(self, agent: AgentLoad, given: list[Turn], number: int, load: Load, felt: Felt) -> None:
        self._agent = agent
        self._turns = given
        self._number = number
        self._load = load
        self._felt = felt

    async def run(self, stage: Stage, recorder: Recorder) -> None:
        for count, turn in enumerate(self._turns):
            await asyncio.sleep(turn.think_s)
            task_id = f"{self._number:08x}-0000-4000-8000-{count:012x}"
            recorder.agents[task_id] = self._agent.name
            if not await self._one(stage, task_id, turn):
                return

    async def _one(self, stage: Stage, task_id: str, turn: Turn) -> bool:
        """One task to its end; False where no other could do better."""
        now = asyncio.get_running_loop().time
        began = now()
        if not await self._submit(stage, self._request(task_id, turn)):
            return False
        reader = stage.service.open_stream(task_id, -1)
        first_token: float | None = None
        while (batch := await reader.batch()) is not None:
            if first_token is None and any(frame.event == "token" for frame in frames.parse(batch)):
                first_token = now() - began
        reader.close()
        task = stage.scheduler.tasks[task_id]
        if task.started_s is not None:
            self._felt.waits_s.append(task.started_s - began)
        if first_token is not None:
            self._felt.first_token_s.append(first_token)
        if task.state is TaskState.SUCCEEDED:
            self._felt.done += 1
        else:
            self._felt.failed += 1
            self._problem("the task failed" if task.error is None else task.error.message)
        return True

    def _request(self, task_id: str, turn: Turn) -> TaskRequest:
        agent = self._agent
        words = turn.prompt_tokens - 1  # and the start-of-text token
        return TaskRequest(
            task_id=task_id,
            model_ref=self._load.models[agent.model].reference,
            ctx=self._load.ctx[agent.model],
            priority=agent.priority,
            determinism=agent.determinism,
            seed=1,
            prompt="w " * words or "w",
            max_tokens=turn.answer_tokens,
        )

    async def _submit(self, stage: Stage, request: TaskRequest) -> bool:
        for _ in range(TRIES_MAX):
            try:
                await stage.service.submit(request)
                return True
            except LlorchError as error:
                if error.retry_after_ms is None or error.http_status == 404:
                    self._felt.failed += 1
                    self._problem(error.message)
                    return False
                self._felt.refusals += 1
                await asyncio.sleep(error.retry_after_ms / 1000)
        self._problem(f"refused {TRIES_MAX} times")
        return False

    def _problem(self, text: str) -> None:
        if text not in self._felt.problems and len(self._felt.problems) < 5:
            self._felt.problems.append(text)
