"""An engine without a model: seeded pseudo-words, timed by a service model, in this process.

It waits on the event loop's clock alone, so that it runs at full speed under a virtual-time loop. Its faults are acts
(crash, hang, freeze, a load that is slow or fails, no memory left), not stubs: whoever drives it sees exactly what a
real engine's end looks like. Nothing here is random: all follows from the jobs, the service model and the acts.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncGenerator, Callable, Iterator
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
    Message,
    Offer,
    Reading,
    ReadJob,
    ReplicaSpec,
    WorkerFacts,
    WorkerLost,
    load_failed,
)
from llama_orch.engines.simulated_text import shared_tokens, vector_of
from llama_orch.workers.stop_strings import StopStrings

_VERSION = "1"
_FEATURES = ("chat", "kv_reuse", "min_p")
_SYLLABLES = ("ka", "lo", "mi", "ren", "su", "té", "vor", "ya", "zel", "ño", "日", "ön")
_PROMPT_STEP = 512  # tokens of a prompt between two looks at who else is at work
LOAD_SILENCE_S = 120.0  # as engines.process: a load that says nothing for this long has failed
ANSWER_LIMIT_S = 30.0  # as engines.client: a question that a worker leaves open for this long is a lost worker
NO_MEMORY = "CUDA error: out of memory"


@dataclass(frozen=True, slots=True)
class ServiceModel:
    """How long a simulated worker takes, in seconds.

    A card shares its memory bandwidth. `batch_slowdown`: with n busy slots on the worker everything takes
    1 + batch_slowdown × (n − 1) times as long. `card_slowdown`: for each other busy worker on the same devices it takes
    that part longer again; 1 is fair turns. Both are 0 unless told: then slots and workers do not notice each other.
    A step, such as one token, is paced by who is at work when it begins.
    """

    load_s: float = 0.5
    prefill_s_per_token: float = 0.0005
    decode_s_per_token: float = 0.02
    cancel_s: float = 0.0  # from the cancel to the free slot
    unload_s: float = 0.0  # from the stop to the free memory
    mean_tokens: int | None = None  # of an answer, geometric; None: every answer runs to its max_tokens
    uniform_tokens: tuple[int, int] | None = None  # of an answer, each length of this range alike
    batch_slowdown: float = 0.0
    card_slowdown: float = 0.0
    chunk_tokens: int = 1  # that arrive together, but for the first one: fewer events for the same time


class SimulatedEngine:
    """Launches simulated workers. `service` and `load_error` may be changed at any time: later launches follow.

    `service` may be one for all or depend on the replica (a slower card, a larger model). `on_launch` sees each worker
    before it begins to load, and may act on it. `load_error` as a text becomes the exception that a real engine's last
    words would; an exception is raised as it is.
    """

    def __init__(
        self,
        service: ServiceModel | Callable[[ReplicaSpec], ServiceModel] = ServiceModel(),
        load_error: str | LoadFailed | None = None,
        *,
        strict_needs_exclusive: bool = False,
        on_launch: Callable[[SimulatedWorker], None] | None = None,
    ) -> None:
        self.service = service
        self.load_error = load_error
        self.workers: dict[str, SimulatedWorker] = {}  # by replica id, the latest launch of each
        self._strict_needs_exclusive = strict_needs_exclusive
        self._on_launch = on_launch

    @property
    def traits(self) -> EngineTraits:
        return EngineTraits(
            name="simulated",
            version=_VERSION,
            workloads=("completion", "embedding", "rerank"),
            determinism="strict: the same bytes for the same seed and prompt, always; cost: none",
            strict_needs_exclusive=self._strict_needs_exclusive,
            features=_FEATURES,
        )

    def refusal(self, model_path: Path) -> str | None:
        """A simulated worker reads no file, so any will do."""
        return None

    def offer(self, model_path: Path) -> Offer:
        """All that it can: no file says otherwise."""
        return Offer(self.traits.workloads, _FEATURES)

    async def grammar_refusal(self, grammar: str) -> str | None:
        return "simulated words follow no grammar"

    async def launch(self, spec: ReplicaSpec) -> SimulatedWorker:
        service = self.service(spec) if callable(self.service) else self.service
        worker = SimulatedWorker(spec, service, self.load_error, lambda: self._rivals(spec))
        self.workers[spec.replica_id] = worker
        if self._on_launch is not None:
            self._on_launch(worker)
        return worker

    def _rivals(self, spec: ReplicaSpec) -> int:
        """Other workers that are at work on a device of this one."""
        return sum(
            worker.is_busy and not set(spec.device_uuids).isdisjoint(worker.spec.device_uuids)
            for replica_id, worker in self.workers.items()
            if replica_id != spec.replica_id
        )


class SimulatedWorker:
    """One simulated replica. `crash`, `hang`, `freeze` and the like are what tests do to it."""

    def __init__(
        self,
        spec: ReplicaSpec,
        service: ServiceModel,
        load_error: str | LoadFailed | None = None,
        rivals: Callable[[], int] = lambda: 0,
    ) -> None:
        self.spec = spec
        self._service = service
        self._load_error = load_error
        self._rivals = rivals
        self._load_s = service.load_s
        self._end_reason = ""
        self._ended = asyncio.Event()
        self._runs = asyncio.Event()  # cleared: no tokens come
        self._runs.set()
        self._answers = asyncio.Event()  # cleared: no question is answered
        self._answers.set()
        self._naps: dict[asyncio.Future[None], None] = {}  # of those who let time pass; the end wakes them
        self._held: dict[int, list[str]] = {}  # the KV: tokens by slot
        self._busy: set[int] = set()
        self.is_ready = False

    @property
    def is_alive(self) -> bool:
        """Launched and not ended: it holds its memory."""
        return not self._ended.is_set()

    @property
    def is_busy(self) -> bool:
        return bool(self._busy) and self.is_alive

    # -- acts --------------------------------------------------------------------------------------------------------

    def crash(self, reason: str = "killed by SIGKILL") -> None:
        """Die now: streams break, `lost` returns."""
        if not self._ended.is_set():
            self._end_reason = reason
            self._ended.set()
            for nap in self._naps:
                _wake(nap)

    def run_out_of_memory(self) -> None:
        """Die as llama.cpp does when an allocation fails in the middle of decoding."""
        self.crash(NO_MEMORY)

    def hang(self) -> None:
        """Produce no token from now on and load nothing, but stay alive; questions are still answered."""
        self._runs.clear()

    def freeze(self) -> None:
        """Do nothing at all from now on, but stay alive."""
        self._runs.clear()
        self._answers.clear()

    def resume(self) -> None:
        """End a hang or a freeze."""
        self._runs.set()
        self._answers.set()

    def slow_load(self, more_s: float) -> None:
        """Take this much longer to load; no effect once loaded."""
        self._load_s += more_s

    def fail_load(self, reason: str = NO_MEMORY) -> None:
        """End in LoadFailed instead of getting ready; no effect once loaded."""
        self._load_error = reason

    # -- the protocol ------------------------------------------------------------------------------------------------

    async def ready(self) -> WorkerFacts:
        loop = asyncio.get_running_loop()
        began = loop.time()
        while (rest_s := began + self._load_s - loop.time()) > 0 and self.is_alive:  # `slow_load` may come meanwhile
            await self._pass(rest_s)
        if self._load_s <= 0:
            await self._pass(0)
        if not self._runs.is_set() and not await self._first_of(self._runs, LOAD_SILENCE_S):
            self.crash(f"no sign of life for {LOAD_SILENCE_S:g} s")
        if not self.is_alive:
            raise load_failed(f"the worker ended while it loaded the model: {self._end_reason}")
        if self._load_error is not None:
            error = self._load_error if isinstance(self._load_error, LoadFailed) else load_failed(self._load_error)
            self.crash(str(error))
            raise error
        self.is_ready = True
        return WorkerFacts(_VERSION, self.spec.slots, self.spec.ctx, load_ms=round(self._load_s * 1000))

    async def lost(self) -> str:
        await self._ended.wait()
        return self._end_reason

    async def count_tokens(self, text: str) -> int:
        await self._check_answers()
        return len(text.split()) + 1

    async def render_chat(self, messages: list[Message], tools: list[Message] | None = None) -> str:
        await self._check_answers()
        return "".join(f"<{message['role']}> {message['content']}\n" for message in messages) + "<assistant>"

    async def evict(self, slot: int) -> None:
        await self._check_answers()
        self._held.pop(slot, None)

    async def generate(self, job: Job) -> AsyncGenerator[Chunk | Completion, None]:
        self._check_alive()
        prompt = ["<s>", *job.prompt.split()]
        self._check_job(job, len(prompt))
        self._busy.add(job.slot)
        try:
            cached = shared_tokens(prompt, self._held.get(job.slot, [])) if job.kv_reuse != "none" else 0
            held = self._held[job.slot] = prompt.copy()
            prefill_s = await self._read(len(prompt) - cached, job.idle_timeout_s)
            stops = StopStrings(job.sampling.stop)
            words = self._words(job)
            limit = min(job.max_tokens, self.spec.ctx - len(prompt))
            tokens_out, has_ended, decode_s = 0, False, 0.0
            while tokens_out < limit and not stops.has_matched and not has_ended:
                step = 1 if tokens_out == 0 else min(self._service.chunk_tokens, limit - tokens_out)
                decode_s += await self._work(step * self._service.decode_s_per_token, job.idle_timeout_s)
                text, tokens = "", 0
                while tokens < step and not stops.has_matched and not has_ended:
                    tokens += 1
                    word = next(words, None)
                    has_ended = word is None  # the end-of-text token, which counts but has no text
                    if word is not None:
                        held.append(word)
                    text += stops.feed(f" {word}" if word is not None else "")
                tokens_out += tokens
                is_last = has_ended or tokens_out == limit
                yield Chunk(text + (stops.flush() if is_last else ""), tokens)
        except (GeneratorExit, asyncio.CancelledError):
            if self._service.cancel_s > 0:
                await self._pass(self._service.cancel_s)
            raise
        finally:
            self._busy.discard(job.slot)
        yield Completion(
            tokens_in=len(prompt),
            tokens_out=tokens_out,
            tokens_cached=cached,
            prefill_ms=prefill_s * 1000,
            decode_ms=decode_s * 1000,
            finish_reason="stop" if has_ended or stops.has_matched else "length",
        )

    async def read(self, job: ReadJob) -> Reading:
        """Vectors and scores are functions of the texts alone. A score is the part of the query's words that the
        document has."""
        self._check_alive()
        words = [word for text in (job.query, job.text) if text is not None for word in ("<s>", *text.split())]
        self._check_slot(job.slot)
        if len(words) >= self.spec.ctx:
            raise JobRefused(f"the text's {len(words)} tokens do not fit the context of {self.spec.ctx}")
        self._busy.add(job.slot)
        try:
            took_s = await self._read(len(words), job.idle_timeout_s)
        except asyncio.CancelledError:
            if self._service.cancel_s > 0:
                await self._pass(self._service.cancel_s)
            raise
        finally:
            self._busy.discard(job.slot)
        if job.query is None:
            return Reading(len(words), took_s * 1000, vector=vector_of(job.text))
        asked = set(job.query.split())
        return Reading(len(words), took_s * 1000, score=len(asked & set(job.text.split())) / max(1, len(asked)))

    async def stop(self, grace_s: float) -> None:
        if self._service.unload_s > 0:
            await self._pass(self._service.unload_s)
        self.crash("exited with code 0")

    def _check_alive(self) -> None:
        if self._ended.is_set():
            raise WorkerLost(self._end_reason)

    async def _check_answers(self) -> None:
        self._check_alive()
        if not self._answers.is_set() and not await self._first_of(self._answers, ANSWER_LIMIT_S):
            raise WorkerLost(f"no answer within {ANSWER_LIMIT_S:g} s")
        self._check_alive()

    def _check_job(self, job: Job, tokens_in: int) -> None:
        self._check_slot(job.slot)
        if job.max_tokens < 1:
            raise JobRefused("out of range: max_tokens")
        if tokens_in >= self.spec.ctx:
            raise JobRefused(f"the prompt's {tokens_in} tokens do not fit the context of {self.spec.ctx}")

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.spec.slots:
            raise JobRefused(f"there is no slot {slot}")
        if slot in self._busy:
            # Not an EngineError: two leases of one slot are a mistake of the service, and must not look like a fault.
            raise RuntimeError(f"slot {slot} of {self.spec.replica_id} is leased twice")

    async def _read(self, tokens: int, idle_timeout_s: float) -> float:
        """Evaluate this much of a prompt; returns the seconds that it took."""
        took_s = 0.0
        for start in range(0, tokens, _PROMPT_STEP):
            step = min(_PROMPT_STEP, tokens - start)
            took_s += await self._work(step * self._service.prefill_s_per_token, idle_timeout_s)
        return took_s

    async def _work(self, alone_s: float, idle_timeout_s: float) -> float:
        """Be busy with what takes a lone job this long; returns how long it took beside the others. Longer while it
        hangs. Raises WorkerLost or DecodeStalled."""
        seconds = alone_s * self._pace()
        if seconds > 0:
            await self._pass(seconds)
        if not self._runs.is_set() and self.is_alive and not await self._first_of(self._runs, idle_timeout_s):
            raise DecodeStalled(f"no token came for {idle_timeout_s:g} s")
        self._check_alive()
        return seconds

    def _pace(self) -> float:
        service = self._service
        pace = 1 + service.batch_slowdown * (len(self._busy) - 1)
        return pace * (1 + service.card_slowdown * self._rivals()) if service.card_slowdown else pace

    async def _pass(self, seconds: float) -> None:
        """Let time pass, up to the worker's end. By hand and not with asyncio.timeout, which costs several times as
        much: this is where a simulation spends its time."""
        if self._ended.is_set():
            return
        loop = asyncio.get_running_loop()
        nap: asyncio.Future[None] = loop.create_future()
        alarm = loop.call_later(seconds, _wake, nap)
        self._naps[nap] = None
        try:
            await nap
        finally:
            alarm.cancel()
            del self._naps[nap]

    async def _first_of(self, event: asyncio.Event, seconds: float) -> bool:
        """Wait for the event, or for the worker's end; False when neither came in time."""
        waits = [asyncio.ensure_future(one.wait()) for one in (event, self._ended)]
        try:
            done, _ = await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            return bool(done)
        finally:
            for wait in waits:
                wait.cancel()

    def _words(self, job: Job) -> Iterator[str]:
        """The answer's words: a function of prompt and seed (of the prompt alone when temperature is 0)."""
        dice = random.Random(f"{job.seed if job.sampling.temperature > 0 else 'greedy'}:{job.prompt}")
        mean, bounds = self._service.mean_tokens, self._service.uniform_tokens
        words = itertools.count() if bounds is None else range(dice.randint(*bounds) - 1)  # and the end of the text
        for _ in words:
            if mean is not None and dice.random() < 1 / mean:
                return
            yield "".join(dice.choices(_SYLLABLES, k=dice.randint(1, 3)))


def _wake(nap: asyncio.Future[None]) -> None:
    if not nap.done():
        nap.set_result(None)
