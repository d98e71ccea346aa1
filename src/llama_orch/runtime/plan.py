"""From settings to pools: which replica of which model goes on which devices. Runs once, at the start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from llama_orch.contract.config import PoolSettings, Settings
from llama_orch.contract.models import ReplicaState
from llama_orch.core.ledger import RESERVE_BYTES, Device
from llama_orch.core.pool import Pool
from llama_orch.devices.inventory import Source
from llama_orch.engines.base import Engine, ReplicaSpec
from llama_orch.models.references import ModelNotFound
from llama_orch.runtime.builder import Builder, Built, Draft, Room
from llama_orch.runtime.library import FileLibrary, Library, Model


class PlanError(Exception):
    """The settings cannot be served on this machine. `problems` are sentences for the user."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. Every replica of `pools` has its engine and spec in `replicas`; `builder` makes more pools."""

    pools: list[Pool]
    devices: list[Device]
    replicas: dict[str, tuple[Engine, ReplicaSpec]]
    builder: Builder


def make_plan(
    settings: Settings, engines: Mapping[str, Engine], sources: Sequence[Source], library: Library | None = None
) -> Plan:
    return plan_with(Builder(engines, sources, library or FileLibrary()), settings)


def plan_with(builder: Builder, settings: Settings) -> Plan:
    """Raises PlanError, with a sentence for each pool that this machine cannot serve."""
    problems: list[str] = []
    drafts: list[Draft] = []
    for pool in settings.pools:
        try:
            drafts.append(builder.draft(pool, _model(builder, pool)))
        except _Unservable as error:
            problems.append(f"pool {pool.id}: {error}")
    if problems:
        raise PlanError(problems)
    devices = [source.device for source in builder.sources.values()]
    _seat_all(builder, drafts, devices)
    built = [_build(builder, draft) for draft in drafts]
    workers = {
        name: (*worker, one.pool.spec.keep_alive_s is None) for one in built for name, worker in one.workers.items()
    }
    return Plan([one.pool for one in built], devices, _share_threads(builder, workers), builder)


def _seat_all(builder: Builder, drafts: list[Draft], devices: list[Device]) -> None:
    """First a place for each replica that stays, then what is left over for more slots. What is loaded when it is
    needed, and makes room again, only has to fit its device while that is empty."""
    room = Room({device.device_id: device.vram_free_bytes - RESERVE_BYTES for device in devices})
    staying = [draft for draft in drafts if draft.settings.keep_alive_ms is None]
    for draft in staying:
        builder.seat(draft, room)
    growing = staying
    while growing:
        growing = [draft for draft in growing if builder.widen(draft, room)]
    empty = empty_room(devices)
    for draft in drafts:
        if draft.settings.keep_alive_ms is not None:
            seat_alone(builder, draft, empty)


def empty_room(devices: Sequence[Device]) -> Room:
    """What the devices have to give while nothing is on them. The rest of the machine needs main memory always."""
    taken = {d.device_id: d.external_bytes if d.backend == "cpu" else 0 for d in devices}
    return Room({d.device_id: d.vram_total_bytes - taken[d.device_id] - RESERVE_BYTES for d in devices})


def seat_alone(builder: Builder, draft: Draft, room: Room) -> None:
    """Places for replicas of which each has its device to itself."""
    builder.seat(draft, room, claim=False)
    for seat in draft.seats:
        alone = Draft(draft.settings, draft.engine, draft.model, [seat])
        while builder.widen(alone, room.beside(seat.need_bytes), claim=False):
            pass


def _build(builder: Builder, draft: Draft) -> Built:
    state = ReplicaState.LOADING if draft.settings.keep_alive_ms is None else ReplicaState.UNLOADED
    return builder.build(draft, state=state)


class _Unservable(Exception):
    """Why a pool cannot be served on this machine."""


def _model(builder: Builder, pool: PoolSettings) -> Model:
    if pool.engine not in builder.engines:
        hint = "; install it with: pip install 'llama-orch[ctransformers]'" if pool.engine == "ctransformers" else ""
        raise _Unservable(f"engine {pool.engine!r} is not installed here{hint}")
    try:
        model = builder.library.look(pool.model)
    except ModelNotFound as error:
        raise _Unservable(str(error)) from error
    known = builder.sources.keys()
    missing = [] if pool.devices == "auto" else [one for one in pool.devices if one not in known]
    if missing:
        raise _Unservable(f"there is no device {', '.join(missing)}; this machine has: {', '.join(sorted(known))}")
    problem = model_problem(builder.engines[pool.engine], model, pool.ctx)
    if problem is not None:
        raise _Unservable(problem)
    return model


def model_problem(engine: Engine, model: Model, ctx: int) -> str | None:
    """Why the engine cannot serve the model with this much context. llama.cpp would quietly grant less; a context that
    was asked for is never lowered in silence."""
    if (model.path is None) is not engine.traits.is_remote:
        need = "a model of a server elsewhere, as in openai:NAME/MODEL" if engine.traits.is_remote else "a model file"
        return f"engine {engine.traits.name} needs {need}, and {model.reference!r} is none"
    if model.path is None:
        return None  # what its server does not have shows once that is asked
    refusal = engine.refusal(model.path)
    if refusal is not None:
        return refusal
    if model.ctx_trained is not None and ctx > model.ctx_trained:
        trained = model.ctx_trained
        return f"ctx is {ctx} tokens, but the model was trained with {trained}; set ctx to at most {trained}"
    return None


def _share_threads(
    builder: Builder, workers: dict[str, tuple[Engine, ReplicaSpec, bool]]
) -> dict[str, tuple[Engine, ReplicaSpec]]:
    """Now that all are known that stay loaded and compute on the CPU."""
    return {
        replica_id: (engine, replace(spec, threads=builder.threads(spec.backend, is_staying=is_staying)))
        for replica_id, (engine, spec, is_staying) in workers.items()
    }
