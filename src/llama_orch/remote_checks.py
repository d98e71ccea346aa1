"""What is wrong with `engines.openai` and the pools that use it, for the check of the configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from llama_orch.contract.config import OpenaiServerSettings, PoolSettings
from llama_orch.policy.urls import BadUrl, parse_target
from llama_orch.remote_references import SCHEME, split_reference

_NOT_OF_A_REMOTE_POOL = {
    "devices": "a server elsewhere has devices of its own",
    "replicas": "a server elsewhere is one replica; how many it has behind it is its own",
    "slots": "state engines.openai.servers[].max_concurrency instead",
    "ctx": "state engines.openai.servers[].ctx instead",
    "keep_alive_ms": "what a server elsewhere has loaded is its own",
    "tensor_split": "a server elsewhere has devices of its own",
}


def server_problems(servers: Sequence[OpenaiServerSettings]) -> Iterator[str]:
    """Sentences; none where all is well."""
    for index, server in enumerate(servers):
        where = f"engines.openai.servers[{index}]"
        try:
            target = parse_target(server.base_url)
        except BadUrl as error:
            yield f"{where}.base_url: {error}"
        else:
            if "?" in target.rest or "#" in server.base_url:
                yield f"{where}.base_url: ends with its path, as in http://10.0.0.7:8000/v1; keys go into api_key_file"
        if server.api_key_file is not None and not Path(server.api_key_file).expanduser().is_absolute():
            yield f"{where}.api_key_file: {server.api_key_file!r} is no absolute path"


def remote_pool_problems(where: str, pool: PoolSettings, servers: Sequence[OpenaiServerSettings]) -> Iterator[str]:
    """Of a pool whose engine is `openai`, or whose model is on a server elsewhere."""
    if pool.engine != "openai":
        yield f"{where}.model: {pool.model!r} is on a server elsewhere, which takes engine openai"
        return
    name, model = split_reference(pool.model)
    if not pool.model.startswith(SCHEME) or not name or not model:
        yield f"{where}.model: engine openai takes openai:SERVER/MODEL, and {pool.model!r} is none"
    elif name not in [server.name for server in servers]:
        known = ", ".join(server.name for server in servers) or "none"
        yield f"{where}.model: engines.openai.servers has no {name!r}; known: {known}"
    plain = PoolSettings()
    for key, why in _NOT_OF_A_REMOTE_POOL.items():
        if getattr(pool, key) != getattr(plain, key):
            yield f"{where}.{key}: is not for engine openai: {why}"
