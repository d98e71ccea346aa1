"""What the command line prints: results on stdout, everything else on stderr, exit codes.

Invariant: no control character of the server's (model text, names, messages) reaches a terminal, where it could move
the cursor, change the title or paste into the prompt. Newline and tab pass in text; JSON carries the rest escaped.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec

import typer

if TYPE_CHECKING:
    from llama_orch.contract.models import Error

DONE, FAILED, USAGE, TRY_LATER, INTERRUPTED = 0, 1, 2, 75, 130
_NOT_PRINTED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_NOT_IN_A_CELL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
_RAW_IN_JSON = re.compile(r"[\x7f-\x9f]")  # JSON escapes the lower ones itself
_TABLE_COLUMNS = 160  # where stdout is no terminal

P = ParamSpec("P")


class UsageError(Exception):
    """The command line or the environment asks for what cannot be; exit code 2."""


def clean(text: str) -> str:
    """`text` without control characters other than newline and tab."""
    return _NOT_PRINTED.sub("", text)


def note(message: str) -> None:
    """A line on stderr."""
    typer.echo(clean(message), err=True)


def to_json(value: object) -> str:
    """One line of JSON without raw control characters."""
    import msgspec

    return _RAW_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", msgspec.json.encode(value).decode())


def print_json(value: object) -> None:
    typer.echo(to_json(value))


def print_table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    width = None if sys.stdout.isatty() else _TABLE_COLUMNS
    Console(width=width, markup=False, emoji=False, highlight=False).print(table)


def print_facts(facts: dict[str, object]) -> None:
    """A thing's fields below each other."""
    width = max(map(len, facts))
    for name, value in facts.items():
        typer.echo(f"{name:<{width}}  {_cell(value)}")


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value)) or "-"
    return _NOT_IN_A_CELL.sub(" ", str(value))


def size(size_bytes: int) -> str:
    """Bytes of memory for people."""
    gib = size_bytes / (1 << 30)
    return f"{gib:.1f} GiB" if gib >= 1 else f"{size_bytes / (1 << 20):.0f} MiB"


def print_error(error: Error) -> None:
    """The server's error, with what to do next."""
    from msgspec import UNSET

    note(f"error: {error.message}")
    engine = f", engine {error.engine}" if error.engine else ""
    note(f"code {error.code}{engine}, correlation id {error.correlation_id}")
    if error.code == "UNAUTHORIZED":
        note("set LLORCH_API_TOKEN to the server's token, or LLORCH_HOME to its home folder")
    if error.retry_after_ms is not UNSET and error.retriable is True:
        note(f"try again in {error.retry_after_ms / 1000:g} s")


def exit_code(error: Error, status: int | None = None) -> int:
    """75 where a later try can work, else 1. An `error` frame's status is the one of its code."""
    from llama_orch.contract.codes import CODES

    status = CODES[error.code].http_status if status is None else status
    return TRY_LATER if status in (429, 503) else FAILED


@contextmanager
def reported() -> Iterator[None]:
    """Turn the failures that a user can meet into a message and an exit code."""
    from llama_orch.settings import SettingsError

    try:
        yield
        sys.stdout.flush()  # a closed pipe shows here and not in the interpreter's last breath
    except SettingsError as error:
        for problem in error.problems:
            note(f"error: {problem}")
        raise typer.Exit(FAILED) from error
    except UsageError as error:
        note(f"error: {error}")
        raise typer.Exit(USAGE) from error
    except BrokenPipeError as error:
        silence_stdout()
        raise typer.Exit(DONE) from error  # the reader has what it wanted
    except OSError as error:
        silence_stdout()
        note(f"error: the output could not be written: {error.strerror or error}")
        raise typer.Exit(FAILED) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(INTERRUPTED) from error


def command(function: Callable[P, Any]) -> Callable[P, None]:
    """`function` as a command: its failures are reported, its result is the exit code (None: 0)."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with reported():
            code = function(*args, **kwargs)
        raise typer.Exit(code or DONE)

    return run


def silence_stdout() -> None:
    """Nobody reads stdout any more: let what is still to be written vanish."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
