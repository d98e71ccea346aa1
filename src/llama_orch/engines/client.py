"""Our client of llama-server's HTTP dialect over a worker's Unix socket: small, typed, and cheap per token.

One connection per completion, because closing it is how it is canceled. Only the fields of `CompletionBody` ever
reach an engine, each checked against its range: negative or unknown values have been memory errors upstream.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from llama_orch.engines.base import (
    DecodeStalled,
    EngineBusy,
    EngineError,
    Job,
    JobRefused,
    Message,
    WorkerLost,
    is_out_of_memory,
)
from llama_orch.engines.exchange import Exchange, Kept
from llama_orch.engines.idle_watch import IdleWatch
from llama_orch.engines.seeds import map_seed

_LINE_BYTES_MAX = 1 << 20  # one event; an honest one is some hundred bytes
_REQUEST_TIMEOUT_S = 30.0
_KEPT_MAX = 2  # each takes a thread of the worker's, which has six more than its slots need
_INT32_MAX = 2**31 - 1
_STOP_STRINGS_MAX = 64
_LOGPROBS_MAX = 20

T = TypeVar("T")


class Timings(msgspec.Struct, frozen=True):
    """The engine's own measurements of one run."""

    cache_n: int = 0
    prompt_n: int = 0
    prompt_ms: float | None = None
    predicted_n: int = 0
    predicted_ms: float | None = None


class Fault(msgspec.Struct, frozen=True):
    """An error as the dialect words it, in a body or in an event."""

    message: str = ""
    code: int = 500
    type: str = ""


class FaultBody(msgspec.Struct, frozen=True):
    error: Fault = Fault()


class TokenChance(msgspec.Struct, frozen=True):
    """A token that was likely at a place."""

    bytes: list[int] = []
    logprob: float = 0.0


class TokenChances(TokenChance, frozen=True):
    """The token that was taken. `bytes` are of the text that the event gives out, not of the token."""

    top_logprobs: list[TokenChance] = []


class CompletionEvent(msgspec.Struct, frozen=True):
    """One event of a completion's stream. `tokens_predicted` counts from the start of the run: one event may cover
    several tokens, because the engine holds back text that ends inside a character or looks like a stop string."""

    content: str = ""
    stop: bool = False
    tokens_predicted: int = 0
    tokens_evaluated: int = 0
    stop_type: str = ""
    timings: Timings | None = None
    error: Fault | None = None
    completion_probabilities: list[TokenChances] = []


class CompletionBody(msgspec.Struct, frozen=True):
    """Everything that a completion may ask of an engine; the names are the dialect's."""

    prompt: str | list[int]
    n_predict: int
    seed: int
    id_slot: int
    cache_prompt: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    stop: tuple[str, ...]
    grammar: str = ""  # none
    # Of our own dialect (workers/ctransformers.py): take over only what a run from the first token would also have.
    cache_exact: bool | msgspec.UnsetType = msgspec.UNSET
    n_probs: int | msgspec.UnsetType = msgspec.UNSET
    preserved_tokens: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    stream: bool = True
    # Progress events during prefill make a long prompt different from a hang.
    return_progress: bool = True
    # Without this the last event repeats the whole prompt and every setting.
    response_fields: tuple[str, ...] = (
        "content", "stop", "tokens_predicted", "tokens_evaluated", "stop_type", "timings", "completion_probabilities",
    )  # fmt: skip
    samplers: tuple[str, ...] = ("penalties", "top_k", "top_p", "min_p", "temperature")


class SlotState(msgspec.Struct, frozen=True):
    id: int
    is_processing: bool


class GenerationSettings(msgspec.Struct, frozen=True):
    n_ctx: int


class Props(msgspec.Struct, frozen=True):
    """What we read of /props."""

    total_slots: int
    default_generation_settings: GenerationSettings
    build_info: str = ""


class _Tokens(msgspec.Struct, frozen=True):
    tokens: list[int]


class _Prompt(msgspec.Struct, frozen=True):
    prompt: str


_decode_event = msgspec.json.Decoder(CompletionEvent).decode
_decode_fault = msgspec.json.Decoder(FaultBody).decode
_encode = msgspec.json.Encoder().encode


class LlamaClient:
    """Speaks to one worker. Safe for concurrent use."""

    def __init__(self, socket_path: Path, api_key: str) -> None:
        self._socket_path = str(socket_path)
        self._api_key = api_key
        self._kept = Kept(_KEPT_MAX)

    async def props(self) -> Props:
        """What the engine granted: slots, and tokens of context per slot."""
        return await self._ask("GET", "/props", None, Props)

    async def slots(self) -> list[SlotState]:
        """Which slots are decoding now."""
        return await self._ask("GET", "/slots", None, list[SlotState])

    async def count_tokens(self, text: str) -> int:
        """Tokens of `text` with the start-of-text token."""
        return len(await self.tokenize(text))

    async def tokenize(self, text: str) -> list[int]:
        """The tokens that the engine makes of a prompt."""
        return (await self._ask("POST", "/tokenize", {"content": text, "add_special": True}, _Tokens)).tokens

    async def apply_template(self, messages: list[Message], tools: list[Message] | None = None) -> str:
        """The prompt that the model's chat template makes of `messages` and `tools`."""
        # With another choice the engine would also make a grammar of its own of the tools' schemas.
        body = {"messages": messages} | ({} if tools is None else {"tools": tools, "tool_choice": "none"})
        return (await self._ask("POST", "/apply-template", body, _Prompt)).prompt

    async def erase(self, slot: int) -> None:
        """Forget what an idle slot holds."""
        await self.request("POST", f"/slots/{slot}?action=erase", {})

    async def request(
        self, method: str, path: str, body: object = None, limit_s: float | None = _REQUEST_TIMEOUT_S
    ) -> bytes:
        """One request, the whole body of its answer. Raises JobRefused for 4xx (EngineBusy where memory
        was lacking) and WorkerLost for the rest."""
        try:
            async with asyncio.timeout(limit_s):
                http_status, answer = await self._exchanged(method, path, _to_json(body))
        except TimeoutError as error:
            raise WorkerLost(f"{method} {path} had no answer within {limit_s} s") from error
        if http_status != 200:
            raise _refusal(http_status, answer)
        return answer

    async def _exchanged(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body. To connect costs more than to ask, so connections are kept; one that the worker has closed
        meanwhile, as it may when nothing was asked for some seconds, is not its loss."""
        while True:
            kept = self._kept.take()
            exchange = Exchange(self._socket_path, kept)
            try:
                await exchange.send(method, path, self._api_key, body, keep=True)
                answer = await exchange.read_all()
            except WorkerLost:
                exchange.close()
                if kept is None or exchange.http_status:
                    raise
            except BaseException:
                exchange.close()
                raise
            else:
                if (left := exchange.left()) is not None:
                    self._kept.put(left)
                return exchange.http_status, answer

    def complete(self, body: CompletionBody, idle_timeout_s: float) -> CompletionStream:
        """A completion's stream, not yet sent."""
        return CompletionStream(self._socket_path, self._api_key, body, idle_timeout_s)

    async def _ask(self, method: str, path: str, body: object, kind: type[T]) -> T:
        answer = await self.request(method, path, body)
        try:
            return msgspec.json.decode(answer, type=kind)
        except msgspec.DecodeError as error:
            raise WorkerLost(f"{method} {path} was answered with nonsense") from error


class CompletionStream:
    """One run's events. Iterate `events` to its end, or call `close` to cancel."""

    def __init__(self, socket_path: str, api_key: str, body: CompletionBody, idle_timeout_s: float) -> None:
        self._exchange = Exchange(socket_path)
        self._api_key = api_key
        self._body = body
        self._idle = IdleWatch(idle_timeout_s, self._exchange.close)

    async def events(self) -> AsyncGenerator[CompletionEvent, None]:
        """The events of `batches`, one by one."""
        async with aclosing(self.batches()) as batches:
            async for batch in batches:
                for event in batch:
                    yield event

    async def batches(self) -> AsyncGenerator[list[CompletionEvent], None]:
        """Events up to the terminal one (`stop`), as many at a time as have come. Raises JobRefused, DecodeStalled, or
        WorkerLost when the stream ends without its terminal event. The caller closes the stream, so that a cancel may
        still look at it."""
        try:
            self._idle.start()
            await self._exchange.send("POST", "/completion", self._api_key, _to_json(self._body))
            if await self._exchange.read_head() != 200:
                raise _refusal(self._exchange.http_status, await self._exchange.read_all())
            tail = b""
            while data := await self._next_data():
                *lines, tail = (tail + data).split(b"\n")
                if len(tail) > _LINE_BYTES_MAX:
                    raise WorkerLost("the worker sent a line longer than any honest one")
                events, trouble = _events_of(lines)
                if events:
                    self._idle.touch()
                    yield events
                    if events[-1].stop:
                        return
                if trouble is not None:
                    raise trouble
            raise WorkerLost("the stream ended without its terminal event")
        except WorkerLost as error:
            if self._idle.has_fired:
                raise DecodeStalled(f"no token came for {self._idle.seconds:g} s") from error
            raise
        finally:
            self._idle.stop()

    async def _next_data(self) -> bytes:
        self._idle.is_waiting = True
        try:
            return await self._exchange.read_some()
        finally:
            self._idle.is_waiting = False

    async def has_started(self, within_s: float) -> bool:
        """Whether the engine began to answer, waiting for it if need be. A request that is canceled before may still
        sit in the engine's queue, where /slots does not show it."""
        with suppress(TimeoutError, EngineError):
            async with asyncio.timeout(within_s):
                await self._exchange.read_head()
        return self._exchange.http_status != 0

    def close(self) -> None:
        """Drop the connection. Idempotent."""
        self._idle.stop()
        self._exchange.close()


def completion_body(job: Job, slots: int) -> CompletionBody:
    """The job in the dialect's words. Raises JobRefused for a value out of its range."""
    sampling = job.sampling
    checks = {
        "max_tokens": 1 <= job.max_tokens <= _INT32_MAX,
        "seed": job.seed >= 0,
        "slot": 0 <= job.slot < slots,  # llama.cpp takes a higher one modulo the slots
        "temperature": 0.0 <= sampling.temperature <= 100.0,
        "top_k": 0 <= sampling.top_k <= _INT32_MAX,
        "top_p": 0.0 <= sampling.top_p <= 1.0,
        "min_p": 0.0 <= sampling.min_p <= 1.0,
        "repeat_penalty": 0.0 < sampling.repeat_penalty <= 100.0,
        "stop": len(sampling.stop) <= _STOP_STRINGS_MAX and all(sampling.stop),
        "logprobs": job.logprobs is None or 0 <= job.logprobs <= _LOGPROBS_MAX,
    }
    wrong = [name for name, is_in_range in checks.items() if not is_in_range]
    if wrong:
        raise JobRefused(f"out of range: {', '.join(wrong)}")
    return CompletionBody(
        prompt=job.prompt,
        n_predict=job.max_tokens,
        seed=map_seed(job.seed),
        id_slot=job.slot,
        cache_prompt=job.kv_reuse != "none",
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repeat_penalty=sampling.repeat_penalty,
        stop=sampling.stop,
        grammar=sampling.grammar or "",
        n_probs=msgspec.UNSET
        if job.logprobs is None
        else max(1, job.logprobs),  # of 0 it would not tell the token's own
        preserved_tokens=job.kept_tokens or msgspec.UNSET,
    )


def _events_of(lines: list[bytes]) -> tuple[list[CompletionEvent], EngineError | None]:
    """Those of the lines up to the terminal one, and what is wrong with the line behind them."""
    events: list[CompletionEvent] = []
    for line in lines:
        if not line:  # every other one
            continue
        try:
            event = _event_of(line)
        except EngineError as error:
            return events, error
        if event is not None:
            events.append(event)
            if event.stop:
                break
    return events, None


def _event_of(line: bytes) -> CompletionEvent | None:
    """The event on one line of the stream; None for blank lines, comments and the closing [DONE]."""
    if line.startswith(b"data: "):
        payload = line[6:].rstrip(b"\r")
        if payload == b"[DONE]":
            return None
        try:
            event = _decode_event(payload)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise WorkerLost("the worker sent an event that is not one") from error
        if event.error is not None:
            raise _as_exception(event.error)
        return event
    if line.startswith(b"error: "):  # how older builds word a failure in mid-stream
        raise _refusal(500, b'{"error":' + line[7:] + b"}")
    return None


def _to_json(body: object) -> bytes:
    if body is None:
        return b""
    try:
        return _encode(body)
    except UnicodeEncodeError as error:
        raise JobRefused("the text holds a lone surrogate, which is not valid Unicode") from error


def _refusal(http_status: int, body: bytes) -> EngineError:
    """What a failed answer means."""
    try:
        fault = _decode_fault(body).error
    except msgspec.DecodeError:
        fault = Fault(message=f"HTTP {http_status}", code=http_status)
    return _as_exception(fault)


def _as_exception(fault: Fault) -> EngineError:
    """A fault of the job (4xx, or a context that ran full in mid-stream) leaves the worker sound, others do not."""
    if 400 <= fault.code < 500 and fault.code != 401:
        if is_out_of_memory(fault.message):  # how llama.cpp answers when it cannot hold the request itself
            return EngineBusy(f"the worker has no memory for the request: {fault.message}")
        return JobRefused(fault.message)
    if any(words in fault.message.lower() for words in ("context size", "too large to process")):
        return JobRefused(fault.message)
    return WorkerLost(f"the engine failed: {fault.message}")
