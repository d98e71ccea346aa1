"""Pools on servers elsewhere, from the settings to a replica, and what the server itself then changes."""

from __future__ import annotations

from typing import Any

import pytest

from llama_orch.contract.config import EnginesSettings, OpenaiServerSettings, OpenaiSettings, PoolSettings, Settings
from llama_orch.contract.models import ReplicaState
from llama_orch.engines.base import Offer, WorkerFacts
from llama_orch.engines.remote.engine import RemoteEngine
from llama_orch.engines.simulated import SimulatedEngine
from llama_orch.models.references import ModelNotFound
from llama_orch.runtime.builder import spec_as_found
from llama_orch.runtime.library import FileLibrary, RemoteLibrary
from llama_orch.runtime.plan import PlanError, make_plan
from llama_orch.testing.rehearsal import sources_for

FAR = PoolSettings(id="far", engine="openai", model="openai:box/org/m")


def a_server(**fields: Any) -> OpenaiServerSettings:
    return OpenaiServerSettings(name="box", base_url="http://127.0.0.1:1/v1", **fields)


def plan_of(server: OpenaiServerSettings, *pools: PoolSettings) -> Any:
    settings = Settings(engines=EnginesSettings(openai=OpenaiSettings(servers=[server])), pools=list(pools))
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
