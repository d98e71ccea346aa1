"""What is wrong with `engines.openai` and its pools is said by name before anything runs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llama_orch.settings import SettingsError, parse_settings

SERVER = {"name": "box", "base_url": "http://10.0.0.7:8000/v1"}
POOL = {"engine": "openai", "model": "openai:box/org/model"}


def configured(server: dict[str, Any], pool: dict[str, Any]) -> str:
    """JSON is YAML."""
    return json.dumps({"engines": {"openai": {"servers": [{**SERVER, **server}]}}, "pools": [{**POOL, **pool}]})


@pytest.mark.spec("HP-REM-1", "HP-ALN-3")
def test_a_server_and_its_pool() -> None:
    settings = parse_settings(configured({"api_key_file": "/k", "ctx": 8192}, {"max_tokens": 4000}), "c.yaml")
    (server,) = settings.engines.openai.servers
    assert (server.workload, server.max_concurrency, server.health_interval_ms) == ("completion", None, 5000)


@pytest.mark.spec("HP-REM-1", "HP-ALN-3")
@pytest.mark.parametrize(
    ("server", "pool", "problem"),
    [
        ({"base_url": "box:8000"}, {}, "engines.openai.servers[0].base_url: the scheme 'box' is not served"),
        ({"base_url": "http://me:pw@box/v1"}, {}, "base_url: the URL has a user name or password"),
        ({"base_url": "https://box/v1?key=x"}, {}, "base_url: ends with its path"),
        ({"base_url": "https://box/v1#x"}, {}, "base_url: ends with its path"),
        ({"api_key": "x"}, {}, "api_key: unknown key; did you mean 'api_key_file'?"),
        ({"api_key_file": "box.key"}, {}, "api_key_file: 'box.key' is no absolute path"),
        ({"max_concurrency": 0}, {}, "servers[0].max_concurrency"),
        ({"workload": "rerank"}, {}, "one of: completion, embedding"),
        ({}, {"model": "builtin:tiny"}, "pools[0].model: engine openai takes openai:SERVER/MODEL"),
        ({}, {"model": "openai:box"}, "pools[0].model: engine openai takes openai:SERVER/MODEL"),
        ({}, {"model": "openai:/m"}, "pools[0].model: engine openai takes openai:SERVER/MODEL"),
        ({}, {"model": "openai:fox/m"}, "pools[0].model: engines.openai.servers has no 'fox'; known: box"),
        ({}, {"engine": "llamacpp"}, "is on a server elsewhere, which takes engine openai"),
        ({}, {"ctx": 4096}, "pools[0].ctx: is not for engine openai: state engines.openai.servers[].ctx instead"),
        ({}, {"slots": 2}, "pools[0].slots: is not for engine openai"),
        ({}, {"devices": ["cpu"]}, "pools[0].devices: is not for engine openai"),
        ({}, {"replicas": 2}, "pools[0].replicas: is not for engine openai"),
        ({}, {"keep_alive_ms": 5}, "pools[0].keep_alive_ms: is not for engine openai"),
    ],
)
def test_what_is_wrong(server: dict[str, Any], pool: dict[str, Any], problem: str) -> None:
    with pytest.raises(SettingsError) as refused:
        parse_settings(configured(server, pool), "c.yaml")
    assert problem in str(refused.value)


def test_a_name_twice() -> None:
    text = json.dumps({"engines": {"openai": {"servers": [SERVER, SERVER]}}})
    with pytest.raises(SettingsError, match="the name 'box' is given more than once"):
        parse_settings(text, "c.yaml")
