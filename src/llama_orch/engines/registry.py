"""The engines of this installation, by name. A new engine is its own file and one line here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llama_orch.contract.config import OpenaiServerSettings
from llama_orch.engines import ctransformers
from llama_orch.engines.base import Engine
from llama_orch.engines.ctransformers import CtransformersEngine
from llama_orch.engines.llamacpp import Launcher, LlamaCppEngine
from llama_orch.engines.remote.engine import RemoteEngine
from llama_orch.engines.simulated import SimulatedEngine


def build_engines(
    launcher: Launcher = "embedded",
    binary: str | None = None,
    extra_args: Sequence[str] = (),
    simulated: SimulatedEngine | None = None,
    servers: Sequence[OpenaiServerSettings] = (),
) -> dict[str, Engine]:
    """Every engine that is there. The first arguments are engines.llamacpp's settings; `simulated` replaces the default
    one; `servers` are those of engines.openai, an engine that is there where there are any. Raises ValueError for
    settings that contradict each other or would weaken a worker."""
    path = None if binary is None or launcher == "embedded" else Path(binary)
    engines: list[Engine] = [LlamaCppEngine(launcher, path, tuple(extra_args)), simulated or SimulatedEngine()]
    if ctransformers.is_installed():
        engines.append(CtransformersEngine())
    if servers:
        engines.append(RemoteEngine(servers))
    return {engine.traits.name: engine for engine in engines}
