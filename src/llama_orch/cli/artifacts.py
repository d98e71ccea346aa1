"""`llama-orch artifacts`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llama_orch.cli.connection import connected
from llama_orch.cli.options import Json
from llama_orch.cli.output import UsageError, command, note, print_facts, print_json, print_table, to_json
from llama_orch.contract.models import ArtifactKind, ArtifactRef

if TYPE_CHECKING:
    from llama_orch.client import Client

app = typer.Typer(help="Store, read, list and delete artifacts.", no_args_is_help=True)
ArtifactId = Annotated[str, typer.Argument(metavar="ID", help="The artifact's id.")]
Kind = Annotated[ArtifactKind | None, typer.Option(help="Only of this kind.")]
Tag = Annotated[str | None, typer.Option(help="Only with this tag.")]
_COLUMNS = ("artifact", "kind", "bytes", "created", "tags")  # a parent would take the place of all else
_PAGE = 200


@app.command()
@command
def put(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A JSON object; - reads it from standard input.")],
    kind: Annotated[ArtifactKind, typer.Option(help="What it is for.")] = ArtifactKind.OTHER,
    tag: Annotated[list[str] | None, typer.Option(help="To find it by; may be given several times.")] = None,
    parent: Annotated[str | None, typer.Option(metavar="ID", help="The artifact that it comes from.")] = None,
    metadata: Annotated[str | None, typer.Option(metavar="JSON", help="An object about it.")] = None,
    as_json: Json = False,
) -> None:
    """Store an artifact and print its id, which is the SHA-256 of its content."""
    import msgspec

    from llama_orch.contract.models import Artifact

    fields: dict[str, Any] = {"kind": kind, "content": _object(_text(file), file), "tags": tag or [], "parent": parent}
    if metadata is not None:
        fields["metadata"] = _object(metadata.encode("utf-8", "surrogateescape"), "--metadata")
    try:
        artifact = msgspec.convert(fields, Artifact)
        msgspec.json.encode(artifact)  # an argument that was not UTF-8, or a number that is too large, cannot be sent
    except (msgspec.ValidationError, UnicodeError, OverflowError) as error:
        raise UsageError(f"the artifact would be refused: {error}") from error
    with connected(os.environ) as client:
        ref = client.put_artifact(artifact)
    print_json(ref) if as_json else typer.echo(ref.id)


def _text(file: str) -> bytes:
    if file == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from error


def _object(text: bytes, name: str) -> dict[str, Any]:
    import msgspec

    try:
        value: dict[str, Any] = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise UsageError(f"{name} holds no JSON object: {error}") from error
    return value


@app.command()
@command
def get(artifact_id: ArtifactId, as_json: Json = False) -> None:
    """Show an artifact, its content as JSON."""
    import msgspec

    with connected(os.environ) as client:
        artifact = client.get_artifact(artifact_id)
    if as_json:
        return print_json(artifact)
    facts = msgspec.structs.asdict(artifact)
    content, facts["metadata"] = facts.pop("content"), to_json(artifact.metadata)
    facts["created_ms"] = _when(artifact.created_ms)
    print_facts(facts)
    typer.echo("\n" + to_json(content))


@app.command()
@command
def ls(
    kind: Kind = None,
    tag: Tag = None,
    parent: Annotated[str | None, typer.Option(metavar="ID", help="Only those that come from this one.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=200, help="At most this many.")] = 50,
    cursor: Annotated[str | None, typer.Option(help="Where the page before ended.")] = None,
    as_json: Json = False,
) -> None:
    """List artifacts, newest first."""
    with connected(os.environ) as client:
        page = client.list_artifacts(kind=kind, tag=tag, parent=parent, limit=limit, cursor=cursor)
    if as_json:
        return print_json(page)
    print_table(_COLUMNS, map(_row, page.items))
    if page.next_cursor:
        note(f"there are more: --cursor {page.next_cursor}")


def _row(ref: ArtifactRef) -> tuple[object, ...]:
    return (ref.id, ref.kind, ref.size_bytes, _when(ref.created_ms), ref.tags)


def _when(created_ms: int) -> str:
    from llama_orch.clock import timestamp

    return timestamp(created_ms / 1000)


@app.command()
@command
def rm(artifact_id: ArtifactId) -> None:
    """Delete an artifact. Those that come from it stay."""
    with connected(os.environ) as client:
        client.delete_artifact(artifact_id)
    note("deleted")


@app.command()
@command
def tree(artifact_id: ArtifactId, as_json: Json = False) -> None:
    """Show an artifact and what comes from it, each below its parent."""
    import msgspec

    with connected(os.environ) as client:
        root = client.get_artifact(artifact_id)
        ref = ArtifactRef(**{name: getattr(root, name) for name in ArtifactRef.__struct_fields__})
        nodes = list(_below(client, ref))
    if as_json:
        return print_json([msgspec.structs.asdict(ref) | {"depth": depth} for depth, ref in nodes])
    print_table(_COLUMNS, [("  " * depth + ref.id, *_row(ref)[1:]) for depth, ref in nodes])


def _below(client: Client, root: ArtifactRef) -> Iterator[tuple[int, ArtifactRef]]:
    """(depth, artifact) of a lineage, the oldest child first. Each comes once: one that was deleted and stored anew may
    name its own descendant as its parent."""
    waiting, seen = [(0, root)], {root.id}
    while waiting:
        depth, ref = waiting.pop()
        yield depth, ref
        for child in _children(client, ref.id):
            if child.id not in seen:
                seen.add(child.id)
                waiting.append((depth + 1, child))


def _children(client: Client, parent: str) -> Iterator[ArtifactRef]:
    cursor = None
    while True:
        page = client.list_artifacts(parent=parent, limit=_PAGE, cursor=cursor)
        yield from page.items
        if (cursor := page.next_cursor) is None:
            return
