"""`llama-orch pools`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from llama_orch.cli.connection import connected
from llama_orch.cli.options import Json
from llama_orch.cli.output import command, note, print_facts, print_json, print_table

app = typer.Typer(help="List pools and show their health.", invoke_without_command=True)
PoolId = Annotated[str, typer.Argument(metavar="ID", help="The pool's id.")]
_PAGE = 200  # more than a configuration may have pools
_COLUMNS = ("pool", "engine", "model", "ctx", "slots", "waiting", "queue", "ready")
_REPLICA_COLUMNS = ("replica", "devices", "state", "busy", "slots", "restarts", "last error")


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
        rows.append((pool.id, engine, pool.model, pool.ctx, pool.slots_total, waiting, queue, pool.ready))
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
def health(pool_id: PoolId, as_json: Json = False) -> None:
    """Show how a pool and its replicas fare."""
    import msgspec

    with connected(os.environ) as client:
        health = client.pool_health(pool_id)
    if as_json:
        return print_json(health)
    facts = msgspec.structs.asdict(health)
    replicas, metrics = facts.pop("replicas"), facts.pop("metrics")
    print_facts(facts | msgspec.structs.asdict(metrics))
    typer.echo("")
    print_table(_REPLICA_COLUMNS, (msgspec.structs.astuple(replica) for replica in replicas))
