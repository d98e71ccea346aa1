"""Programs for terminals, as anybody would use them: llm, and aider from an environment of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread

import httpx
import pytest
import yaml

from tests.live.client import until
from tests.live_service import LiveService

from .conftest import LIMIT_S, MODELS, blocked

pytestmark = pytest.mark.spec("HP-OAI-1", "HP-OAI-3", "HP-OAI-4")

Command = Callable[..., list[str]]
STORY = "Tell me a story about a brave fox."
SYLLABLES = re.compile("ka|lo|mi|ren|su|té|vor|ya|zel|ño|日|ön")  # of the simulated engine
ANSWER_TOKENS = 200  # less than the 256 of the pool: a terminal breaks words
LONG_TOKENS = 20_000  # some minutes
LLM = Path(sys.executable).with_name("llm")


@pytest.fixture
def environment(service: LiveService, tmp_path: Path) -> dict[str, str]:
    """A home of their own, with our pools among llm's models; OPENAI_BASE_URL would be enough for some of them."""
    entries = [
        {
            "model_id": f"ours-{name}",
            "model_name": name,
            "api_base": f"{service.url}/v1",
            "api_key_name": "ours",
            "supports_schema": True,
            "supports_tools": True,
        }
        for name in MODELS
    ]
    (tmp_path / "extra-openai-models.yaml").write_text(yaml.safe_dump(entries))
    (tmp_path / "keys.json").write_text(f'{{"ours": "{service.token}"}}')
    paths = {"HOME": str(tmp_path), "LLM_USER_PATH": str(tmp_path), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    return os.environ | paths | {"OPENAI_API_BASE": f"{service.url}/v1", "OPENAI_API_KEY": service.token}


@pytest.fixture
def ask(environment: dict[str, str], tmp_path: Path) -> Callable[[list[str]], str]:
    """What the program says."""

    def run(command: list[str]) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=2 * LIMIT_S, input=""
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def llm(model: str, *more: str, tokens: int = 8) -> list[str]:
    return [
        str(LLM),
        "-m",
        f"ours-{model}",
        "--no-log",
        "-o",
        "max_tokens",
        str(tokens),
        "-o",
        "seed",
        "7",
        *more,
        STORY,
    ]


@pytest.fixture
def long_busy(ours: httpx.Client) -> Iterator[Callable[[], int]]:
    """The slot of pool `full` is taken until somebody was refused: how long a program takes to begin is its own affair,
    and it tries only so often. The result says how many were refused."""
    with blocked(ours, LONG_TOKENS) as count:
        blocker = ours.get("/v1/tasks").json()["items"][0]["task_id"]
        is_over = Event()

        def make_room() -> None:
            until(lambda: is_over.is_set() or count() > 0)
            ours.post(f"/v1/tasks/{blocker}/cancel")

        watcher = Thread(target=make_room)
        watcher.start()
        try:
            yield count
        finally:
            is_over.set()
            watcher.join()


@pytest.fixture
def aider(request: pytest.FixtureRequest) -> Callable[[str], list[str]]:
    """Its command line for one question."""
    program: Path = request.config.getoption("--aider") or pytest.fail("--aider is missing")
    quiet = "--no-git --no-pretty --no-check-update --no-show-release-notes --analytics-disable --yes-always"

    def command(question: str) -> list[str]:
        chosen = ["--model", "openai/full", "--weak-model", "openai/full", "--chat-mode", "ask"]
        plain = ["--no-show-model-warnings", "--map-tokens", "0"]
        return [str(program), *quiet.split(), *plain, *chosen, "--message", question]

    return command


def interrupted(command: list[str], environment: dict[str, str], folder: Path, states: Callable[[], list[str]]) -> None:
    """Ctrl-C while the answer comes."""
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as going:
        try:
            until(lambda: states()[0] == "running")
            going.send_signal(signal.SIGINT)
            until(lambda: states()[0] == "canceled")
        finally:
            going.kill()


def test_llm_lists_the_models(service: LiveService, ask: Callable[[list[str]], str]) -> None:
    """As the endpoint has them."""
    endpoint = ["openai", "endpoint", f"{service.url}/v1", "--key", service.token, "--models"]
    assert set(MODELS) <= set(ask([str(LLM), *endpoint]).split())


def test_llm_chats_and_streams(ask: Callable[[list[str]], str]) -> None:
    """The same text either way."""
    assert ask(llm("default", "--no-stream")) == ask(llm("default")) != ""


def test_llm_gets_an_answer_in_a_form(ask: Callable[[list[str]], str]) -> None:
    """By its own words for schemas."""
    assert ask(llm("default", "--schema", "brave bool, age int", tokens=64)).startswith('{"brave":')


@pytest.mark.spec("HP-OAI-8")
def test_llm_calls_tools(ask: Callable[[list[str]], str]) -> None:
    """A function of Python is shown to the model, whose answer llm takes; this one tells stories and calls nothing."""
    answer = ask(llm("tools", "--functions", "def look(place: str) -> str:\n    return place", "--no-stream"))
    assert answer.strip()


@pytest.mark.spec("HP-OAI-6")
def test_llm_is_interrupted(environment: dict[str, str], tmp_path: Path, states: Callable[[], list[str]]) -> None:
    """Its task is canceled."""
    interrupted(llm("full", tokens=1500), environment, tmp_path, states)


def test_llm_waits_out_a_full_queue(ask: Callable[[list[str]], str], long_busy: Callable[[], int]) -> None:
    """429, then the retries of the client within, until there is room."""
    assert len(ask(llm("full")).split()) == 8
    assert long_busy() >= 1


def test_aider_chats(aider: Callable[[str], list[str]], ask: Callable[[list[str]], str]) -> None:
    """In chunks or at once it shows what the model said, and that a limit ended it."""
    for mode in ("--stream", "--no-stream"):
        said = ask([*aider(STORY), mode])
        assert len(SYLLABLES.findall(said)) > ANSWER_TOKENS
        assert "Model openai/full has hit a token limit!" in said


@pytest.mark.spec("HP-OAI-6")
def test_aider_is_interrupted(
    aider: Callable[[str], list[str]], environment: dict[str, str], tmp_path: Path, states: Callable[[], list[str]]
) -> None:
    """Its task is canceled."""
    interrupted(aider(STORY), environment, tmp_path, states)


def test_aider_waits_out_a_full_queue(
    aider: Callable[[str], list[str]], ask: Callable[[list[str]], str], long_busy: Callable[[], int]
) -> None:
    """429, then its own retries, until there is room."""
    assert len(SYLLABLES.findall(ask(aider(STORY)))) > ANSWER_TOKENS
    assert long_busy() >= 1
