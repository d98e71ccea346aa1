"""HP-DET-2: what a run depends on is pinned and told, so that whoever has an `end` frame can repeat the run."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from llama_orch.contract.models import ReplicaState
from llama_orch.engines import simulated
from llama_orch.testing.builders import a_host, a_scheduler, submit
from llama_orch.testing.loop import run
from llama_orch.testing.rehearsal import a_rehearsal
from tests.live.client import ENGINES, finish, open_client, until
from tests.live_service import live_service
from tests.runtime.frames import text

pytestmark = [pytest.mark.spec("HP-DET-2"), pytest.mark.xdist_group("determinism")]

PROFILES = {"v1": {}, "dry-2": {"temperature": 0.0, "repeat_penalty": 1.2}}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    """A pool of each engine, with a profile of this installation's own."""
    pools = [{"id": name, "engine": name, "ctx": 512, "sampler_profile_version": "dry-2"} for name in ENGINES]
    with live_service({"pools": pools, "sampler_profiles": PROFILES}) as service, open_client(service) as client:
        until(lambda: all(pool["ready"] for pool in client.get("/v1/pools").json()["items"]))
        yield client


@pytest.mark.spec("HP-DIS-1", "HP-DIS-3")
@pytest.mark.parametrize("engine", ENGINES)
def test_end_names_what_capabilities_list(client: httpx.Client, engine: str) -> None:
    """The pool's profile with its figures, the engine with its version and what it guarantees, the model's digest."""
    said = client.get("/v1/capabilities").json()
    end = finish(client, engine=engine, max_tokens=8, seed=7)[-1].data
    (pool,) = (one for one in said["pools"] if one["engine"] == engine)
    (listed,) = (one for one in said["engines"] if one["engine"] == engine)
    assert end["sampler_profile_version"] == pool["sampler_profile_version"] == "dry-2"
    assert {one["version"]: one["temperature"] for one in said["sampler_profiles"]} == {"v1": 0.8, "dry-2": 0.0}
    assert end["engine_version"] == listed["version"]
    assert end["model_digest"] == client.get(f"/v1/pools/{pool['id']}").json()["model_digest"]
    assert end["seed"] == 7
    guarantee, cost = listed["determinism"].removeprefix("strict: ").split("; cost: ")
    assert guarantee.startswith("the same bytes for the same")
    assert cost


@pytest.mark.parametrize("engine", ENGINES)
def test_the_profile_decides_and_is_named(client: httpx.Client, engine: str) -> None:
    """The pool's own is greedy: all seeds have one text. A task may name another one, and its `end` says so."""
    own = {text(finish(client, engine=engine, max_tokens=16, seed=seed)) for seed in range(4)}
    assert len(own) == 1
    named = [finish(client, engine=engine, max_tokens=16, seed=n, sampler_profile_version="v1") for n in range(4)]
    assert len({text(frames) for frames in named}) > 1
    assert {frames[-1].data["sampler_profile_version"] for frames in named} == {"v1"}


def test_an_engine_that_is_replaced_underneath_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker of another build than the service began with would serve under the old name: it is not let in. The
    old build is."""

    async def main() -> None:
        async with a_rehearsal() as stage:
            monkeypatch.setattr(simulated, "_VERSION", "2")
            stage.worker().crash()
            await asyncio.sleep(5.0)
            (replica,) = stage.service.get_pool_health("default").replicas
            assert replica.state is not ReplicaState.READY
            assert "it is 2 now, and this service began with 1" in str(replica.last_error)
            monkeypatch.undo()
            await asyncio.sleep(30.0)
            assert stage.service.get_pool_health("default").ready

    run(main())


def test_each_replica_has_the_digest_of_what_it_loaded() -> None:
    """A file that was replaced between two loads: each task names the bytes that it ran on, whatever came since."""
    scheduler = a_scheduler(a_host("3090+3060"), is_ready=False)
    digests = {replica_id: f"sha256:{number:064x}" for number, replica_id in enumerate(scheduler.replicas)}
    for replica_id, digest in digests.items():
        scheduler.replica_ready(replica_id, slots=4, model_digest=digest, now=1.0)
    tasks = [submit(scheduler, f"t{number}", now=2.0).task for number in range(2)]
    assert {task.replica_id: task.model_digest for task in tasks} == digests
