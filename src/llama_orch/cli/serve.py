"""`llama-orch serve`."""

from __future__ import annotations

import importlib
import os
from typing import Annotated

import typer

from llama_orch.cli.options import ConfigFile
from llama_orch.cli.output import command


@command
def serve(
    config: ConfigFile = None,
    host: Annotated[str | None, typer.Option(help="Address to bind; default: the configuration's.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.")] = None,
    lifeline: Annotated[bool, typer.Option("--lifeline", hidden=True)] = False,
) -> int:
    """Run the server. SIGTERM drains it, a second one ends it at once."""
    import msgspec

    from llama_orch.settings import Home, api_token, check_bind, load_settings

    settings = load_settings(config, os.environ)
    given = {"host": host or None, "port": port}
    listener = {key: value for key, value in given.items() if value is not None}
    settings = msgspec.structs.replace(settings, server=msgspec.structs.replace(settings.server, **listener))
    home = Home.of(os.environ).create()
    token, source = api_token(home, os.environ, create=True)
    check_bind(settings.server.host, token, source == "generated")
    # The composition root lies beside the command line, not below it: it is started like another program.
    root = importlib.import_module("llama_orch.serve")
    code: int = root.run_server(settings, home, token, lifeline=lifeline)
    return code
