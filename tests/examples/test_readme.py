"""Every command, snippet and sample of README.md and docs/ against a live service."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from tests.examples.pages import ELISION, PAGES, README, ROOT, Block, agrees, blocks, exchange, inline_commands
from tests.live.client import open_client, until
from tests.live_service import LiveService, live_service

pytestmark = pytest.mark.xdist_group("examples")

LIMIT_S = 120.0  # a command that hangs fails; nothing waits for it
PROMPT = "Once upon a time"

ALL = [block for page in PAGES for block in blocks(page)]
RUN, TEST = [block for block in ALL if block.page == README and block.language == "sh"][:2]  # these two install
SHELL = [block for block in ALL if block.language == "sh" and block not in (RUN, TEST)]
SERVING = [block for block in SHELL if "llama-orch serve" in block.text]
COMMANDS = [block for block in SHELL if block not in SERVING]
YAML = [block for block in ALL if block.language == "yaml"]
PYTHON = [block for block in ALL if block.language == "python"]

Bash = Callable[..., "subprocess.CompletedProcess[str]"]

# Around a block: what curl prints is kept, so that a later command can name the task that an earlier one has made.
PRELUDE = r"""
set -euo pipefail
curl() { command curl "$@" | tee -a answers; }
task_id() { python -c 'import re; print(re.findall(r"\"task_id\":\"([^\"]+)", open("answers").read())[-1])'; }
"""


def named(given: list[Block]) -> Any:
    return pytest.mark.parametrize("block", given, ids=[block.name for block in given])


@pytest.fixture(scope="module")
def service() -> Iterator[LiveService]:
    """The default installation, a pool of the second engine, and the one that README.md gives a model of the user's."""
    pools = [{"id": "default"}, {"id": "second", "engine": "ctransformers"}, {"id": "coder", "ctx": 512}]
    with live_service({"pools": pools}) as running:
        with open_client(running) as client:
            until(lambda: all(pool["ready"] for pool in client.get("/v1/pools").json()["items"]))
        yield running


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """A user's environment: `llama-orch` and `python` are this interpreter's, the home folder is empty."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, words in {"python": "", "llama-orch": "-m llama_orch.cli"}.items():
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words} "$@"\n')
        program.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LLORCH_")}
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    return kept | {"PATH": path, "LLORCH_HOME": str(tmp_path / "home"), "COLUMNS": "200"}


@pytest.fixture
def user(env: dict[str, str], service: LiveService) -> dict[str, str]:
    """The same on the machine of the service."""
    return env | {"LLORCH_URL": service.url, "LLORCH_API_TOKEN": service.token}


@pytest.fixture
def bash(tmp_path: Path) -> Bash:
    """Runs a script in a folder of its own."""
    folder = tmp_path / "here"
    folder.mkdir()

    def run(script: str, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", PRELUDE + script], cwd=folder, env=env, capture_output=True, text=True, timeout=LIMIT_S
        )

    return run


def live(text: str, service: LiveService) -> str:
    """The same commands for this service and the task before."""
    address = service.url.removeprefix("http://")
    for default in ("127.0.0.1:8080", "localhost:8080"):
        text = text.replace(default, address)
    text = re.sub(r"file:/models/\S+", "builtin:tiny", text)
    return text.replace("TASK_ID", '"$(task_id)"')


def test_there_is_something_to_run() -> None:
    """The pages are found: a change of their form does not leave this file without tests."""
    assert (len(SERVING) >= 2, len(COMMANDS) >= 1, len(YAML) >= 1, len(PYTHON) >= 1) == (True,) * 4
    assert "pip install" in RUN.text
    assert "pip install" in TEST.text


@named(COMMANDS)
def test_commands_do_what_they_say(block: Block, service: LiveService, user: dict[str, str], bash: Bash) -> None:
    """Each command succeeds, and its answers have the form of the sample that follows it."""
    done = bash(live(block.text, service), user)
    assert done.returncode == 0, done.stderr
    following = next((other for other in ALL[ALL.index(block) + 1 :] if other.page == block.page), None)
    if following is not None and following.language == "text":
        shown, real = exchange(following.text), exchange(done.stdout)
        assert agrees(shown.admission, real.admission)
        rest = iter(real.frames)  # the sample has some of them, in their order
        for event, data in shown.frames:
            assert any(event == name and agrees(data, given) for name, given in rest), (event, data)


@pytest.mark.parametrize("command", inline_commands(README))
def test_commands_in_the_text_work(command: str, service: LiveService, user: dict[str, str], bash: Bash) -> None:
    """What the README names in passing is a command, and succeeds."""
    done = bash(command.replace("…", PROMPT), user)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("name", ["tasks", "pools", "capabilities"])
def test_commands_that_show_what_it_does(name: str, user: dict[str, str], bash: Bash) -> None:
    """The README's three names are commands without arguments."""
    assert f"`{name}`" in README.read_text() or f"`llama-orch {name}`" in README.read_text()
    assert bash(f"llama-orch {name}", user).returncode == 0


def configuration(block: Block) -> str:
    """The file that the block shows, with a model that is here, and the context that this one was trained with."""
    model = str(files("llama_orch.models") / "tiny.gguf")
    return re.sub(r"\bctx: \d+", "ctx: 2048", re.sub(r"/models/\S+\.gguf", model, block.text))


@named(YAML)
def test_a_configuration_is_valid(block: Block, env: dict[str, str], bash: Bash, tmp_path: Path) -> None:
    """`llama-orch config check` has nothing to say against it."""
    (tmp_path / "config.yaml").write_text(configuration(block))
    done = bash(f"llama-orch config check {tmp_path}/config.yaml", env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


@named(SERVING)
def test_a_server_starts_and_ends(block: Block, env: dict[str, str], tmp_path: Path) -> None:
    """It listens, with the configuration that the page shows before, and ends in order when it is told to."""
    before = ALL[ALL.index(block) - 1]
    if before.language == "yaml":
        (tmp_path / "config.yaml").write_text(configuration(before))
    # On a free port, since the default one may be taken; and in place of the shell, so that a signal reaches it.
    script = PRELUDE + block.text.replace("llama-orch serve", "exec llama-orch serve --port 0")
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            ["bash", "-c", script], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=log, text=True
        )
    try:
        assert server.stdout is not None
        lines = iter(server.stdout.readline, "")
        assert any(line.startswith("listening on http://127.0.0.1:") for line in lines), (tmp_path / "log").read_text()
        server.send_signal(signal.SIGTERM)
        assert server.wait(LIMIT_S) == 0
    finally:
        server.kill()
        server.communicate()


@named(PYTHON)
def test_a_program_prints_a_story(block: Block, service: LiveService, user: dict[str, str], tmp_path: Path) -> None:
    """The snippet runs as it stands and prints what the task said."""
    (tmp_path / "snippet.py").write_text(live(block.text, service))
    done = subprocess.run(
        ["python", "snippet.py"], cwd=tmp_path, env=user, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stderr
    with open_client(service) as client:
        (task,) = client.get("/v1/tasks?limit=1").json()["items"]
    assert done.stdout == task["text"] != ""


# -- the two that install --------------------------------------------------------------------------------------------


def test_the_test_command_is_what_ci_runs() -> None:
    """`.ci/run` has the README's command as it stands."""
    assert TEST.text.strip() in (ROOT / ".ci" / "run").read_text().splitlines()


# The program with a default address where nobody listens: a service may run on this machine.
ALONE = """
import sys
from llama_orch.cli import connection
from llama_orch.cli.main import main
connection.DEFAULT_URL = sys.argv.pop(1)
main()
"""


def test_the_first_command_tells_the_story_that_is_shown(env: dict[str, str]) -> None:
    """Behind the installation: without a server, with one of its own, the same words as far as the sample has them."""
    _, is_there, command = RUN.text.partition(".venv/bin/llama-orch ")
    assert is_there
    note, *story, figures, repeat = ALL[ALL.index(RUN) + 1].text.strip().splitlines()
    with socket.socket() as holder:  # bound, so that nobody else takes it, and not listening
        holder.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{holder.getsockname()[1]}"
        program = [sys.executable, "-c", ALONE, url, *shlex.split(command)]
        done = subprocess.run(program, env=env, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    first, *_, last, hint = done.stderr.strip().splitlines()
    assert first == note.replace("http://127.0.0.1:8080", url)
    varies = r"[\d.]+ tokens/s|\d+ tokens|llamacpp [\d.]+"
    assert re.sub(varies, "#", last) == re.sub(varies, "#", figures)
    assert re.sub(r"[0-9a-f-]{36}", "#", hint) == re.sub(r"[0-9a-f-]{36}", "#", repeat)
    beginning = " ".join(story).partition(ELISION)[0].split()
    assert done.stdout.split()[: len(beginning)] == beginning
