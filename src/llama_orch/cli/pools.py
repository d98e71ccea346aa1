"""`llama-orch pools`: what they are, how they fare, and out of service and back.

A drain and a reload go on in the service, whatever becomes of the command that began them: waiting is only
looking on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from http import HTTPStatus
from itertools import chain
from typing import Annotated

import typer

from llama_orch.cli.connection import connected
from llama_orch.cli.options import Json
from llama_orch.cli.output import (
    DONE,
    FAILED,
    UsageError,
    command,
    note,
    print_facts,
    print_json,
    print_table,
    size,
)
from llama_orch.contract.models import DrainRequest, PoolHealth, ReloadRequest, Replica, ReplicaState

app = typer.Typer(help="List pools, show their health, drain and reload them.", invoke_without_command=True)
PoolId = Annotated[str, typer.Argument(metavar="ID", help="The pool's id.")]
_PAGE = 200  # more than a configuration may have pools
_COLUMNS = ("pool", "engine", "model", "ctx", "slots", "waiting", "queue", "ready", "on demand", "keep alive")
_REPLICA_COLUMNS = ("replica", "devices", "state", "busy", "slots", "restarts", "vram reserved", "last error")
_WITHOUT_WORKER = (ReplicaState.UNLOADED, ReplicaState.STOPPED, ReplicaState.FAILED)


@app.callback()
def pools(context: typer.Context, as_json: Json = False) -> None:
    """List pools."""
    if context.invoked_subcommand is None:
        _list(as_json)
    elif as_json:
        raise typer.BadParameter("--json goes behind the command")


@command
def _list(as_json: bool) -> None:
    with connected(os.environ) as client:
        page = client.pools(limit=_PAGE)
    if as_json:
        return print_json(page)
    rows = []
    for pool in page.items:
        waiting = pool.queue_depth.interactive + pool.queue_depth.batch
        queue = f"{pool.queue.capacity} {pool.queue.full_policy}"
        engine = f"{pool.engine} {pool.engine_version}"
        life = (pool.on_demand or None, None if pool.keep_alive_ms is None else f"{pool.keep_alive_ms / 1000:.12g} s")
        rows.append((pool.id, engine, pool.model, pool.ctx, pool.slots_total, waiting, queue, pool.ready, *life))
    print_table(_COLUMNS, rows)
    if page.next_cursor:
        note("there are more pools than shown; --json has the cursor")


@app.command()
@command
def get(pool_id: PoolId, as_json: Json = False) -> None:
    """Show one pool."""
    import msgspec

    with connected(os.environ) as client:
        pool = client.pool(pool_id)
    if as_json:
        return print_json(pool)
    facts = msgspec.structs.asdict(pool)
    facts["queue"] = f"{pool.queue.capacity} places, {pool.queue.full_policy}"
    facts["queue_depth"] = f"{pool.queue_depth.interactive} interactive, {pool.queue_depth.batch} batch"
    print_facts(facts)


@app.command()
@command
def health(pool_id: PoolId, as_json: Json = False) -> int:
    """Show how a pool and its replicas fare."""
    with connected(os.environ) as client:
        health = client.pool_health(pool_id)
    return _shown(health, DONE, as_json)


def _shown(health: PoolHealth | None, code: int, as_json: bool) -> int:
    """Print the health, None where the pool is gone; `code` is handed through."""
    if as_json:
        print_json(health)
    elif health is not None:
        _print_health(health)
    return code


def _print_health(health: PoolHealth) -> None:
    import msgspec

    facts = msgspec.structs.asdict(health)
    replicas, metrics = facts.pop("replicas"), facts.pop("metrics")
    print_facts(facts | msgspec.structs.asdict(metrics))
    typer.echo("")
    print_table(_REPLICA_COLUMNS, map(_row, replicas))


def _row(replica: Replica) -> tuple[object, ...]:
    counts = (replica.slots_busy, replica.slots_total, replica.restarts)
    return (
        replica.id,
        replica.devices or "elsewhere",
        replica.state,
        *counts,
        size(replica.vram_reserved_bytes),
        replica.last_error,
    )


@app.command()
@command
def drain(
    pool_id: PoolId,
    deadline_ms: Annotated[
        int, typer.Option(metavar="N", help="Milliseconds that its tasks may still take; 0 ends them at once.")
    ] = 30_000,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait until nothing runs and nothing is loaded.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Take a pool out of service: it takes no new tasks, and its models are unloaded. `reload` brings it back."""
    _check(DrainRequest, "drain", deadline_ms=deadline_ms)
    with connected(os.environ) as client:
        begun = client.drain_pool(pool_id, deadline_ms)
        later = _until_gone(client.watch_pool(pool_id))
        health, code = _follow("drain", pool_id, begun, later, _drain_code, _drain_news) if wait else (begun, DONE)
    return _shown(health, code, as_json)


@app.command()
@command
def reload(
    pool_id: PoolId,
    model_ref: Annotated[
        str, typer.Argument(metavar="MODEL_REF", help="The new model; the present one starts the pool afresh.")
    ],
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait until the new model serves, or the old one again.")
    ] = True,
    as_json: Json = False,
) -> int:
    """Replace a pool's model. Where that fails the old one serves on."""
    _check(ReloadRequest, "reload", new_model_ref=model_ref)
    with connected(os.environ) as client:
        begun = client.reload_pool(pool_id, model_ref)
        later = client.watch_pool(pool_id)
        health, code = _follow("reload", pool_id, begun, later, _reload_code, _reload_news) if wait else (begun, DONE)
    return _shown(health, code, as_json)


def _check(type: type[object], act: str, **fields: object) -> None:
    """Refuse here what the service would refuse."""
    import msgspec

    try:
        msgspec.json.encode(msgspec.convert(fields, type))  # an argument that was not UTF-8 cannot be encoded
    except (msgspec.ValidationError, UnicodeError) as error:
        raise UsageError(f"the {act} would be refused: {error}") from error


def _follow(
    act: str,
    pool_id: str,
    begun: PoolHealth,
    later: Iterator[PoolHealth],
    code_of: Callable[[PoolHealth], int | None],
    news_of: Callable[[PoolHealth], str],
) -> tuple[PoolHealth | None, int]:
    """Look at the pool until it is clear how this ends: the health then, None where the pool is gone, and the exit
    code. News are on stderr."""
    said = ""
    try:
        for health in chain([begun], later):
            if (code := code_of(health)) is not None:
                return health, code
            if (news := news_of(health)) != said:
                note(said := news)
    except KeyboardInterrupt:
        note(f"interrupted: the {act} goes on; llama-orch pools health {pool_id} shows how")
        raise
    return None, DONE


def _until_gone(healths: Iterator[PoolHealth]) -> Iterator[PoolHealth]:
    """A pool that was made on demand goes when its model is unloaded, which is what a drain ends with."""
    from llama_orch.client import ApiError

    try:
        yield from healths
    except ApiError as error:
        if error.status != HTTPStatus.NOT_FOUND:
            raise
        note("the pool was there on demand, and is gone with its model")


def _drain_code(health: PoolHealth) -> int | None:
    if health.metrics.queue_depth == 0 and all(replica.state in _WITHOUT_WORKER for replica in health.replicas):
        return DONE
    if health.draining:
        return None
    note("error: the drain was called off; a reload puts a pool back in service")
    return FAILED


def _drain_news(health: PoolHealth) -> str:
    running = sum(replica.slots_busy for replica in health.replicas)
    states = ", ".join(replica.state for replica in health.replicas)
    return f"draining: slots busy {running}, tasks waiting {health.metrics.queue_depth}, replicas {states}"


def _reload_code(health: PoolHealth) -> int | None:
    match (health.last_reload or "").partition(":")[0]:
        case "done":
            return DONE
        case "failed":
            note(f"error: reload {health.last_reload}")
            return FAILED
        case "":
            note("error: the service knows nothing of the reload; was it restarted?")
            return FAILED
    return None


def _reload_news(health: PoolHealth) -> str:
    return health.last_reload or ""
