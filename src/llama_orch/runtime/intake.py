"""What a request comes to before it is queued: its prompts as the engine will see them, and their length in the model's
own tokens (HP-ADM-7).

Counting costs the worker, and nobody has been admitted yet: so few counts run at a time, and a text that no vocabulary
could fit into the context is refused without asking.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from msgspec import UNSET, structs

from llama_orch.contract.models import ChatMessage, TaskRequest
from llama_orch.core import admission, refusals
from llama_orch.core.pool import Pool
from llama_orch.core.prediction import Predictor
from llama_orch.core.tool_syntax import SYNTAXES
from llama_orch.core.tooling import grammar_of_tools, message_in_full, tool_in_full
from llama_orch.engines.base import Engine, EngineError, JobRefused, Message, Worker, WorkerLost
from llama_orch.errors import InvalidParams, PoolUnready
from llama_orch.runtime.replicas import Replicas

log = logging.getLogger("llama_orch.intake")

COUNTS_AT_ONCE = 2  # per pool; workers keep more HTTP threads than this beside those of their slots
COUNT_LIMIT_S = 60.0  # the wait for a turn included
GRAMMAR_LIMIT_S = 30.0  # likewise
BUSY_MS = 1_000


@dataclass(frozen=True, slots=True)
class Measured:
    """`counts` is None while no replica could be asked: then the prompts fit whatever the tokenizer makes of them."""

    prompts: Sequence[str]
    counts: Sequence[int] | None  # of each run on the engine
    grammar: str | None = None  # GBNF that the answer must match


class Intake:
    """Measures requests for one orchestrator."""

    def __init__(self, engines: Mapping[str, Engine], replicas: Replicas, predictor: Predictor) -> None:
        self._engines = engines
        self._replicas = replicas
        self._predictor = predictor
        self._turns: dict[str, asyncio.Semaphore] = {}

    async def measure(self, pool: Pool, request: TaskRequest, now: float) -> Measured:
        admission.check_size(request, pool.spec)
        grammar = await self._grammar(pool, request)
        return replace(await self._measure(pool, request, now), grammar=grammar)

    async def _grammar(self, pool: Pool, request: TaskRequest) -> str | None:
        """Refuses what could hurt the engine, before it gets there."""
        syntax = pool.spec.tool_syntax
        if request.tools is not UNSET and syntax is not None:
            grammar = await asyncio.to_thread(grammar_of_tools, request, request.tools, SYNTAXES[syntax])
        elif request.sampling is not UNSET and admission.is_constrained(request):
            grammar = await asyncio.to_thread(admission.grammar_of, request.sampling)
        else:
            return None
        try:
            async with asyncio.timeout(GRAMMAR_LIMIT_S):
                reason = await self._engines[pool.spec.engine].grammar_refusal(grammar)
        except (EngineError, TimeoutError) as error:
            raise self._busy(pool, str(error) or "others' grammars are being tried", "try the grammar") from error
        if reason is not None:
            raise InvalidParams(f"the grammar of the answer is refused: {reason}", engine=pool.spec.engine)
        return grammar

    async def _measure(self, pool: Pool, request: TaskRequest, now: float) -> Measured:
        serving = ((replica, self._replicas.worker(replica.replica_id)) for replica in pool.replicas.values())
        replica, worker = next(((r, w) for r, w in serving if w is not None), (None, None))
        if replica is None or worker is None:
            return self._bounded(pool, request, now)
        try:
            async with asyncio.timeout(COUNT_LIMIT_S), self._turn(pool):
                prompts = await render(worker, request)
                return Measured(prompts, await count(worker, request, prompts))
        except JobRefused as error:
            hint = "; end `messages` with a `user` turn or send a `prompt`" if request.messages else ""
            reason = f"{pool.spec.engine} refuses this: {error}{hint}"
            raise InvalidParams(reason, engine=pool.spec.engine) from error
        except WorkerLost as error:
            # One that decodes proves by its tokens that it lives, or is found out by their absence; an idle one cannot.
            if not replica.leases:
                self._replicas.condemn(replica.replica_id, str(error))
            raise self._busy(pool, str(error)) from error
        except (EngineError, TimeoutError) as error:
            raise self._busy(pool, str(error) or "others are being counted") from error

    def _turn(self, pool: Pool) -> asyncio.Semaphore:
        return self._turns.setdefault(pool.spec.pool_id, asyncio.Semaphore(COUNTS_AT_ONCE))

    @staticmethod
    def _busy(pool: Pool, reason: str, what: str = "count the prompt's tokens") -> PoolUnready:
        log.warning("pool %s could not %s: %s", pool.spec.pool_id, what, reason)
        return PoolUnready(
            f"pool {pool.spec.pool_id} could not {what} ({reason}); repeat shortly",
            engine=pool.spec.engine,
            retry_after_ms=BUSY_MS,
        )

    def _bounded(self, pool: Pool, request: TaskRequest, now: float) -> Measured:
        """Without a worker to ask, only what fits by its bytes is let in."""
        prompts = admission.texts(request)
        asked = (request.max_tokens or 1) if admission.writes(request) else 0
        bounds = admission.token_bounds(request, prompts)
        if bounds and all(bound + asked <= pool.spec.ctx for bound in bounds):
            return Measured(prompts, None)
        raise refusals.unready(pool, self._predictor.ready_advice_ms(pool, now))


async def count(worker: Worker, request: TaskRequest, prompts: Sequence[str]) -> list[int]:
    """Tokens of each run on the engine."""
    return admission.evaluations(request, [await worker.count_tokens(prompt) for prompt in prompts])


async def render(worker: Worker, request: TaskRequest) -> Sequence[str]:
    """The request's prompts; a conversation goes through the model's own template."""
    if request.messages is None:
        return admission.texts(request)
    tools: list[Message] | None = None
    if request.tools is not UNSET:
        tools = [tool_in_full(function) for function in request.tools.functions]
    return [await worker.render_chat(plain(request.messages), tools)]


def plain(messages: Sequence[ChatMessage]) -> list[Message]:
    """The conversation as engines are given it."""
    return [message_in_full(message) for message in messages]


def with_lower_ids(request: TaskRequest) -> TaskRequest:
    """A UUID is the same in either case of its letters, and so is what it names."""
    ids = {name: value.lower() for name in ("task_id", "session_id") if (value := getattr(request, name)) is not None}
    return structs.replace(request, **ids) if ids else request
