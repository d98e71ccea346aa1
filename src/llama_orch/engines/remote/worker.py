"""One server with one model, as a replica: its health, its jobs, and what is tried again.

A run that breaks before its first token is tried again on the same server, which may have lost one of several replicas
of its own; one that breaks later is over, for its client has read a part of it (HP-REM-4).
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from typing import TypeVar

import msgspec

from llama_orch.contract.config import OpenaiServerSettings
from llama_orch.engines.base import (
    Chunk,
    Completion,
    EngineBusy,
    Job,
    JobRefused,
    Message,
    Reading,
    ReadJob,
    RunLost,
    RunStalled,
    WorkerFacts,
    WorkerLost,
)
from llama_orch.engines.remote import dialect
from llama_orch.engines.remote.client import Broke, Busy, RemoteClient, fault_of
from llama_orch.engines.remote.dialect import DONE, Event, Kind, Nonsense, Usage, encode, read
from llama_orch.engines.remote.discovery import Found, discover
from llama_orch.engines.remote.throttle import StillBusy, Throttle

log = logging.getLogger("llama_orch.remote")

VERSION = "v1"  # of the API; what serves it may change at any time
RETRY_PAUSES_S = (0.2, 0.5, 1.0)  # before each further try of a run that broke before its first token
FAILURES_MAX = 2  # looks at its health in a row; the second one soon
SECOND_LOOK_S = 0.5
COUNT_LIMIT_S = 10.0
EVENTS_SPARE = 64  # beside those with a token: the role, the usage, keep-alives

T = TypeVar("T")


class _Tokens(msgspec.Struct):
    tokens: list[int] = []  # llama-server
    count: int | None = None  # vLLM


class _Prompt(msgspec.Struct):
    prompt: str


class _Embedding(msgspec.Struct):
    embedding: list[float]


class _Embeddings(msgspec.Struct):
    data: list[_Embedding]
    usage: Usage | None = None


_tokens = msgspec.json.Decoder(_Tokens).decode
_prompt = msgspec.json.Decoder(_Prompt).decode
_embeddings = msgspec.json.Decoder(_Embeddings).decode


class RemoteWorker:
    """See base.Worker."""

    def __init__(self, client: RemoteClient, server: OpenaiServerSettings, model: str) -> None:
        self._client = client
        self._server = server
        self._model = model
        self._look_s = server.connect_timeout_ms / 1000
        self._found: Found | None = None
        self._throttle = Throttle(1)
        self._look_now = asyncio.Event()

    # -- life --------------------------------------------------------------------------------------------------------

    async def ready(self) -> WorkerFacts:
        began = asyncio.get_running_loop().time()
        found = self._found = await discover(self._client, self._server, self._model, self._look_s)
        self._throttle = Throttle(found.slots)
        took_ms = round((asyncio.get_running_loop().time() - began) * 1000)
        return WorkerFacts(VERSION, found.slots, found.ctx, load_ms=took_ms, offer=found.offer)

    async def lost(self) -> str:
        """Look after its health until it has none."""
        failures, reason = 0, ""
        while failures < FAILURES_MAX:
            pause_s = self._server.health_interval_ms / 1000
            with suppress(TimeoutError):
                async with asyncio.timeout(min(pause_s, SECOND_LOOK_S) if failures else pause_s):
                    await self._look_now.wait()
            self._look_now.clear()
            reason = await self._illness()
            failures = failures + 1 if reason else 0
        return f"server {self._server.name} is away: {reason}"

    async def _illness(self) -> str:
        """What is wrong with it now; empty where nothing is. One that is busy is well."""
        url = self._known.health_url
        try:
            status, _ = await self._client.ask("GET", url, limit_s=self._look_s)
        except (Broke, WorkerLost) as error:
            return str(error)
        is_busy = status == 429 or (status == 503 and url.endswith("/models"))
        return (
            ""
            if is_busy or status in (200, 204)
            else f"{self._client.name} answers {status} when it is asked how it is"
        )

    async def stop(self, grace_s: float) -> None:
        """Nothing of it is here."""

    async def evict(self, slot: int) -> None:
        """What it keeps of a conversation is its own."""

    @property
    def _known(self) -> Found:
        if self._found is None:
            raise WorkerLost("the server was not asked yet")
        return self._found

    # -- counting ----------------------------------------------------------------------------------------------------

    async def count_tokens(self, text: str) -> int:
        match self._known.kind:
            case Kind.LLAMACPP:
                body: dict[str, object] = {"content": text, "add_special": True}
            case Kind.VLLM:
                body = {"model": self._model, "prompt": text}
            case _:
                return dialect.estimated_tokens(text)
        found = await self._told("/tokenize", body, _tokens, bytes_max=32 * len(text) + (1 << 16))
        count = None if found is None else len(found.tokens) if found.count is None else found.count
        return dialect.estimated_tokens(text) if count is None or count < 0 else count

    async def render_chat(self, messages: list[Message], tools: list[Message] | None = None) -> str:
        """For counting; what is sent are the messages."""
        if self._known.kind is Kind.LLAMACPP:
            found = await self._told("/apply-template", {"messages": messages}, _prompt)
            if found is not None:
                return found.prompt
        return dialect.as_text(messages)

    async def _told(self, path: str, body: object, decode: Callable[[bytes], T], *, bytes_max: int = 0) -> T | None:
        """What the server says, where it can be asked and answers."""
        url = self._client.root_url + path
        try:
            status, answer = await self._client.ask(
                "POST", url, encode(body), limit_s=COUNT_LIMIT_S, bytes_max=bytes_max
            )
            return read(answer, decode) if status == 200 else None
        except (Broke, Nonsense):
            return None

    # -- jobs --------------------------------------------------------------------------------------------------------

    async def generate(self, job: Job) -> AsyncGenerator[Chunk | Completion, None]:
        path, body = dialect.request_of(job, self._model, self._known.kind)
        tries = _Tries(self)
        has_begun = False
        while True:
            await tries.begin()
            try:
                async with aclosing(self._run(job, path, body)) as items:
                    async for item in items:
                        has_begun = True
                        yield item
                self._throttle.served()
                return
            except Busy as error:
                tries.was_busy(error)
            except Broke as error:
                self._look_now.set()
                await tries.broke(error, may_retry=not has_begun)
            finally:
                tries.end()

    async def _run(self, job: Job, path: str, body: bytes) -> AsyncGenerator[Chunk | Completion, None]:
        """One try."""
        loop = asyncio.get_running_loop()
        run = _Run(self._client, job, began=loop.time())
        events = self._client.events(path, body, tokens_max=job.max_tokens, idle_s=job.idle_timeout_s)
        async with aclosing(events):
            try:
                async for event in events:
                    if (chunk := run.take(event, loop.time())) is not None:
                        yield chunk
                    if run.is_over:
                        break
            except (Broke, RunStalled):
                if not run.has_finished:  # else only the farewell is missing
                    raise
        completion, missed = run.end(loop.time())
        if missed:
            yield Chunk("", missed)
        yield completion

    async def read(self, job: ReadJob) -> Reading:
        """One text's vector, of length 1."""
        if job.query is not None:
            raise JobRefused("a server of this API does not rank")
        body = encode({"model": self._model, "input": job.text, "encoding_format": "float"})
        tries, loop = _Tries(self), asyncio.get_running_loop()
        began = loop.time()
        while True:
            await tries.begin()
            tried_at = loop.time()
            try:
                url = f"{self._client.base_url}/embeddings"
                answer = await self._client.demand(url, body, limit_s=job.idle_timeout_s)
                reading = self._reading(answer, job.text, loop.time() - began)
                self._throttle.served()
                return reading
            except Busy as error:
                tries.was_busy(error)
            except Broke as error:
                self._look_now.set()
                if loop.time() - tried_at >= job.idle_timeout_s:  # too late to try again
                    raise RunStalled(str(error)) from error
                await tries.broke(error, may_retry=True)
            finally:
                tries.end()

    def _reading(self, answer: bytes, text: str, took_s: float) -> Reading:
        try:
            found = read(answer, _embeddings)
            (vector,) = (one.embedding for one in found.data)
        except (Nonsense, ValueError) as error:
            raise Broke(f"{self._client.name} sent no vector") from error
        length = math.hypot(*vector)
        if not (vector and length > 0 and math.isfinite(length)):
            raise Broke(f"{self._client.name} sent a vector without a direction")
        usage = found.usage if found.usage is not None and found.usage.is_sane else None
        tokens = dialect.estimated_tokens(text) if usage is None else usage.prompt_tokens
        return Reading(tokens, took_s * 1000, vector=tuple(one / length for one in vector))


class _Tries:
    """The tries of one job: when the next may begin, and when there is none."""

    def __init__(self, worker: RemoteWorker) -> None:
        self._throttle = worker._throttle
        self._busy_s = worker._server.busy_timeout_ms / 1000
        self._busy_until = math.inf
        self._busy_reason = ""
        self._broken = 0
        self._is_in = False

    async def begin(self) -> None:
        try:
            await self._throttle.enter(self._busy_until)
        except StillBusy:
            raise EngineBusy(f"{self._busy_reason}; so it has been for {self._busy_s:g} s") from None
        self._is_in = True

    def end(self) -> None:
        if self._is_in:
            self._is_in = False
            self._throttle.leave()

    def was_busy(self, error: Busy) -> None:
        log.info("%s; no more is asked for %.1f s", error, error.retry_after_s)
        self._throttle.refused(error.retry_after_s)
        now = asyncio.get_running_loop().time()
        self._busy_until, self._busy_reason = min(self._busy_until, now + self._busy_s), str(error)

    async def broke(self, error: Broke, *, may_retry: bool) -> None:
        """Return when it may be tried again; else RunLost."""
        if not may_retry or self._broken == len(RETRY_PAUSES_S):
            tried = f" ({self._broken + 1} tries)" if self._broken else ""
            raise RunLost(f"{error}{tried}") from error
        log.warning("%s; it had no token yet and is tried again", error)
        self.end()
        await asyncio.sleep(RETRY_PAUSES_S[self._broken])
        self._broken += 1


class _Run:
    """What has come of one try."""

    def __init__(self, client: RemoteClient, job: Job, *, began: float) -> None:
        self.is_over = False
        self._client = client
        self._job = job
        self._began = self._first = began
        self._events = self._tokens = 0
        self._finish: str | None = None
        self._usage: Usage | None = None

    @property
    def has_finished(self) -> bool:
        """The model has; what may follow are figures."""
        return self._finish is not None

    def take(self, event: Event, now: float) -> Chunk | None:
        """The text of an event, if it has any. Raises Broke and JobRefused."""
        if event is DONE:
            self.is_over = True
            return None
        self._events += 1
        if bytes(event.error) not in (b"", b"null"):
            raise self._failure(bytes(event.error))
        if self._events > self._job.max_tokens + EVENTS_SPARE:
            raise Broke(f"{self._client.name} sends more than the {self._job.max_tokens} tokens that were asked for")
        if event.usage is not None and event.usage.is_sane:
            self._usage = event.usage
        self._finish = event.finish_reason or self._finish
        if not event.has_token:
            return None
        if not self._tokens:
            self._first = now
        self._tokens += 1
        return Chunk(event.text, 1)

    def _failure(self, error: bytes) -> Exception:
        reason = f"{self._client.name} failed: {self._client.said(fault_of(error)) or 'it does not say why'}"
        code = code_of(error) or 500
        return JobRefused(reason) if 400 <= code < 500 and code not in (408, 429) else Broke(reason)

    def end(self, now: float) -> tuple[Completion, int]:
        """What it comes to, and how many tokens came without an event of their own."""
        if self._finish is None and not self.is_over:
            raise Broke(f"{self._client.name} ended the stream in the middle of an answer")
        usage, counted = self._usage, self._tokens
        told = None if usage is None else usage.completion_tokens
        tokens_out = counted if told is None else told
        text = self._job.prompt
        completion = Completion(
            tokens_in=dialect.estimated_tokens(text) if usage is None else usage.prompt_tokens,
            tokens_out=tokens_out,
            tokens_cached=0 if usage is None else usage.cached,
            prefill_ms=(self._first - self._began) * 1000,
            decode_ms=(now - self._first) * 1000,
            finish_reason="length" if self._finish == "length" else "stop",
        )
        return completion, max(0, tokens_out - counted)


class _Code(msgspec.Struct):
    code: int | None = None


_code = msgspec.json.Decoder(_Code).decode


def code_of(error: bytes) -> int | None:
    """The status that an error within a stream has."""
    try:
        return read(error, _code).code
    except Nonsense:
        return None
