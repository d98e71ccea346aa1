"""Pools on servers elsewhere, from the settings to a replica, and what the server itself then changes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from llama_orch.clock import SystemClock
from llama_orch.contract.config import (
    CatalogSettings,
    EnginesSettings,
    OpenaiServerSettings,
    OpenaiSettings,
    PoolSettings,
    Settings,
    TrustPolicySettings,
)
from llama_orch.contract.models import ReplicaState
from llama_orch.engines.base import Offer, WorkerFacts
from llama_orch.engines.remote.engine import RemoteEngine
from llama_orch.engines.simulated import SimulatedEngine
from llama_orch.models.references import ModelNotFound
from llama_orch.runtime.builder import spec_as_found
from llama_orch.runtime.library import FileLibrary, RemoteLibrary
from llama_orch.runtime.plan import PlanError, make_plan
from llama_orch.runtime.wiring import wire
from llama_orch.testing.rehearsal import sources_for

FAR = PoolSettings(id="far", engine="openai", model="openai:box/org/m")


def a_server(**fields: Any) -> OpenaiServerSettings:
    return OpenaiServerSettings(name="box", base_url="http://127.0.0.1:1/v1", **fields)


def settings_of(server: OpenaiServerSettings, *pools: PoolSettings, **more: Any) -> Settings:
    return Settings(engines=EnginesSettings(openai=OpenaiSettings(servers=[server])), pools=list(pools), **more)


def plan_of(server: OpenaiServerSettings, *pools: PoolSettings) -> Any:
    settings = settings_of(server, *pools)
    engines = {"openai": RemoteEngine([server]), "simulated": SimulatedEngine()}
    library = RemoteLibrary([server], FileLibrary())
    return make_plan(settings, engines, sources_for(("3090", "3060")), library)


@pytest.mark.spec("HP-REM-1")
def test_one_replica_without_a_device() -> None:
    """Beside it the devices are given away as if it were not there."""
    plan = plan_of(a_server(max_concurrency=3, ctx=9000), FAR, PoolSettings(engine="simulated", replicas=2))
    far, near = plan.pools
    (replica,) = far.replicas.values()
    assert (replica.device_ids, replica.need_bytes, replica.slots) == ((), {}, 3)
    assert (replica.is_remote, replica.is_pinned, replica.state) == (True, True, ReplicaState.LOADING)
    assert (far.spec.slots, far.spec.ctx, far.spec.can_be_strict, far.spec.is_known) == (3, 9000, False, False)
    _, spec = plan.replicas["far-0"]
    assert (spec.backend, spec.model_path, spec.model) == ("remote", None, "openai:box/org/m")
    assert [one.device_ids for one in near.replicas.values()] == [("3090",), ("3060",)]


@pytest.mark.spec("HP-REM-1")
def test_what_is_not_stated_is_a_guess_until_the_server_was_asked() -> None:
    (pool,) = plan_of(a_server(), FAR).pools
    assert (pool.spec.slots, pool.spec.ctx, pool.spec.features) == (8, 4096, ("chat",))
    offer = Offer(("completion",), ("chat", "min_p"), lacks=("kv_hint",))
    found = spec_as_found(pool.spec, WorkerFacts("v1", 2, 512, 3, offer=offer))
    assert (found.slots, found.ctx, found.features, found.lacks) == (2, 512, ("chat", "min_p"), ("kv_hint",))
    assert found.is_known


@pytest.mark.spec("HP-REM-1")
def test_files_and_servers_are_not_mistaken_for_one_another() -> None:
    with pytest.raises(PlanError, match="engine simulated needs a model file, and 'openai:box/org/m' is none"):
        plan_of(a_server(), PoolSettings(engine="simulated", model="openai:box/org/m"))
    with pytest.raises(PlanError, match="engine openai needs a model of a server elsewhere"):
        plan_of(a_server(), PoolSettings(engine="openai"))
    with pytest.raises(ModelNotFound, match=r"`engines.openai.servers` has no 'nobody'; known: box"):
        RemoteLibrary([a_server()], FileLibrary()).look("openai:nobody/m")


@pytest.mark.spec("HP-REM-1", "HP-CTL-4")
@pytest.mark.parametrize(("mode", "is_barred"), [("strict", True), ("permissive", False)])
def test_a_strict_trust_policy_bars_what_cannot_be_verified(mode: Any, is_barred: bool) -> None:
    """The server is not even asked: the replica is not attached."""
    settings = settings_of(a_server(), FAR, catalog=CatalogSettings(trust_policy=TrustPolicySettings(mode=mode)))

    async def main() -> None:
        plan = plan_of(a_server(), FAR)

        async def digest(path: Path) -> str:
            return "sha256:"

        orchestrator, _ = wire(settings, plan.builder.engines, plan, digest, SystemClock())
        orchestrator.bars.begin()
        pool = orchestrator.scheduler.pools["far"]
        assert (pool.bar is not None) is is_barred
        assert (pool.replicas["far-0"].state is ReplicaState.UNLOADED) is is_barred

    asyncio.run(main())
