"""`llama-orch sessions`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from llama_orch.cli.connection import connected
from llama_orch.cli.options import Json
from llama_orch.cli.output import command, note, print_facts, print_json

app = typer.Typer(help="Read and end sessions.", no_args_is_help=True)
SessionId = Annotated[str, typer.Argument(metavar="ID", help="The session's id, as its tasks name it.")]


@app.command()
@command
def get(session_id: SessionId, as_json: Json = False) -> None:
    """Show what a session has left, and whether an engine holds its context."""
    import msgspec

    with connected(os.environ) as client:
        session = client.session(session_id)
    if as_json:
        return print_json(session)
    print_facts(msgspec.structs.asdict(session))


@app.command()
@command
def rm(session_id: SessionId) -> None:
    """End a session: frees its context and its budgets. Its id may be used again."""
    with connected(os.environ) as client:
        client.delete_session(session_id)
    note("ended, or there was none")
