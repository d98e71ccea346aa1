"""The llamacpp engine: llama.cpp's server, hosted by our worker (xllamacpp) or as the user's own `llama-server` binary.

Both launchers serve the same routes on a Unix socket, so they differ in the worker's module and nothing else.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from llama_orch.core.tool_syntax import syntax_of
from llama_orch.engines.base import EngineTraits, LoadFailed, Offer, ReplicaSpec
from llama_orch.engines.http_worker import HttpWorker, launch_worker
from llama_orch.engines.process import STALL_TIMEOUT_S, worker_environment
from llama_orch.engines.trials import GrammarTrials
from llama_orch.models.gguf import GgufError, GgufHeader, read_gguf_header
from llama_orch.models.kv_shape import keeps_every_token
from llama_orch.models.pooling import ENCODERS, Purpose, pooling_problem, purpose
from llama_orch.workers.llama_server import refused_argument
from llama_orch.workers.llamacpp import batch_size

Launcher = Literal["embedded", "binary"]

_PROBE_TIMEOUT_S = 10.0
_REQUIRED = ("context_length", "embedding_length", "block_count")  # of every architecture that llama.cpp knows
# "version: 11549 (64fbe0f)"; newer builds say "version: 0.6.0-dev (build 11434, commit 64fbe0f)".
_VERSION = re.compile(r"version: (?:\S+ \(build )?(\d+)(?: \(|, commit )(\w+)\)")

_FEATURES = ("chat", "grammar", "json_schema", "kv_reuse", "logprobs", "min_p")  # and tools, by the model's template
_DETERMINISM = (
    "strict: the same bytes for the same request on the same replica, whatever else waits or runs (on a CPU: on every "
    "replica of the same build); cost: the task has all slots of its replica, and of a session's KV only whole batches "
    "of its prompt are taken over. best_effort shares the replica: beside others about 1 stream in 32 differs on a "
    "CPU, and with long prompts or a session's KV more"
)


class LlamaCppEngine:
    """Launches llama.cpp workers. `cache_ram_mib` bounds llama.cpp's own prompt cache in host memory, per worker."""

    def __init__(
        self,
        launcher: Launcher = "embedded",
        binary: Path | None = None,
        extra_args: tuple[str, ...] = (),
        cache_ram_mib: int = 0,
        stall_timeout_s: float = STALL_TIMEOUT_S,
    ) -> None:
        refused = refused_argument(extra_args)
        if refused:
            raise ValueError(f"extra_args may not have {refused}: the service sets it, or it would open a door")
        if launcher == "binary" and binary is None:
            raise ValueError("the launcher 'binary' needs the path of a llama-server binary")
        if launcher == "embedded" and extra_args:
            raise ValueError("extra_args are for the launcher 'binary'")
        self._launcher = launcher
        self._binary = binary
        self._extra_args = extra_args
        self._cache_ram_mib = cache_ram_mib
        self._stall_timeout_s = stall_timeout_s
        self._trials = GrammarTrials()

    @cached_property
    def traits(self) -> EngineTraits:
        return EngineTraits(
            name="llamacpp",
            version=embedded_version() if self._binary is None else binary_version(self._binary),
            workloads=tuple(Purpose),
            determinism=_DETERMINISM,
            strict_needs_exclusive=True,
            features=(*_FEATURES, "tools"),
        )

    def refusal(self, model_path: Path) -> str | None:
        """llama.cpp itself knows which architectures it loads; here the file only has to be whole, in one piece, and a
        model of the architecture that it names."""
        try:
            return _refusal(read_gguf_header(model_path))
        except (GgufError, OSError) as error:
            return str(error)

    def offer(self, model_path: Path) -> Offer:
        try:
            header = read_gguf_header(model_path)
        except (GgufError, OSError):  # gone or damaged since: its load will tell
            return Offer((Purpose.COMPLETION,), _FEATURES)
        made_for = purpose(header)
        if made_for is Purpose.COMPLETION:
            syntax = None if header.chat_template is None else syntax_of(header.chat_template)
            if syntax is not None:
                return Offer((made_for,), (*_FEATURES, "tools"), tool_syntax=syntax.name)
            return Offer((made_for,), _FEATURES)
        return Offer((made_for,), reads_whole_ctx=header.architecture in ENCODERS)

    async def grammar_refusal(self, grammar: str) -> str | None:
        return await self._trials.refusal(grammar)

    async def launch(self, spec: ReplicaSpec) -> HttpWorker:
        try:
            header = await asyncio.to_thread(read_gguf_header, spec.file)
        except (GgufError, OSError) as error:
            raise LoadFailed(str(error)) from error
        refusal = _refusal(header)
        if refusal is not None:
            raise LoadFailed(refusal)
        settings: dict[str, object] = {"cache_ram_mib": self._cache_ram_mib, "purpose": purpose(header).value}
        if self._binary is not None:
            settings |= {"binary": str(self._binary.absolute()), "extra_args": list(self._extra_args)}
        return await launch_worker(
            "llamacpp" if self._binary is None else "llama_server",
            "llamacpp",
            spec,
            has_chat_template=header.chat_template is not None,
            writes=purpose(header) is Purpose.COMPLETION,
            settings=settings,
            # Where a layer forgets, llama.cpp goes on from a checkpoint, in other batches than a cold run.
            exact_batch=batch_size({"gpu": spec.backend == "cuda"}) if keeps_every_token(header) else None,
            stall_timeout_s=self._stall_timeout_s,
        )


def _refusal(header: GgufHeader) -> str | None:
    if header.is_split:
        return "the model is one part of a split GGUF: merge the parts with llama-gguf-split first"
    names = [f"{header.architecture}.{key}" for key in _REQUIRED]
    missing = [name for name in names if name not in header.kv]
    if missing:
        return f"llama.cpp cannot load the model: its header names {header.architecture!r} but lacks {missing[0]}"
    return pooling_problem(header)


def embedded_version() -> str:
    """xllamacpp's version, which names the llama.cpp build, without loading its 100 MB library."""
    try:
        return version("xllamacpp")
    except PackageNotFoundError:
        return "not installed"


def binary_version(binary: Path) -> str:
    """The build of a llama-server binary, as it prints it; "unknown" when it cannot be asked."""
    try:
        answer = subprocess.run(
            [str(binary), "--version"],
            env=worker_environment({}, ()),
            capture_output=True,
            text=True,
            timeout=_PROBE_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return "unknown"
    found = _VERSION.search(answer.stdout + answer.stderr)
    return f"b{found[1]}-{found[2]}" if found else "unknown"
