"""OpenAI's client for Node, from npm."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.live.client import until
from tests.live_service import LiveService

from .conftest import LIMIT_S, MODELS

pytestmark = pytest.mark.spec("HP-OAI-1", "HP-OAI-3", "HP-OAI-4")

Node = Callable[[str], Any]
SCRIPT = Path(__file__).parent / "node" / "client.mjs"


@pytest.fixture
def node(request: pytest.FixtureRequest, service: LiveService, tmp_path: Path) -> Node:
    """Has the client do something; what it saw. Its script is put beside the modules that it imports."""
    modules: Path = request.config.getoption("--node-modules") or pytest.fail("--node-modules is missing")
    (tmp_path / "node_modules").symlink_to(modules.resolve())
    script = Path(shutil.copy(SCRIPT, tmp_path))

    def run(act: str) -> Any:
        command = ["node", "--preserve-symlinks-main", str(script), service.url, service.token, act]
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * LIMIT_S)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_it_lists_the_models(node: Node) -> None:
    """Pools, and what they serve."""
    assert node("list")[: len(MODELS)] == MODELS


def test_it_chats_and_streams(node: Node) -> None:
    """The same text and the same usage either way."""
    assert node("stream") == node("chat")
    assert node("chat")["tokens"] == 8


def test_it_gets_vectors(node: Node) -> None:
    """In the encoding that it asks for."""
    assert node("vectors") == [8, 8]


@pytest.mark.spec("HP-OAI-8")
def test_it_calls_tools(node: Node) -> None:
    """Whole and in chunks, and the result goes back."""
    seen = node("tools")
    assert (seen["name"], seen["reason"], seen["streamed"]) == ("look", "tool_calls", seen["arguments"])
    assert set(json.loads(seen["arguments"])) == {"place"}
    assert seen["after"] > 0


@pytest.mark.spec("HP-OAI-6")
def test_it_leaves(node: Node, states: Callable[[], list[str]]) -> None:
    """A loop over a stream that ends early cancels the task."""
    assert node("leave") == "left"
    until(lambda: states()[0] == "canceled")


def test_it_waits_out_a_full_queue(node: Node, busy: Callable[[], int]) -> None:
    """By its own retries."""
    assert node("full") == 8
    assert busy() >= 1


def test_it_is_told_what_is_not_offered(node: Node) -> None:
    """As its own kind of error."""
    assert node("refused") == {"kind": "BadRequestError", "status": 400, "param": "n", "code": "INVALID_PARAMS"}
