"""Engine `openai`: attaches to servers that the configuration names. Nothing of it runs here, and nothing is promised
of what runs there but what the API says."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from llama_orch.contract.config import OpenaiServerSettings
from llama_orch.engines.base import EngineTraits, LoadFailed, Offer, ReplicaSpec
from llama_orch.engines.remote.client import RemoteClient
from llama_orch.engines.remote.worker import VERSION, RemoteWorker
from llama_orch.engines.trials import GrammarTrials
from llama_orch.outbound.door import Outbound
from llama_orch.remote_references import split_reference
from llama_orch.settings import SettingsError, read_key

_DETERMINISM = (
    "none: what its server runs, beside what and in which build is not known here, so that `strict` is refused; a seed "
    "is passed on"
)


class RemoteEngine:
    """Launches workers that are connections. `door` has to be set before the first launch."""

    def __init__(self, servers: Sequence[OpenaiServerSettings]) -> None:
        self.door: Outbound | None = None
        self._trials = GrammarTrials()
        self._servers = {server.name: server for server in servers}

    @property
    def traits(self) -> EngineTraits:
        workloads = {server.workload for server in self._servers.values()}
        return EngineTraits(
            name="openai",
            version=VERSION,
            workloads=tuple(one for one in ("completion", "embedding") if one in workloads),
            determinism=_DETERMINISM,
            strict_needs_exclusive=False,
            features=("chat", "grammar", "json_schema", "min_p"),
            can_be_strict=False,
            is_remote=True,
        )

    def refusal(self, model_path: Path) -> str | None:
        return "engine openai loads no files"

    def offer(self, model_path: Path) -> Offer:
        return Offer(())

    async def grammar_refusal(self, grammar: str) -> str | None:
        """A llama-server is given the grammar. Others get the schema that it was made of, if it was."""
        return await self._trials.refusal(grammar)

    async def launch(self, spec: ReplicaSpec) -> RemoteWorker:
        """The key is read each time, so that a new one is found."""
        name, model = split_reference(spec.model)
        server = self._servers.get(name)
        if server is None or self.door is None:
            raise LoadFailed(f"there is no server {name!r}")
        try:
            key = await asyncio.to_thread(_key_of, server)
        except SettingsError as error:
            raise LoadFailed(str(error)) from error
        client = RemoteClient(self.door, server, key)
        return RemoteWorker(client, server, model)


def _key_of(server: OpenaiServerSettings) -> str | None:
    return None if server.api_key_file is None else read_key(Path(server.api_key_file).expanduser())
