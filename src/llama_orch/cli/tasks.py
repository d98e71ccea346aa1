"""`llama-orch tasks`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from llama_orch.cli.connection import connected
from llama_orch.cli.options import Json
from llama_orch.cli.output import clean, command, note, print_facts, print_json, print_table
from llama_orch.contract.models import TaskState, TaskStatus

app = typer.Typer(help="List, read and cancel tasks.", invoke_without_command=True)
TaskId = Annotated[str, typer.Argument(metavar="ID", help="The task's id.")]
_COLUMNS = ("task", "state", "priority", "pool", "replica", "place", "in", "out", "created", "error")


@app.callback()
def tasks(
    context: typer.Context,
    state: Annotated[TaskState | None, typer.Option(help="Only tasks in this state.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=200, help="At most this many.")] = 50,
    cursor: Annotated[str | None, typer.Option(help="Where the page before ended.")] = None,
    as_json: Json = False,
) -> None:
    """List tasks, newest first."""
    if context.invoked_subcommand is None:
        _list(state, limit, cursor, as_json)
    elif state or cursor or as_json:
        raise typer.BadParameter("options of the list stand without a command; --json goes behind the command")


@command
def _list(state: TaskState | None, limit: int, cursor: str | None, as_json: bool) -> None:
    with connected(os.environ) as client:
        page = client.list_tasks(state=state, limit=limit, cursor=cursor)
    if as_json:
        return print_json(page)
    print_table(_COLUMNS, map(_row, page.items))
    if page.next_cursor:
        note(f"there are more: --cursor {page.next_cursor}")


def _row(task: TaskStatus) -> tuple[object, ...]:
    code = None if task.error is None else task.error.code
    place = (task.state, task.priority, task.pool_id, task.replica_id, task.queue_position)
    return (task.task_id, *place, task.tokens_in, task.tokens_out, task.created_at, code)


@app.command()
@command
def get(task_id: TaskId, as_json: Json = False) -> None:
    """Show one task, with its answer once it has ended."""
    import msgspec

    with connected(os.environ) as client:
        task = client.get_task(task_id)
    if as_json:
        return print_json(task)
    facts = msgspec.structs.asdict(task)
    text = facts.pop("text")
    facts["error"] = None if task.error is None else f"{task.error.code}: {task.error.message}"
    print_facts(facts)
    if text is not None:
        typer.echo("\n" + clean(text))


@app.command()
@command
def cancel(task_id: TaskId) -> None:
    """Cancel a task; one that has ended is left as it is."""
    with connected(os.environ) as client:
        client.cancel(task_id)
    note("canceled, or ended before")
