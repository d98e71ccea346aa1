"""OpenAI's API as its servers speak it: what a job asks of them, and what their answers and streams say.

Only fields that the kind of server is known to take are sent; what they answer is read as what strangers send.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import TypeVar

import msgspec

from llama_orch.engines.base import Job, JobRefused, Message, Offer
from llama_orch.engines.seeds import map_seed

LINE_BYTES_MAX = 1 << 20  # of one event; an honest one is some hundred bytes
_COUNT_MAX = 2**40

T = TypeVar("T")


class Nonsense(Exception):
    """What came is not what the API says. The text holds nothing of it."""


class Kind(StrEnum):
    """Servers that tell what they are, by `owned_by` of their models; any other is only known to speak the API."""

    LLAMACPP = "llamacpp"
    VLLM = "vllm"
    SGLANG = "sglang"
    OTHER = "other"

    @property
    def is_known(self) -> bool:
        return self is not Kind.OTHER


def kind_of(owned_by: str) -> Kind:
    return Kind(owned_by) if owned_by in set(Kind) else Kind.OTHER


def offer_of(workload: str, kind: Kind, json_schema: bool | None) -> Offer:
    """What may be asked of a server of this kind. `json_schema`: what the configuration says of it."""
    if workload == "embedding":
        return Offer(("embedding",), lacks=("kv_hint",))
    features = ["chat"]
    if kind.is_known if json_schema is None else json_schema:
        features.append("json_schema")
    if kind is Kind.LLAMACPP:
        features.append("grammar")
    if kind.is_known:
        return Offer(("completion",), (*features, "min_p"), lacks=("kv_hint",))
    return Offer(("completion",), tuple(features), lacks=("kv_hint", "sampling.top_k", "sampling.repeat_penalty"))


# -- what is sent ------------------------------------------------------------------------------------------------------


def request_of(job: Job, model: str, kind: Kind) -> tuple[str, bytes]:
    """The path below the base URL, and the body."""
    sampling = job.sampling
    body: dict[str, object] = {
        "model": model,
        "max_tokens": job.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": map_seed(job.seed),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if kind.is_known:
        has_own_words = kind is Kind.LLAMACPP
        body["top_k"] = sampling.top_k if sampling.top_k or has_own_words else -1  # theirs for none
        body["min_p"] = sampling.min_p
        body["repeat_penalty" if has_own_words else "repetition_penalty"] = sampling.repeat_penalty
    if kind is Kind.LLAMACPP and sampling.grammar is not None:
        body["grammar"] = sampling.grammar  # its builds differ in what they make of a schema
    elif sampling.json_schema is not None:
        named = {"name": "answer", "schema": sampling.json_schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": named}
    if job.messages:
        return "/chat/completions", encode(body | {"messages": [dict(message) for message in job.messages]})
    return "/completions", encode(body | {"prompt": job.prompt})


def encode(body: object) -> bytes:
    try:
        return msgspec.json.encode(body)
    except UnicodeEncodeError as error:
        raise JobRefused("the text holds a lone surrogate, which is not valid Unicode") from error


def as_text(messages: list[Message]) -> str:
    """About what a template makes of a conversation: for counting only, the server has its own."""
    turns = [f"<|{message['role']}|>\n{message['content']}\n" for message in messages]
    return "".join(turns) + "<|assistant|>\n"


def estimated_tokens(text: str) -> int:
    """Tokens of a text that nobody can count: more than ordinary text has (a token covers 3 to 4 bytes of English or
    of code), and fewer than the most that there could be (one a byte)."""
    return math.ceil(len(text.encode(errors="replace")) / 2) + 8


# -- what comes back ---------------------------------------------------------------------------------------------------


class _Cached(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = None
    prompt_tokens_details: _Cached | None = None

    @property
    def cached(self) -> int:
        details = self.prompt_tokens_details
        return 0 if details is None else details.cached_tokens or 0

    @property
    def is_sane(self) -> bool:
        counts = (self.prompt_tokens, self.completion_tokens or 0, self.cached)
        return all(0 <= count <= _COUNT_MAX for count in counts)


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None  # counts, and is no part of the answer
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class Event(msgspec.Struct):
    """One event of a stream, chats and completions alike."""

    choices: list[_Choice] = []
    usage: Usage | None = None
    error: msgspec.Raw = msgspec.Raw()

    @property
    def text(self) -> str:
        if not self.choices:
            return ""
        first = self.choices[0]
        return first.text or (first.delta.content if first.delta is not None else None) or ""

    @property
    def has_token(self) -> bool:
        if not self.choices or (delta := self.choices[0].delta) is None:
            return bool(self.text)
        return bool(delta.content or delta.reasoning_content or delta.reasoning)

    @property
    def finish_reason(self) -> str | None:
        return self.choices[0].finish_reason if self.choices else None


DONE = Event()  # the closing [DONE]

_decode_event = msgspec.json.Decoder(Event).decode


class Lines:
    """Cuts a stream into events. `feed` with each piece as it comes."""

    def __init__(self) -> None:
        self._tail = bytearray()

    def feed(self, data: bytes) -> Iterator[Event]:
        """The events that are whole now. Raises Nonsense."""
        *ends, rest = data.split(b"\n")
        for end in ends:
            line, self._tail = bytes(self._tail) + end, bytearray()
            if line.startswith(b"data:"):
                payload = line[5:].strip()
                yield DONE if payload == b"[DONE]" else read(payload, _decode_event)
        self._tail += rest  # a line may come byte by byte: it is put together once
        if len(self._tail) > LINE_BYTES_MAX:
            raise Nonsense("a line longer than any honest one")


def read(payload: bytes, decode: Callable[[bytes], T]) -> T:
    """What the payload says; Nonsense where it is none of that."""
    try:
        return decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Nonsense("an answer that is not what the API says") from error
