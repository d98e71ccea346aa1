"""`llama-orch config`: the configuration file, before a server reads it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from llama_orch.cli.options import Json
from llama_orch.cli.output import FAILED, command, note, print_json

app = typer.Typer(help="Check, describe and show the configuration.", no_args_is_help=True)
File = Annotated[
    Path | None, typer.Argument(metavar="[FILE]", help="Configuration file; default: LLORCH_CONFIG, else the defaults.")
]


@app.command()
@command
def check(file: File = None, as_json: Json = False) -> int:
    """Name everything that is wrong with the configuration."""
    from llama_orch.settings import SettingsError, load_settings

    problems: list[str] = []
    try:
        load_settings(file, os.environ)
    except SettingsError as error:
        problems = error.problems
    if as_json:
        print_json({"ok": not problems, "problems": problems})
    else:
        for problem in problems:
            note(f"error: {problem}")
        typer.echo("ok" if not problems else f"problems: {len(problems)}")
    return FAILED if problems else 0


@app.command()
@command
def schema(as_json: Json = False) -> None:
    """Print the configuration's JSON Schema."""
    from importlib.resources import files

    text = (files("llama_orch.contract") / "documents" / "config.schema.json").read_text("utf-8")
    typer.echo(text.rstrip("\n"))


@app.command()
@command
def show(file: File = None, as_json: Json = False) -> None:
    """Print every setting in force, defaults included."""
    import msgspec
    import yaml

    from llama_orch.settings import load_settings

    settings = msgspec.to_builtins(load_settings(file, os.environ))
    if as_json:
        print_json(settings)
    else:
        typer.echo(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), nl=False)
