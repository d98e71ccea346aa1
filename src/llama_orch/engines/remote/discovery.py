"""What a server has: its model, how many requests it takes at a time, and how much context, as it tells or as the
configuration says, which goes first."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from llama_orch.contract.config import OpenaiServerSettings
from llama_orch.engines.base import LoadFailed, Offer, WorkerLost
from llama_orch.engines.remote import dialect
from llama_orch.engines.remote.client import Broke, RemoteClient
from llama_orch.engines.remote.dialect import Kind, Nonsense, kind_of, read

SLOTS_GUESS = 8
CTX_GUESS = 4096
_SLOTS_MAX, _CTX_MAX = 1024, 1 << 24  # as the configuration has them
_SHOWN_MAX = 8
_HEALTH_PATHS = ("/health", "/-/healthz")  # of most servers, and of Ray Serve's proxy


class _Meta(msgspec.Struct):
    n_ctx_train: int | None = None


class _Model(msgspec.Struct):
    id: str
    owned_by: str | None = None
    max_model_len: int | None = None  # vLLM, SGLang
    meta: _Meta | None = None  # llama-server


class _Models(msgspec.Struct):
    data: list[_Model]


class _Settings(msgspec.Struct):
    n_ctx: int | None = None


class _Props(msgspec.Struct):
    total_slots: int | None = None
    default_generation_settings: _Settings | None = None


_models = msgspec.json.Decoder(_Models).decode
_props = msgspec.json.Decoder(_Props).decode


@dataclass(frozen=True, slots=True)
class Found:
    kind: Kind
    slots: int
    ctx: int
    offer: Offer
    health_url: str


def offer_of(server: OpenaiServerSettings) -> Offer:
    """What may be asked of the server before it has said what it is."""
    return dialect.offer_of(server.workload, Kind.OTHER, server.json_schema)


async def discover(client: RemoteClient, server: OpenaiServerSettings, model: str, limit_s: float) -> Found:
    """Ask the server. Raises LoadFailed."""
    try:
        listed = await _listed(client, model, limit_s)
        kind = kind_of(listed.owned_by or "")
        props = await _props_of(client, limit_s) if kind is Kind.LLAMACPP else _Props()
        health_url = await _health_url(client, limit_s)
    except Nonsense as error:
        raise LoadFailed(f"{client.name} sent {error}") from error
    except (Broke, WorkerLost) as error:
        raise LoadFailed(str(error)) from error
    granted = props.default_generation_settings
    trained = None if listed.meta is None else listed.meta.n_ctx_train
    return Found(
        kind=kind,
        slots=server.max_concurrency or _within(props.total_slots, _SLOTS_MAX) or SLOTS_GUESS,
        ctx=server.ctx
        or _within(None if granted is None else granted.n_ctx, _CTX_MAX)
        or _within(listed.max_model_len, _CTX_MAX)
        or _within(trained, _CTX_MAX)
        or CTX_GUESS,
        offer=dialect.offer_of(server.workload, kind, server.json_schema),
        health_url=health_url,
    )


async def _listed(client: RemoteClient, model: str, limit_s: float) -> _Model:
    status, body = await client.ask("GET", f"{client.base_url}/models", limit_s=limit_s)
    if status != 200:
        raise Broke(f"{client.name} answers {status} when it is asked for its models")
    models = read(body, _models).data
    for one in models:
        if one.id == model:
            return one
    names = ", ".join(client.said(one.id) for one in models[:_SHOWN_MAX]) or "none"
    raise Broke(f"{client.name} has no model {model!r}; it has: {names}" + (", …" if len(models) > _SHOWN_MAX else ""))


async def _health_url(client: RemoteClient, limit_s: float) -> str:
    """Where it tells how it is, if it does; else its models."""
    for path in _HEALTH_PATHS:
        status, _ = await client.ask("GET", client.root_url + path, limit_s=limit_s)
        if status == 200:
            return client.root_url + path
    return f"{client.base_url}/models"


async def _props_of(client: RemoteClient, limit_s: float) -> _Props:
    status, body = await client.ask("GET", f"{client.root_url}/props", limit_s=limit_s)
    return read(body, _props) if status == 200 else _Props()  # one may have turned it off


def _within(told: int | None, most: int) -> int | None:
    """None where nothing of use was told."""
    return None if told is None or told < 1 else min(told, most)
