"""`llama-orch token`."""

from __future__ import annotations

import os

import typer

from llama_orch.cli.options import Json
from llama_orch.cli.output import command, note, print_json


@command
def token(as_json: Json = False) -> None:
    """Print the API token; make one where there is none."""
    from llama_orch.settings import Home, api_token

    home = Home.of(os.environ)
    value, source = api_token(home, os.environ, create=True)
    if source == "generated":
        note(f"made a new token in {home.token_file}")
    if as_json:
        print_json({"token": value, "source": source})
    else:
        typer.echo(value)
