"""`llama-orch models`: what the catalog has, and what it says of it.

A verification and a retirement go on in the service, whatever becomes of the command that began them: waiting is only
looking on.
"""

from __future__ import annotations

import os
import sys
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llama_orch.cli.connection import connected
from llama_orch.cli.options import Json
from llama_orch.cli.output import DONE, FAILED, UsageError, command, note, print_facts, print_json, print_table, size
from llama_orch.contract.models import (
    CatalogModel,
    CatalogModelRequest,
    FetchState,
    ModelFetch,
    ModelState,
    ModelStateRequest,
    VerificationOutcome,
    VerificationState,
)

if TYPE_CHECKING:
    from llama_orch.client import Client

app = typer.Typer(help="List models of the catalog; enter, verify, retire and delete them.", no_args_is_help=True)
ModelId = Annotated[str, typer.Argument(metavar="ID", help="The model's id in the catalog.")]
_COLUMNS = ("model", "state", "verification", "size", "vram", "architecture", "quantisation", "source", "tags")
_OVER = (VerificationState.DONE, VerificationState.UNVERIFIED)
_FILE_BYTES_MAX = 1 << 20
_BAR_CELLS = 30


@app.command("ls")
@command
def list_(
    limit: Annotated[int, typer.Option("-n", "--limit", min=1, max=200, help="How many.")] = 50,
    as_json: Json = False,
) -> None:
    """List the models of the catalog."""
    with connected(os.environ) as client:
        page = client.models(limit=limit)
    if as_json:
        return print_json(page)
    print_table(_COLUMNS, map(_row, page.items))
    if page.next_cursor:
        note(f"there are more models than {limit}: use --limit; --json has the cursor")


def _row(model: CatalogModel) -> tuple[object, ...]:
    gguf = model.gguf
    kind = (None, None, None) if gguf is None else (_size(gguf.vram_bytes), gguf.architecture, gguf.quantisation)
    verification = model.verification.outcome or model.verification.state
    return (model.id, model.state, verification, _size(model.size_bytes), *kind, model.source_url, model.tags)


def _size(size_bytes: int | None) -> str | None:
    return None if size_bytes is None else size(size_bytes)


@app.command()
@command
def show(model_id: ModelId, as_json: Json = False) -> None:
    """Show one model: what was declared of it, and what it was found to be."""
    with connected(os.environ) as client:
        model = client.model(model_id)
    _print(model, as_json)


def _print(model: CatalogModel, as_json: bool) -> None:
    import msgspec

    if as_json:
        return print_json(model)
    facts = msgspec.to_builtins(model)
    nested = {name: facts.pop(name) or {} for name in ("verification", "gguf", "trust_policy")}
    facts |= {f"{name} {key}": value for name, part in nested.items() for key, value in part.items()}
    facts |= {name: len(facts[name]) for name in ("manifests", "signatures")}
    print_facts(facts)


@app.command()
@command
def add(
    model_id: Annotated[str, typer.Argument(metavar="ID", help="How tasks and pools will name it.")],
    source_url: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="`builtin:tiny`, `file:` and a path, `hf:org/repo/file.gguf`, or `https:…`."
        ),
    ],
    digest: Annotated[str | None, typer.Option(metavar="sha256:…", help="What the file must be.")] = None,
    tag: Annotated[list[str] | None, typer.Option(metavar="TAG", help="May be given more than once.")] = None,
    declared: Annotated[
        Path | None,
        typer.Option(
            "--declared", metavar="FILE", help="JSON with more of the entry: `manifests`, `signatures`, `sbom`."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Enter a model into the catalog. The same entry again changes nothing."""
    given = {} if declared is None else _read(declared)
    fields = {"id": model_id, "source_url": source_url, "digest": digest, "tags": tag}
    given |= {name: value for name, value in fields.items() if value}
    request = _checked(CatalogModelRequest, "entry", given)
    with connected(os.environ) as client:
        model = client.create_model(request)
    _print(model, as_json)


def _read(path: Path) -> dict[str, Any]:
    import msgspec

    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(_FILE_BYTES_MAX), type=dict[str, Any])
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise UsageError(f"{path} is no JSON object: {error}") from error


def _checked(type: type[Any], what: str, fields: dict[str, Any]) -> Any:
    """Refuse here what the service would refuse."""
    import msgspec

    try:
        value = msgspec.convert(fields, type)
        msgspec.json.encode(value)  # an argument that was not UTF-8 cannot be encoded
    except (msgspec.ValidationError, UnicodeError) as error:
        raise UsageError(f"the {what} would be refused: {error}") from error
    return value


@app.command()
@command
def verify(
    model_id: ModelId,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the outcome.")] = True,
    as_json: Json = False,
) -> int:
    """Have a model's file hashed and held against what was declared. The exit code is 1 where it failed."""
    with connected(os.environ) as client:
        client.verify_model(model_id)
        model = _outcome(client, model_id) if wait else client.model(model_id)
    _print(model, as_json)
    return FAILED if wait and model.verification.outcome is not VerificationOutcome.PASSED else DONE


def _outcome(client: Client, model_id: str) -> CatalogModel:
    """The model once its verification is over. Progress is on stderr."""
    said = ""
    try:
        for model in chain([client.model(model_id)], client.watch_model(model_id)):
            if model.verification.state in _OVER:
                _tell(model)
                return model
            if (news := _progress(model)) != said:
                note(said := news)
    except KeyboardInterrupt:
        note(f"interrupted: the verification goes on; llama-orch models show {model_id} has its outcome")
        raise
    raise AssertionError("a watch has no end")


def _progress(model: CatalogModel) -> str:
    verification = model.verification
    if verification.state is VerificationState.QUEUED or not verification.total_bytes:
        return f"verification {verification.state}"
    share = (verification.read_bytes or 0) * 100 // verification.total_bytes
    return f"verifying: {share} % of {size(verification.total_bytes)}"


def _tell(model: CatalogModel) -> None:
    for problem in model.verification.problems:
        note(f"error: {problem}")
    for warning in model.verification.warnings:
        note(f"warning: {warning}")


@app.command()
@command
def fetch(
    model_id: ModelId,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the file is there.")] = True,
    as_json: Json = False,
) -> int:
    """Fetch a model's file from where its source says. The exit code is 1 where that failed."""
    with connected(os.environ) as client:
        client.fetch_model(model_id)
        model = _fetched(client, model_id) if wait else client.model(model_id)
    _print(model, as_json)
    return FAILED if wait and model.fetch is not None and model.fetch.state is not FetchState.DONE else DONE


def _fetched(client: Client, model_id: str) -> CatalogModel:
    """The model once nothing comes any more. Progress is a bar at a terminal, else lines on stderr."""
    try:
        with _Bar() as bar:
            for model in chain([client.model(model_id)], client.watch_model(model_id)):
                if model.fetch is None or model.fetch.state not in (FetchState.QUEUED, FetchState.RUNNING):
                    break
                bar.show(model.fetch)
    except KeyboardInterrupt:
        note(f"interrupted: the fetch goes on; llama-orch models show {model_id} has its outcome")
        raise
    if model.fetch is not None and model.fetch.error is not None:
        note(f"error: {model.fetch.error}")
    return model


class _Bar:
    """How much has come. Only at a terminal is a line written over."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._said = ""

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_terminal and self._said:
            sys.stderr.write("\n")

    def show(self, fetch: ModelFetch) -> None:
        if fetch.state is FetchState.QUEUED or not fetch.total_bytes:
            news = f"fetch {fetch.state}: {size(fetch.received_bytes)}"
        else:
            share = fetch.received_bytes / fetch.total_bytes
            done = round(share * _BAR_CELLS)
            bar = "#" * done + "." * (_BAR_CELLS - done)
            news = f"fetching [{bar}] {share:4.0%} of {size(fetch.total_bytes)}"
        if news == self._said:
            return
        self._said = news
        if self._is_terminal:
            sys.stderr.write(f"\r\x1b[K{news}")
            sys.stderr.flush()
        else:
            note(news)


@app.command()
@command
def retire(
    model_id: ModelId,
    deadline_ms: Annotated[
        int | None, typer.Option(metavar="N", help="Milliseconds that its tasks may still take; default: to their end.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Give a model no new tasks, and unload it once the running ones have ended."""
    _put(model_id, ModelState.RETIRED, deadline_ms, as_json)


@app.command()
@command
def activate(model_id: ModelId, as_json: Json = False) -> None:
    """Put a retired model back in service."""
    _put(model_id, ModelState.ACTIVE, None, as_json)


def _put(model_id: str, state: ModelState, deadline_ms: int | None, as_json: bool) -> None:
    _checked(ModelStateRequest, "change", {"state": state, "deadline_ms": deadline_ms})
    with connected(os.environ) as client:
        model = client.put_model_in_state(model_id, state, deadline_ms=deadline_ms)
    _print(model, as_json)


@app.command()
@command
def rm(model_ids: Annotated[list[str], typer.Argument(metavar="ID…", help="Models of the catalog.")]) -> None:
    """Take models out of the catalog. Their files stay."""
    with connected(os.environ) as client:
        for model_id in model_ids:
            client.delete_model(model_id)
            note(f"{model_id} is out of the catalog")
