"""What an engine is to the rest of the service: launch a worker, wait until it is ready, stream from it, stop it.

An *engine* is an adapter kind (llamacpp, ctransformers, simulated). A *worker* is one running replica of one model. The
runtime drives workers through the protocols below and learns of trouble through the exceptions below; nothing else of
an engine is visible outside this package.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "length"]
# What a job may take over of the KV that its slot holds: nothing; as much as leaves its bytes as they would be without;
# or all that matches.
KvReuse = Literal["none", "exact", "any"]
Message = Mapping[str, Any]  # an object of JSON


class EngineError(Exception):
    """Base of what an engine raises. The text is for people and never holds a prompt or a key."""


class LoadFailed(EngineError):
    """The worker could not load its model (bad file, unsupported architecture, no memory, stalled)."""


class OutOfMemory(LoadFailed):
    """The device had no room for what the model needs: another try may work once something else has left it."""


class WorkerLost(EngineError):
    """The worker died, broke its connection or answered nonsense while it was needed."""


class JobRefused(EngineError):
    """The engine refused this one job (for example a prompt over the context); the worker is still sound."""


class EngineBusy(EngineError):
    """This machine has nothing left for one more request (descriptors, buffers); the worker is still sound."""


class RunLost(EngineError):
    """This one run broke off and cannot go on; of the worker it says nothing. `lost` tells if that is gone as well."""


class RunStalled(RunLost):
    """The same because no token came for longer than the job's idle limit."""


class DecodeStalled(EngineError):
    """No token came for longer than the job's idle limit; the worker must be replaced."""


# How libraries word a failed allocation: llama.cpp on cards and on a CPU, cuBLAS and Vulkan below it, C++, Python and
# the system; the last one is ctransformers', whose buffer has no words for it.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|std::bad_alloc|MemoryError|[Cc]annot allocate memory|insufficient memory|ErrorOutOf\w*Memory"
    r"|(?:failed|unable) to allocate (?:\S+ ){0,4}(?:buffers?|memory|graph)\b"
    r"|failed to allocate +[\d.]+ (?:MB|MiB|bytes)"
    r"|alloc_buffer: allocating .* failed"
    r"|[Mm]emory allocation of (?:size )?\d+ (?:bytes )?failed"
    r"|CUBLAS_STATUS_ALLOC_FAILED|the resource allocation failed"
    r"|GGML_ASSERT: \S*llama\.cpp:\d+: data$"
)
# Allocations that llama.cpp can do without.
_SPARED = re.compile(r"pinned memory|prompt cache|async uploads")


def is_out_of_memory(reason: str) -> bool:
    """Whether a reason (of a failed load, of a lost worker, or one line of an engine's log) tells of a lack of memory.

    A process that the kernel killed for memory's sake says nothing, and so is none: its reason is only SIGKILL.
    """
    return bool(_OUT_OF_MEMORY.search(reason)) and not _SPARED.search(reason)


def load_failed(reason: str) -> LoadFailed:
    """The exception for a load that failed for this reason."""
    return OutOfMemory(reason) if is_out_of_memory(reason) else LoadFailed(reason)


@dataclass(frozen=True, slots=True)
class EngineTraits:
    """What is true of an engine before any model is loaded; published in capabilities."""

    name: str
    version: str
    workloads: tuple[str, ...]
    determinism: str  # one sentence for capabilities: what `strict` guarantees and at what cost
    max_slots: int | None = None  # sequences per worker that the engine can run, None: no limit of its own
    strict_needs_exclusive: bool = True  # a strict task must have the whole replica (HP-DET-1)
    features: tuple[str, ...] = ()  # of: chat, grammar, json_schema, kv_reuse, logprobs, min_p, tools
    can_be_strict: bool = True  # else a task that asks for `strict` is refused
    is_remote: bool = False  # its replicas take nothing of this machine, and its models are no files here


@dataclass(frozen=True, slots=True)
class Offer:
    """What an engine does with one model: some of its traits' workloads and features."""

    workloads: tuple[str, ...]
    features: tuple[str, ...] = ()
    reads_whole_ctx: bool = False  # a text to read may fill the context; else one token has to stay free
    tool_syntax: str | None = None  # of core.tool_syntax.SYNTAXES, where the feature `tools` is
    lacks: tuple[str, ...] = ()  # of kv_hint, sampling.top_k, sampling.repeat_penalty: what a task may not ask for


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """One worker to launch: one model on one device mask. `model_path` is None of a model elsewhere, which its
    reference names; its slots and context are then what the server has."""

    replica_id: str
    pool_id: str
    model_path: Path | None
    slots: int
    ctx: int  # tokens per slot
    backend: Literal["cuda", "cpu", "simulated", "remote"] = "cpu"
    device_uuids: tuple[str, ...] = ()  # CUDA_VISIBLE_DEVICES; empty: no GPU is visible to the worker
    threads: int = 1
    tensor_split: tuple[float, ...] = ()
    model: str = ""  # the reference

    @property
    def file(self) -> Path:
        """The model's file, of an engine that loads files."""
        if self.model_path is None:
            raise LoadFailed(f"{self.model!r} is no file of this machine")
        return self.model_path


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What a worker reports of itself once its model is loaded."""

    engine_version: str
    slots: int
    ctx: int  # tokens per slot, as the engine granted it
    load_ms: int
    pid: int | None = None
    buffer_bytes: Mapping[str, int] = field(default_factory=dict)
    # what the engine said it allocated, by "<device>/<what>": CUDA0/weights, CUDA0/kv, CPU/compute, CPU/output
    offer: Offer | None = None  # what it does with the model, where only the worker itself can tell


@dataclass(frozen=True, slots=True)
class Sampling:
    """The sampler's settings for one job; names are the contract's."""

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    grammar: str | None = None  # GBNF that the answer must match; `grammar_refusal` has passed it
    json_schema: Mapping[str, object] | None = None  # what that grammar was made of, where it was one


@dataclass(frozen=True, slots=True)
class Job:
    """One decoding run: one prompt on one slot."""

    task_id: str
    prompt: str
    max_tokens: int
    seed: int  # 0 to 2**63 - 1; an engine with a smaller range maps it deterministically
    sampling: Sampling
    slot: int  # the slot that the scheduler leased
    kv_reuse: KvReuse = "none"
    idle_timeout_s: float = 60.0  # raise DecodeStalled when nothing comes for this long
    logprobs: int | None = None  # tell how likely each token was, and so many others
    kept_tokens: tuple[
        str, ...
    ] = ()  # texts of control tokens that belong to the answer; what is no token does not matter
    messages: tuple[Mapping[str, Any], ...] = ()  # what the prompt was rendered of, where it was a conversation


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely a token was: the natural logarithm, before the sampler had its say. `content`: its bytes."""

    content: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TextLikelihood:
    """The same of a piece of text, which is one token, or several that the engine gives out together. Then it is the
    sum; but of those that make one character the last one's. `top`: the likeliest tokens at the last one's place."""

    text: str
    logprob: float
    top: tuple[Likelihood, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """Decoded text that is whole UTF-8. `tokens` counts what the engine decoded since the chunk before; text may be
    empty when those tokens hold only part of a character. `likelihoods`, where asked for, have the text in pieces."""

    text: str
    tokens: int
    likelihoods: tuple[TextLikelihood, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """The last thing that a job yields. Times are the engine's own, in milliseconds."""

    tokens_in: int
    tokens_out: int
    tokens_cached: int
    prefill_ms: float
    decode_ms: float
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class ReadJob:
    """One text to embed; or, with a `query`, one document to score against it."""

    text: str
    slot: int  # the slot that the scheduler leased
    query: str | None = None
    idle_timeout_s: float = 60.0  # raise DecodeStalled when it takes this long


@dataclass(frozen=True, slots=True)
class Reading:
    """What a ReadJob yields: the text's vector, of length 1, or the document's score, the higher the better."""

    tokens_in: int
    ms: float
    vector: tuple[float, ...] = ()
    score: float = 0.0


class Worker(Protocol):
    """One running replica. `ready` is awaited once, before anything else."""

    async def ready(self) -> WorkerFacts:
        """Return once the model is loaded; raise LoadFailed when it cannot be, OutOfMemory when it has no room."""

    async def lost(self) -> str:
        """Return when the worker has died, with the reason as one line for people; `is_out_of_memory` judges it."""

    async def count_tokens(self, text: str) -> int:
        """Tokens of `text` as the model's own tokenizer counts them, the start-of-text token included."""

    async def render_chat(self, messages: list[Message], tools: list[Message] | None = None) -> str:
        """The prompt that the model's own chat template makes of `messages` and `tools`, both in OpenAI's form;
        JobRefused without a template. Tools and their messages are for workers with the feature `tools`."""

    def generate(self, job: Job) -> AsyncGenerator[Chunk | Completion, None]:
        """Chunks, then exactly one Completion. Closing the iterator cancels: it returns once the engine has stopped
        decoding (the slot is free), or raises WorkerLost when it does not stop in time."""

    async def read(self, job: ReadJob) -> Reading:
        """Embed or score one text, whatever else runs. Raises JobRefused where the model is not made for it. Canceled,
        it ends once the engine is done with the text, for no engine stops within one."""

    async def evict(self, slot: int) -> None:
        """Forget the KV that an idle slot holds (HP-SES-1). An empty slot is fine; WorkerLost when it cannot be."""

    async def stop(self, grace_s: float) -> None:
        """End the worker and wait until its process and its children are gone. Idempotent."""


class Engine(Protocol):
    """An adapter kind: knows how to launch its workers."""

    @property
    def traits(self) -> EngineTraits: ...

    def refusal(self, model_path: Path) -> str | None:
        """Why this engine cannot load the file, judged from its header alone; None when it may."""

    def offer(self, model_path: Path) -> Offer:
        """What it does with the file, which it does not refuse. Reads the header."""

    async def grammar_refusal(self, grammar: str) -> str | None:
        """Why a worker must not be given this grammar; None when it may. May take seconds the first time; EngineBusy
        when it cannot be found out in time."""

    async def launch(self, spec: ReplicaSpec) -> Worker:
        """Start a worker process (or its in-process stand-in) and return at once; LoadFailed if it cannot start."""
