"""`llama-orch backup` and `llama-orch restore`: the state of this machine's home folder. They need no server."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from llama_orch.cli.output import DONE, FAILED, command, note


@command
def backup(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder, or an empty one.")],
) -> int:
    """Copy catalog and artifacts to a folder, also while the server runs. Token and models are not copied."""
    from llama_orch.settings import Home

    copied = _reported(_copying().back_up, Home.of(os.environ).path, folder)
    if copied is None:
        return FAILED
    for digest in copied.damaged:
        note(f"error: artifact {digest} is damaged on the disk, and is not in the backup")
    note(f"backed up {copied.artifacts} artifacts")
    return FAILED if copied.damaged else DONE


@command
def restore(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What `backup` has made.")],
) -> int:
    """Put a backup in the place of catalog and artifacts. The server must not run."""
    from llama_orch import home_lock
    from llama_orch.settings import Home

    home = Home.of(os.environ).create()
    with home_lock.hold(home):
        copied = _reported(_copying().restore, folder, home.path)
    if copied is None:
        return FAILED
    note(f"restored {copied.artifacts} artifacts")
    return DONE


def _copying() -> Any:
    """The stores lie beside the command line, not below it: like the server, they are started as another program."""
    return importlib.import_module("llama_orch.stores.backup")


def _reported(act: Any, *paths: Path) -> Any:
    """What the act returns; None where it failed, which is told."""
    try:
        return act(*paths)
    except _copying().BackupError as error:
        note(f"error: {error}")
        return None
