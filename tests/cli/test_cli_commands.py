"""The commands that read and steer, in this process through the program's own entry."""

from __future__ import annotations

import json
import stat
import sys
import types
from pathlib import Path

import pytest
import yaml
from conftest import TASK_ID, Invoke
from contract_service import CAPABILITIES, HEALTH, PASSING_POOL, POOL, ContractService


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pools"], {"items": [POOL, PASSING_POOL], "next_cursor": None}),
        (["pools", "get", "default"], POOL),
        (["pools", "health", "default"], HEALTH),
        (["capabilities"], CAPABILITIES),
    ],
)
def test_json_is_the_answer(remote: Invoke, arguments: list[str], expected: object) -> None:
    """--json prints the service's answer whole."""
    result = remote(*arguments, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tasks"], [TASK_ID, "running"]),
        (["tasks", "get", TASK_ID], [TASK_ID, "an[2Jswer"]),
        (["pools"], ["default", "builtin:tiny", "64 reject", "yes", "on demand", "keep alive", "300 s"]),
        (["pools", "get", "default"], ["1 interactive, 2 batch", "on_demand", "keep_alive_ms"]),
        (["pools", "health", "default"], ["default-0", "ready", "vram reserved", "1.5 GiB"]),
        (["capabilities"], ["simulated", "1.0 GiB", "card [31m", "700 MiB", "lost:  it fell off the bus"]),
    ],
)
def test_tables_for_people(remote: Invoke, arguments: list[str], words: list[str]) -> None:
    """Without --json there is text, and no control character of the service's in it."""
    result = remote(*arguments)
    assert result.exit_code == 0, result.output
    assert [word for word in words if word not in result.stdout] == []
    assert "\x1b" not in result.stdout


def test_tasks_options(remote: Invoke, service: ContractService) -> None:
    """--state, --limit and --cursor are the query of the list."""
    result = remote("tasks", "--state", "running", "--limit", "1", "--cursor", "c")
    assert result.exit_code == 0
    assert service.seen[-1].path == "/v1/tasks?state=running&limit=1&cursor=c"


@pytest.mark.parametrize("noun", ["tasks", "pools"])
def test_an_option_in_the_wrong_place(remote: Invoke, noun: str) -> None:
    """An option of the list in front of another command is refused, not ignored."""
    assert remote(noun, "--json", "get", "x").exit_code == 2


def test_tasks_cancel(remote: Invoke, service: ContractService) -> None:
    """`tasks cancel` cancels."""
    assert remote("tasks", "cancel", TASK_ID).exit_code == 0
    assert service.only_task().canceled.is_set()


def test_an_error_says_code_and_correlation_id(remote: Invoke) -> None:
    """A refusal is on stderr with its code and correlation id; the exit code is 1."""
    result = remote("tasks", "get", "unknown")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "error: it is NOT_FOUND\ncode NOT_FOUND, correlation id c-1" in result.stderr


@pytest.mark.parametrize(
    "url", ["127.0.0.1", "ftp://x", "http:///", "http://u:secret@x", "http://x:99999", "http://[x"]
)
def test_url_that_is_none(llama_orch: Invoke, url: str) -> None:
    """An LLORCH_URL that is no server's address is a usage error, and is not repeated: it could hold a password."""
    result = llama_orch("pools", LLORCH_URL=url, LLORCH_API_TOKEN="t")
    assert result.exit_code == 2
    assert "LLORCH_URL" in result.stderr
    assert "secret" not in result.stderr


def test_no_token_at_hand(llama_orch: Invoke, service: ContractService) -> None:
    """Without a token the message says where one comes from; a client makes none up."""
    result = llama_orch("pools", LLORCH_URL=service.url)
    assert result.exit_code == 1
    assert "LLORCH_API_TOKEN" in result.stderr


@pytest.mark.spec("HP-SEC-7")
def test_the_token_file_stays_on_this_machine(llama_orch: Invoke) -> None:
    """The home folder's token is never sent to another machine."""
    assert llama_orch("token").exit_code == 0
    result = llama_orch("pools", LLORCH_URL="http://llama.invalid")
    assert result.exit_code == 2
    assert "set LLORCH_API_TOKEN" in result.stderr


@pytest.mark.spec("HP-SEC-3")
def test_token_is_made_once(llama_orch: Invoke, home: Path) -> None:
    """`token` makes a 0600 file where there is none, says so on stderr, and prints the same one from then on."""
    first, second = llama_orch("token"), llama_orch("token")
    assert first.stdout == second.stdout == (home / "token").read_text()
    assert str(home / "token") in first.stderr
    assert second.stderr == ""
    assert stat.S_IMODE((home / "token").stat().st_mode) == 0o600
    assert json.loads(llama_orch("token", "--json").stdout) == {"token": first.stdout.strip(), "source": "file"}


@pytest.mark.spec("HP-ALN-3")
def test_config_check(llama_orch: Invoke, tmp_path: Path) -> None:
    """`config check` names every problem; its exit code says whether there is one."""
    assert llama_orch("config", "check").exit_code == 0
    file = tmp_path / "c.yaml"
    file.write_text("servr: {}\nlogs: {level: loud}\n")
    for result in (llama_orch("config", "check", str(file)), llama_orch("config", "check", LLORCH_CONFIG=str(file))):
        assert result.exit_code == 1
        assert "did you mean 'server'?" in result.stderr
        assert "logs.level" in result.stderr
    answer = json.loads(llama_orch("config", "check", str(file), "--json").stdout)
    assert (answer["ok"], len(answer["problems"])) == (False, 2)


@pytest.mark.spec("HP-ALN-3")
def test_config_schema(llama_orch: Invoke) -> None:
    """`config schema` prints the published JSON Schema."""
    schema = json.loads(llama_orch("config", "schema").stdout)
    assert schema["additionalProperties"] is False
    assert "pools" in schema["properties"]


def test_config_show_can_be_read_again(llama_orch: Invoke, tmp_path: Path) -> None:
    """What `config show` prints is a valid configuration with the same meaning."""
    file = tmp_path / "c.yaml"
    file.write_text("server: {port: 9}")
    shown = llama_orch("config", "show", str(file)).stdout
    file.write_text(shown)
    assert llama_orch("config", "show", str(file)).stdout == shown
    assert yaml.safe_load(shown)["server"]["port"] == 9
    assert json.loads(llama_orch("config", "show", str(file), "--json").stdout) == yaml.safe_load(shown)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What `serve` hands to the composition root, which takes no part here."""
    calls: list[tuple[object, ...]] = []
    root = types.ModuleType("llama_orch.serve")

    def run_server(settings: object, home: object, token: str, *, lifeline: bool) -> int:
        calls.append((settings, home, token, lifeline))
        return 0

    root.run_server = run_server  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llama_orch.serve", root)
    return calls


def test_serve_options_win(llama_orch: Invoke, started: list[tuple[object, ...]], tmp_path: Path, home: Path) -> None:
    """--host and --port win over the file; the token file is made before the server starts."""
    file = tmp_path / "c.yaml"
    file.write_text("server: {host: 127.0.0.2, port: 9, max_streams: 3}")
    assert llama_orch("serve", "--config", str(file), "--port", "0").exit_code == 0
    ((settings, _, token, lifeline),) = started
    server = settings.server  # type: ignore[attr-defined]
    assert (server.host, server.port, server.max_streams, lifeline) == ("127.0.0.2", 0, 3, False)
    assert (home / "token").read_text() == f"{token}\n"


@pytest.mark.spec("HP-SEC-3")
def test_serve_refuses_a_weak_token_on_a_public_address(llama_orch: Invoke, started: list[tuple[object, ...]]) -> None:
    """An address that others reach needs a token of 128 bits; the message does not show the weak one."""
    result = llama_orch("serve", "--host", "0.0.0.0", LLORCH_API_TOKEN="hunter2hunter2hunter2")
    assert result.exit_code == 1
    assert "128 bits" in result.stderr
    assert "hunter2hunter2hunter2" not in result.output
    assert started == []
    assert llama_orch("serve", "--host", "0.0.0.0").exit_code == 0


def test_help_names_every_command(llama_orch: Invoke) -> None:
    """The help lists the commands and the exit codes."""
    result = llama_orch("--help")
    commands = ("serve", "run", "tasks", "sessions", "pools", "capabilities", "token", "config")
    assert [word for word in (*commands, "75", "130") if word not in result.stdout] == []
    assert "lifeline" not in llama_orch("serve", "--help").stdout
