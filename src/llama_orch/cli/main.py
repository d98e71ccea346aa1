"""`llama-orch`: the commands by name. What is slow to import is imported by the command that needs it."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from llama_orch import __version__
from llama_orch.cli import artifacts, backup, capabilities, config, pools, run, serve, sessions, simulate, tasks, token

# Plain help: typer's decorated one loads rich first, and its decorated tracebacks show local values, so also tokens.
app = typer.Typer(
    name="llama-orch",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def llama_orch(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """One queue for the language models of one workstation.

    Environment: LLORCH_URL (the server), LLORCH_API_TOKEN, LLORCH_HOME (state), LLORCH_CONFIG.

    Exit codes: 0 done, 1 failed, 2 usage, 75 try again later, 130 interrupted.
    """


app.command()(serve.serve)
app.command()(run.run)
app.add_typer(tasks.app, name="tasks")
app.add_typer(sessions.app, name="sessions")
app.add_typer(pools.app, name="pools")
app.add_typer(artifacts.app, name="artifacts")
app.command()(backup.backup)
app.command()(backup.restore)
app.command()(capabilities.capabilities)
app.command()(token.token)
app.command()(simulate.simulate)
app.add_typer(config.app, name="config")


def main() -> None:
    _open_what_is_closed()
    app(prog_name="llama-orch")


def _open_what_is_closed() -> None:
    """A shell can start us without stdin, stdout or stderr (`>&-`): then reading finds the end, and writing fails as on
    any stream that cannot take it, instead of with an attribute of None."""
    # stdout as a stream that cannot be written to: who closed it wants no answer, and `run` cancels its task.
    streams = (("stdin", "r", os.O_RDONLY), ("stdout", "w", os.O_RDONLY), ("stderr", "w", os.O_WRONLY))
    for number, (name, mode, flags) in enumerate(streams):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, flags)
            if descriptor != number:
                os.dup2(descriptor, number)
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115  # for the length of the program
