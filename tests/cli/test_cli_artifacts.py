"""`llama-orch artifacts`, and the client's calls behind it, against the application on a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Invoke
from typer.testing import CliRunner

from llama_orch.cli.main import app
from llama_orch.client import ApiError, AsyncClient, Client
from llama_orch.contract.models import Artifact, ArtifactKind, ErrorCode
from tests.api.artifacts_fake import FULL_DISK
from tests.api.harness import Server, serving

TOKEN = "cli-0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with serving(token=TOKEN) as server:
        yield server


@pytest.fixture
def server(running: Server) -> Server:
    running.service.stored.clear()
    return running


@pytest.fixture
def artifacts(llama_orch: Invoke, server: Server) -> Invoke:
    env = {"LLORCH_URL": f"http://127.0.0.1:{server.port}", "LLORCH_API_TOKEN": TOKEN}
    return lambda *arguments: llama_orch("artifacts", *arguments, **env)


def stored(artifacts: Invoke, folder: Path, content: object, *options: str) -> str:
    file = folder / "content.json"
    file.write_text(json.dumps(content))
    result = artifacts("put", str(file), *options)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


@pytest.mark.spec("HP-ART-1")
def test_put_get_ls_rm(artifacts: Invoke, server: Server, tmp_path: Path) -> None:
    root = stored(artifacts, tmp_path, {"steps": ["read"]}, "--kind", "plan")
    child = stored(
        artifacts,
        tmp_path,
        {"+": 1},
        "--kind",
        "diff",
        "--tag",
        "a",
        "--tag",
        "b",
        "--parent",
        root,
        "--metadata",
        "{}",
    )
    assert server.service.stored[child].tags == ["a", "b"]
    shown = artifacts("get", child)
    assert shown.exit_code == 0
    assert '{"+":1}' in shown.stdout
    assert json.loads(artifacts("get", child, "--json").stdout)["parent"] == root
    assert [line.split()[0] for line in artifacts("ls").stdout.splitlines()[1:]] == [child, root]
    page = json.loads(artifacts("ls", "--kind", "plan", "--json").stdout)
    assert [ref["id"] for ref in page["items"]] == [root]
    assert "--cursor 1" in artifacts("ls", "--limit", "1").stderr
    assert artifacts("ls", "--tag", "b", "--parent", root).stdout.count(child) == 1
    assert artifacts("rm", root).exit_code == 0
    gone = artifacts("get", root)
    assert (gone.exit_code, "code NOT_FOUND" in gone.stderr) == (1, True)


def test_put_reads_standard_input(server: Server, llama_orch: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLORCH_URL", f"http://127.0.0.1:{server.port}")
    monkeypatch.setenv("LLORCH_API_TOKEN", TOKEN)
    result = CliRunner().invoke(app, ["artifacts", "put", "-", "--json"], input=b'{"t": "w\xc3\xb6rld"}')
    assert json.loads(result.stdout)["kind"] == "other"
    (artifact,) = server.service.stored.values()
    assert artifact.content == {"t": "wörld"}


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        (b"[1]", [], "holds no JSON object"),
        (b'{"a":', [], "holds no JSON object"),
        (b'{"a": "\xff"}', [], "holds no JSON object"),
        (b"{}", ["--metadata", "1"], "--metadata holds no JSON object"),
        (b"{}", ["--tag", ""], "would be refused"),
        (b"{}", ["--kind", "plans"], "Invalid value"),
    ],
)
def test_what_would_be_refused_is_a_usage_error(
    artifacts: Invoke, server: Server, tmp_path: Path, content: bytes, options: list[str], says: str
) -> None:
    file = tmp_path / "content.json"
    file.write_bytes(content)
    result = artifacts("put", str(file), *options)
    assert (result.exit_code, says in result.stderr) == (2, True), result.stderr
    assert server.service.stored == {}


def test_a_file_that_is_not_there_is_a_usage_error(artifacts: Invoke, tmp_path: Path) -> None:
    result = artifacts("put", str(tmp_path / "absent"))
    assert (result.exit_code, "No such file" in result.stderr) == (2, True)


@pytest.mark.spec("HP-CTL-5")
def test_a_full_disk_is_told(artifacts: Invoke, tmp_path: Path) -> None:
    (tmp_path / "content.json").write_text("{}")
    result = artifacts("put", str(tmp_path / "content.json"), "--tag", FULL_DISK)
    assert (result.exit_code, "code STORAGE_UNAVAILABLE" in result.stderr) == (1, True)


@pytest.mark.spec("HP-ART-1")
def test_a_tree_has_each_below_its_parent(artifacts: Invoke, tmp_path: Path) -> None:
    root = stored(artifacts, tmp_path, {"n": 0})
    left, right = (stored(artifacts, tmp_path, {"n": n}, "--parent", root) for n in (1, 2))
    leaf = stored(artifacts, tmp_path, {"n": 3}, "--parent", left)
    lines = artifacts("tree", root).stdout.splitlines()[1:]
    assert [(len(line) - len(line.lstrip()), line.split()[0]) for line in lines] == [
        (0, root),
        (2, left),
        (4, leaf),
        (2, right),
    ]
    nodes = json.loads(artifacts("tree", root, "--json").stdout)
    assert [(node["depth"], node["id"]) for node in nodes] == [(0, root), (1, left), (2, leaf), (1, right)]


def test_a_tree_that_bites_its_tail_ends(artifacts: Invoke, tmp_path: Path) -> None:
    """Deleted and stored anew, an artifact may come from its own descendant."""
    root = stored(artifacts, tmp_path, {"n": 0})
    child = stored(artifacts, tmp_path, {"n": 1}, "--parent", root)
    artifacts("rm", root)
    assert stored(artifacts, tmp_path, {"n": 0}, "--parent", child) == root
    assert [node["id"] for node in json.loads(artifacts("tree", root, "--json").stdout)] == [root, child]


@pytest.mark.spec("HP-ART-1")
def test_both_clients_store_read_list_and_delete(server: Server) -> None:
    url, artifact = f"http://127.0.0.1:{server.port}", Artifact(kind=ArtifactKind.PLAN, content={"a": 1}, tags=["t"])

    async def in_a_loop() -> None:
        async with AsyncClient(url, TOKEN) as client:
            ref = await client.put_artifact(artifact)
            assert (await client.get_artifact(ref.id)).content == {"a": 1}
            assert (await client.list_artifacts(kind=ArtifactKind.PLAN, tag="t", limit=1)).items == [ref]
            await client.delete_artifact(ref.id)

    asyncio.run(in_a_loop())
    with Client(url, TOKEN) as client:
        ref = client.put_artifact(artifact)
        assert client.put_artifact(artifact) == ref
        assert client.get_artifact(ref.id).tags == ["t"]
        assert client.list_artifacts(parent=ref.id).items == []
        assert client.list_artifacts().items == [ref]
        client.delete_artifact(ref.id)
        with pytest.raises(ApiError) as refused:
            client.delete_artifact(ref.id)
    assert refused.value.code == ErrorCode.NOT_FOUND
