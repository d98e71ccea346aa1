"""An engine without a model: seeded pseudo-words, timed by a service model, in this process.

It waits on the event loop's clock alone, so that it runs at full speed under a virtual-time loop. Its faults are acts
(crash, hang, a load that fails), not stubs: whoever drives it sees exactly what a real engine's end looks like.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llama_orch.engines.base import (
    Chunk,
    Completion,
    DecodeStalled,
    EngineTraits,
    Job,
    JobRefused,
    LoadFailed,
    ReplicaSpec,
    WorkerFacts,
    WorkerLost,
    load_failed,
)
from llama_orch.workers.stop_strings import StopStrings

_VERSION = "1"
_SYLLABLES = ("ka", "lo", "mi", "ren", "su", "té", "vor", "ya", "zel", "ño", "日", "ön")


@dataclass(frozen=True, slots=True)
class ServiceModel:
    """How long a simulated worker takes, in seconds."""

    load_s: float = 0.5
    prefill_s_per_token: float = 0.0005
    decode_s_per_token: float = 0.02
    cancel_s: float = 0.0  # from the close of the iterator to the free slot
    mean_tokens: int | None = None  # of an answer; None: every answer runs to its max_tokens


class SimulatedEngine:
    """Launches simulated workers. `service` and `load_error` may be changed at any time: later launches follow.

    `load_error` as a text becomes the exception that a real engine's last words would; an exception is raised as it is.
    """

    def __init__(self, service: ServiceModel = ServiceModel(), load_error: str | LoadFailed | None = None) -> None:
        self.service = service
        self.load_error = load_error
        self.workers: dict[str, SimulatedWorker] = {}  # by replica id, the latest launch of each

    @property
    def traits(self) -> EngineTraits:
        return EngineTraits(
            name="simulated",
            version=_VERSION,
            workloads=("completion",),
            determinism="strict: the same text for the same seed and prompt, always",
            strict_needs_exclusive=False,
            features=("chat", "kv_reuse", "min_p"),
        )

    def refusal(self, model_path: Path) -> str | None:
        """A simulated worker reads no file, so any will do."""
        return None

    async def launch(self, spec: ReplicaSpec) -> SimulatedWorker:
        worker = SimulatedWorker(spec, self.service, self.load_error)
        self.workers[spec.replica_id] = worker
        return worker


class SimulatedWorker:
    """One simulated replica; `crash` and `hang` are what tests do to it."""

    def __init__(self, spec: ReplicaSpec, service: ServiceModel, load_error: str | LoadFailed | None = None) -> None:
        self._spec = spec
        self._service = service
        self._load_error = load_error
        self._end_reason = ""
        self._ended = asyncio.Event()
        self._runs = asyncio.Event()  # cleared: no tokens come
        self._runs.set()
        self._held: dict[int, list[str]] = {}  # the KV: tokens by slot
        self._busy: set[int] = set()

    def crash(self, reason: str = "killed by SIGKILL") -> None:
        """Die now: streams break, `lost` returns."""
        if not self._ended.is_set():
            self._end_reason = reason
            self._ended.set()

    def hang(self) -> None:
        """Produce no token from now on, but stay alive."""
        self._runs.clear()

    def resume(self) -> None:
        """End a hang."""
        self._runs.set()

    async def ready(self) -> WorkerFacts:
        await self._pass(self._service.load_s)
        if self._ended.is_set():
            raise load_failed(f"the worker ended while it loaded the model: {self._end_reason}")
        if self._load_error is not None:
            error = self._load_error if isinstance(self._load_error, LoadFailed) else load_failed(self._load_error)
            self.crash(str(error))
            raise error
        return WorkerFacts(_VERSION, self._spec.slots, self._spec.ctx, load_ms=round(self._service.load_s * 1000))

    async def lost(self) -> str:
        await self._ended.wait()
        return self._end_reason

    async def count_tokens(self, text: str) -> int:
        self._check_alive()
        return len(text.split()) + 1

    async def render_chat(self, messages: list[dict[str, str]]) -> str:
        self._check_alive()
        return "".join(f"<{message['role']}> {message['content']}\n" for message in messages) + "<assistant>"

    async def evict(self, slot: int) -> None:
        self._check_alive()
        self._held.pop(slot, None)

    async def generate(self, job: Job) -> AsyncGenerator[Chunk | Completion, None]:
        self._check_alive()
        prompt = ["<s>", *job.prompt.split()]
        self._check_job(job, len(prompt))
        self._busy.add(job.slot)
        try:
            cached = _common(prompt, self._held.get(job.slot, [])) if job.reuse_kv else 0
            held = self._held[job.slot] = prompt.copy()
            prefill_s = (len(prompt) - cached) * self._service.prefill_s_per_token
            await self._work(prefill_s, job.idle_timeout_s)
            stops = StopStrings(job.sampling.stop)
            words = self._words(job)
            limit = min(job.max_tokens, self._spec.ctx - len(prompt))
            tokens_out, has_ended = 0, False
            while tokens_out < limit and not stops.has_matched and not has_ended:
                await self._work(self._service.decode_s_per_token, job.idle_timeout_s)
                tokens_out += 1
                word = next(words, None)
                has_ended = word is None  # the end-of-text token, which counts but has no text
                if word is not None:
                    held.append(word)
                is_last = has_ended or tokens_out == limit
                text = stops.feed(f" {word}" if word is not None else "")
                yield Chunk(text + (stops.flush() if is_last else ""), 1)
        except GeneratorExit:
            await asyncio.sleep(self._service.cancel_s)
            raise
        finally:
            self._busy.discard(job.slot)
        yield Completion(
            tokens_in=len(prompt),
            tokens_out=tokens_out,
            tokens_cached=cached,
            prefill_ms=prefill_s * 1000,
            decode_ms=tokens_out * self._service.decode_s_per_token * 1000,
            finish_reason="stop" if has_ended or stops.has_matched else "length",
        )

    async def stop(self, grace_s: float) -> None:
        self.crash("exited with code 0")

    def _check_alive(self) -> None:
        if self._ended.is_set():
            raise WorkerLost(self._end_reason)

    def _check_job(self, job: Job, tokens_in: int) -> None:
        if not 0 <= job.slot < self._spec.slots:
            raise JobRefused(f"there is no slot {job.slot}")
        if job.max_tokens < 1:
            raise JobRefused("out of range: max_tokens")
        if tokens_in >= self._spec.ctx:
            raise JobRefused(f"the prompt's {tokens_in} tokens do not fit the context of {self._spec.ctx}")
        if job.slot in self._busy:
            # Not an EngineError: two leases of one slot are a mistake of the service, and must not look like a fault.
            raise RuntimeError(f"slot {job.slot} of {self._spec.replica_id} is leased twice")

    async def _work(self, seconds: float, idle_timeout_s: float) -> None:
        """Be busy for this long; longer while it hangs. Raises WorkerLost or DecodeStalled."""
        if seconds > 0:
            await self._pass(seconds)
        if not self._runs.is_set():
            try:
                async with asyncio.timeout(idle_timeout_s):
                    await _first_of(self._runs, self._ended)
            except TimeoutError as error:
                raise DecodeStalled(f"no token came for {idle_timeout_s:g} s") from error
        self._check_alive()

    async def _pass(self, seconds: float) -> None:
        """Let time pass, up to the worker's end."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ended.wait()

    def _words(self, job: Job) -> Iterator[str]:
        """The answer's words: a function of prompt and seed (of the prompt alone when temperature is 0)."""
        dice = random.Random(f"{job.seed if job.sampling.temperature > 0 else 'greedy'}:{job.prompt}")
        mean = self._service.mean_tokens
        while mean is None or dice.random() >= 1 / mean:
            yield "".join(dice.choices(_SYLLABLES, k=dice.randint(1, 3)))


async def _first_of(*events: asyncio.Event) -> None:
    """Return once any of the events is set."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def _common(tokens: list[str], held: list[str]) -> int:
    """Tokens at the start that the slot holds already; the last one is always evaluated again."""
    pairs = zip(tokens[:-1], held, strict=False)
    return next((index for index, (new, old) in enumerate(pairs) if new != old), min(len(tokens) - 1, len(held)))
