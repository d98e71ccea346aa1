"""The ctransformers engine: old (no release since 2023) and narrow, but a second opinion on the same protocol.

It runs in our worker, because it aborts the process on a tensor type that it does not know; so the header is checked
against what was seen to load before any worker is started.
"""

from __future__ import annotations

import asyncio
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from llama_orch.engines.base import EngineTraits, LoadFailed, Offer, ReplicaSpec
from llama_orch.engines.http_worker import HttpWorker, launch_worker
from llama_orch.engines.process import STALL_TIMEOUT_S
from llama_orch.models.gguf import GgufError, GgufHeader, read_gguf_header

_TENSOR_TYPES = frozenset(
    {"F32", "F16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}
)

_FEATURES = ("chat", "kv_reuse")
_NOT_POOLED, _LAST_TOKEN = 0, 3  # as llama.cpp counts poolings
_DETERMINISM = (
    "strict: the same bytes for the same request on the same replica, whatever else waits or runs (on a CPU: on every "
    "replica of the same build); cost: of a session's KV only whole batches of the prompt are taken over; there is one "
    "slot in any case. best_effort: with a session's KV the bytes may differ"
)


def is_installed() -> bool:
    """Whether the optional package is there (the extra `ctransformers`)."""
    return find_spec("ctransformers") is not None


class CtransformersEngine:
    """Launches ctransformers workers. They have one slot, and no min_p: that setting has no effect here."""

    def __init__(self, stall_timeout_s: float = STALL_TIMEOUT_S) -> None:
        self._stall_timeout_s = stall_timeout_s

    @cached_property
    def traits(self) -> EngineTraits:
        return EngineTraits(
            name="ctransformers",
            version=version("ctransformers"),
            workloads=("completion", "embedding"),
            determinism=_DETERMINISM,
            max_slots=1,
            features=_FEATURES,
        )

    def refusal(self, model_path: Path) -> str | None:
        try:
            return _refusal(read_gguf_header(model_path))
        except (GgufError, OSError) as error:
            return str(error)

    def offer(self, model_path: Path) -> Offer:
        """Any model's last token can be read as a vector, which is what this library does; a model that was trained to
        pool in another way would be read wrongly."""
        try:
            header = read_gguf_header(model_path)
            pooling = header.kv.get(f"{header.architecture}.pooling_type", _NOT_POOLED)
        except (GgufError, OSError):  # gone or damaged since: its load will tell
            pooling = _NOT_POOLED
        is_last = pooling in (_NOT_POOLED, _LAST_TOKEN)
        return Offer(self.traits.workloads if is_last else ("completion",), _FEATURES)

    async def grammar_refusal(self, grammar: str) -> str | None:
        return "ctransformers takes no grammars"

    async def launch(self, spec: ReplicaSpec) -> HttpWorker:
        try:
            header = await asyncio.to_thread(read_gguf_header, spec.file)
        except (GgufError, OSError) as error:
            raise LoadFailed(str(error)) from error
        refusal = _refusal(header)
        if refusal is None and spec.slots != 1:
            refusal = "ctransformers runs one sequence at a time: set slots to 1"
        if refusal is not None:
            raise LoadFailed(refusal)
        return await launch_worker(
            "ctransformers",
            "ctransformers",
            spec,
            has_chat_template=header.chat_template is not None,
            settings={"chat_template": header.chat_template},
            has_exact_cache=True,
            stall_timeout_s=self._stall_timeout_s,
        )


def _refusal(header: GgufHeader) -> str | None:
    if header.architecture != "llama":
        return f"ctransformers loads the llama architecture only, this model is {header.architecture!r}"
    if header.tokenizer_model != "llama":
        return f"ctransformers needs a SentencePiece vocabulary, this model has {header.tokenizer_model!r}"
    unknown = sorted(header.tensor_types - _TENSOR_TYPES)
    if unknown:
        return f"ctransformers does not load tensors of type {', '.join(unknown)}"
    if header.is_split:
        return "the model is one part of a split GGUF: merge the parts first"
    return None
