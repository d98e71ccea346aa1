"""Provider states: what `given` of a pact may name. A handler's name is the state's, its docstring the line in the
documentation, its parameters the state's. `task`: any fields of a TaskRequest, such as `task_id`; the others are those
of a short story.

A state is reached as a user would reach it: a queue is full because it was filled. Nothing here decides an answer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from llama_orch.engines.simulated import SimulatedWorker
from tests.pact.stage import Installation, Stage

Handler = Callable[..., None]
HANDLERS: dict[str, Handler] = {}

IDLE = Installation()


def state(handler: Handler) -> Handler:
    HANDLERS[handler.__name__.replace("_", " ")] = handler
    return handler


@state
def an_idle_pool(stage: Stage) -> None:
    """The pool is ready and has nothing to do."""
    stage.raise_service(IDLE)


@state
def an_idle_pool_on_llamacpp(stage: Stage, ctx: int = 2048) -> None:
    """The same on llama.cpp itself, with a context of `ctx` tokens."""
    stage.raise_service(Installation(engine="llamacpp", ctx=ctx))


@state
def an_idle_pool_that_knows_tools(stage: Stage) -> None:
    """Likewise, of the model with a chat template that has tools as Qwen's has them."""
    stage.raise_service(Installation(engine="llamacpp", knows_tools=True))


@state
def an_idle_pool_on_a_server_elsewhere(stage: Stage) -> None:
    """The pool's model is `openai:box/org/model`, of a server that was reached and has nothing to do."""
    stage.raise_service(Installation(engine="openai", upstream=stage.upstream))


@state
def a_session(stage: Stage, session_id: str, budget_tokens: int | None = None, max_turns: int = 8) -> None:
    """A task of it has ended. `budget_tokens`: what its tasks may use together, enforced; `max_turns`: how many."""
    stage.raise_service(Installation(budget_tokens=budget_tokens, max_turns=max_turns))
    stage.wait_for_the_end(stage.submit(session_id=session_id))


@state
def a_busy_pool(stage: Stage) -> None:
    """A task that does not end holds the pool's slot. Nothing was measured before it."""
    an_idle_pool(stage)
    _occupy(stage)


@state
def a_busy_pool_of_known_speed(stage: Stage) -> None:
    """Two tasks have ended, and a third that does not end holds the pool's slot."""
    an_idle_pool(stage)
    for _ in range(2):
        stage.wait_for_the_end(stage.submit())
    _occupy(stage)


@state
def a_full_queue(stage: Stage, full_policy: Literal["reject", "drop-lru"]) -> None:
    """An `interactive` task waits behind a running one, and there is no room. `full_policy`: `reject` or `drop-lru`."""
    _fill(stage, full_policy)
    stage.submit()


@state
def a_pool_that_loads_its_model(stage: Stage) -> None:
    """The pool's worker has not loaded its model yet."""
    stage.raise_service(Installation(load_s=3600.0))


@state
def a_pool_whose_model_cannot_be_loaded(stage: Stage) -> None:
    """The pool's worker has given up on its model at least once."""
    stage.raise_service(Installation(load_error="the model file is damaged"))
    stage.wait_until(lambda: stage.read("/v1/pools/default/health")["last_error"] is not None)


@state
def a_drained_pool(stage: Stage) -> None:
    """The pool was drained and has nothing to do; its model is unloaded."""
    an_idle_pool(stage)
    stage.post("/v1/pools/default/drain", {"deadline_ms": 60_000})
    stage.wait_until(lambda: _replica_states(stage) == ["unloaded"])


@state
def a_pool_that_is_being_reloaded(stage: Stage) -> None:
    """A reload of the pool with the model that it has is under way, and the new replica does not get ready."""
    an_idle_pool(stage)
    stage.load_slowly(3600.0)
    stage.post("/v1/pools/default/reload", {"new_model_ref": "builtin:tiny"})


@state
def a_pool_that_was_reloaded(stage: Stage) -> None:
    """A reload of the pool with the model that it has is done."""
    an_idle_pool(stage)
    stage.post("/v1/pools/default/reload", {"new_model_ref": "builtin:tiny"})
    stage.wait_until(lambda: _replica_states(stage) == ["ready"])


@state
def a_service_that_is_ending(stage: Stage) -> None:
    """It was told to end and drains."""
    an_idle_pool(stage)
    stage.drain()


@state
def a_task_waits(stage: Stage, **task: Any) -> None:
    """The task is next in the queue, behind one that does not end."""
    a_busy_pool(stage)
    stage.submit(**task)


@state
def a_task_runs(stage: Stage, **task: Any) -> None:
    """The task has started and does not end."""
    an_idle_pool(stage)
    stage.act_on_worker(SimulatedWorker.hang)
    stage.submit(**task)


@state
def a_task_was_submitted_to_llamacpp(stage: Stage, **task: Any) -> None:
    """The task runs on llama.cpp, with the model that is in the package."""
    an_idle_pool_on_llamacpp(stage)
    stage.submit(**task)


@state
def a_task_has_succeeded(stage: Stage, **task: Any) -> None:
    """The task ran to its end."""
    an_idle_pool(stage)
    stage.wait_for_the_end(stage.submit(**task))


@state
def a_task_was_canceled(stage: Stage, **task: Any) -> None:
    """The task was canceled while it ran."""
    an_idle_pool(stage)
    stage.act_on_worker(SimulatedWorker.hang)
    stage.cancel(stage.submit(**task))


@state
def a_task_lost_its_worker(stage: Stage, **task: Any) -> None:
    """The worker died while the task ran."""
    an_idle_pool(stage)
    stage.act_on_worker(SimulatedWorker.hang)
    task_id = stage.submit(**task)
    stage.act_on_worker(SimulatedWorker.crash)
    stage.wait_for_the_end(task_id)


@state
def a_task_missed_its_deadline(stage: Stage, **task: Any) -> None:
    """The task's deadline of 1 ms passed while it ran."""
    an_idle_pool(stage)
    stage.act_on_worker(SimulatedWorker.hang)
    stage.wait_for_the_end(stage.submit(**{"deadline_ms": 1, **task}))


@state
def a_task_was_dropped_from_a_full_queue(stage: Stage, **task: Any) -> None:
    """The task waited in a full queue under `drop-lru` when another one came."""
    _fill(stage, "drop-lru")
    task_id = stage.submit(**task)
    stage.submit()
    stage.wait_for_the_end(task_id)


@state
def a_model_in_the_catalog(stage: Stage, model_id: str, digest: str | None = None) -> None:
    """A pool serves `builtin:tiny`, and the catalog has it under this id, with this declared digest."""
    an_idle_pool(stage)
    stage.post("/v1/catalog/models", {"id": model_id, "source_url": "builtin:tiny", "digest": digest})


@state
def a_verified_model(stage: Stage, model_id: str, digest: str | None = None) -> None:
    """The same, and its verification has come to its end."""
    a_model_in_the_catalog(stage, model_id, digest)
    stage.post(f"/v1/catalog/models/{model_id}/verify")
    stage.wait_until(lambda: stage.read(f"/v1/catalog/models/{model_id}")["verification"]["state"] == "done")


@state
def a_retired_model(stage: Stage, model_id: str) -> None:
    """The same without a verification, and it was retired."""
    a_model_in_the_catalog(stage, model_id)
    stage.post(f"/v1/catalog/models/{model_id}/state", {"state": "Retired"})


@state
def an_artifact_is_stored(stage: Stage, **artifact: Any) -> None:
    """The artifact is there, with these fields."""
    an_idle_pool(stage)
    stage.post("/v1/artifacts", artifact)


@state
def another_machine(stage: Stage) -> None:
    """It answers for `http://files.example`: `/text` with a text, `/short` with less than it says, else with a
    picture."""
    stage.raise_service(Installation(reaches=stage.there))


@state
def a_hub_that_is_slow(stage: Stage) -> None:
    """Tasks have their models fetched from it, and it does not come to an end."""
    stage.raise_service(Installation(hub=stage.hub))


@state
def a_hub_that_may_not_be_called(stage: Stage) -> None:
    """Tasks have their models fetched, but the outbound policy denies this hub."""
    stage.raise_service(Installation(hub=stage.hub, is_hub_open=False))


def _replica_states(stage: Stage) -> list[str]:
    return [replica["state"] for replica in stage.read("/v1/pools/default/health")["replicas"]]


def _occupy(stage: Stage) -> None:
    stage.act_on_worker(SimulatedWorker.hang)
    stage.submit()


def _fill(stage: Stage, full_policy: Literal["reject", "drop-lru"]) -> None:
    """All but the last place in the queue."""
    stage.raise_service(Installation(capacity=1, full_policy=full_policy))
    _occupy(stage)


class Described(NamedTuple):
    name: str
    parameters: str
    meaning: str


def described() -> Iterator[Described]:
    """The states as the documentation shows them."""
    for name, handler in HANDLERS.items():
        parameters = [
            f"`{one.name}`" if one.kind is not inspect.Parameter.VAR_KEYWORD else f"fields of the {one.name}"
            for one in list(inspect.signature(handler).parameters.values())[1:]
        ]
        yield Described(name, ", ".join(parameters), " ".join((handler.__doc__ or "").split()))
