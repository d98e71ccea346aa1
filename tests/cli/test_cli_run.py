"""`llama-orch run` as a process."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Start
from contract_service import ContractService, Refusal, error

TIMEOUT_S = 60


def _against(service: ContractService) -> dict[str, str]:
    return {"LLORCH_URL": service.url, "LLORCH_API_TOKEN": service.token}


def _run(start: Start, service: ContractService, *arguments: str, **more: object) -> tuple[int, str, str]:
    process = start("run", *arguments, extra=_against(service), **more)
    out, err = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, out, err


def test_tokens_on_stdout_figures_on_stderr(start: Start, service: ContractService) -> None:
    """stdout is the answer and nothing more; the figures that repeat the run are on stderr."""
    code, out, err = _run(start, service, "hello")
    assert (code, out) == (0, "Hello wörld")
    assert "2 tokens, 20.0 tokens/s, stop, seed 7, simulated 1.0, model sha256:abababababab\n" in err
    assert "waiting" not in err.split("tokens")[-1]


def test_options_reach_the_task(start: Start, service: ContractService) -> None:
    """Every option is the request's field of that name."""
    session = "0" * 8 + "-0000" * 3 + "-" + "0" * 12
    options = ["--seed", "5", "--max-tokens", "9", "--priority", "batch", "--determinism", "best_effort", "--chat"]
    code, _, _ = _run(start, service, "hello", *options, "--model", "m", "--engine", "e", "--session", session)
    request = service.only_task().request
    task_id = request.pop("task_id")
    given = {name: value for name, value in request.items() if value is not None}
    assert code == 0
    assert len(task_id) == 36
    assert given == {
        "workload": "completion",
        "model_ref": "m",
        "engine": "e",
        "session_id": session,
        "seed": 5,
        "max_tokens": 9,
        "priority": "batch",
        "determinism": "best_effort",
        "messages": [{"role": "user", "content": "hello", "tool_calls": None, "tool_call_id": None}],
    }


def test_the_first_pools_model_is_the_default(start: Start, service: ContractService) -> None:
    """Without --model the model of the first pool runs."""
    assert _run(start, service, "hello")[0] == 0
    assert service.only_task().request["model_ref"] == "builtin:tiny"


def test_prompt_from_stdin(start: Start, service: ContractService, tmp_path: Path) -> None:
    """`-` reads the prompt, less the newline that a shell puts behind it."""
    prompt = tmp_path / "prompt"
    prompt.write_text("hello\n")
    with prompt.open() as stdin:
        assert _run(start, service, "-", stdin=stdin)[:2] == (0, "Hello wörld")
    assert service.only_task().request["prompt"] == "hello"


def test_place_in_the_queue(start: Start, service: ContractService) -> None:
    """While the task waits, each change of its place is a line on stderr."""
    _, out, err = _run(start, service, "wait")
    assert out == "x"
    assert "waiting: place 2 in the queue, start in about 0.4 s\nwaiting: place 1 in the queue" in err


def test_json_is_the_frames(start: Start, service: ContractService) -> None:
    """--json prints each frame as a line."""
    code, out, _ = _run(start, service, "hostile", "--json")
    frames = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [frame["event"] for frame in frames] == ["started", "token", "end"]
    assert frames[1]["data"]["t"] == "a\x1b]0;title\x07b\x9b31m\r\n\tc"
    assert not set(out) & {"\x1b", "\x9b", "\x07", "\r"}


@pytest.mark.spec("HP-SEC-7")
def test_model_text_cannot_drive_the_terminal(start: Start, service: ContractService) -> None:
    """Control characters in the answer are dropped, but for newline and tab."""
    assert _run(start, service, "hostile")[1] == "a]0;titleb31m\n\tc"


@pytest.mark.spec("HP-ERR-3")
@pytest.mark.parametrize(("prompt", "code"), [("lost", 75), ("defect", 1)])
def test_exit_code_of_a_failed_task(start: Start, service: ContractService, prompt: str, code: int) -> None:
    """A failure that can pass is 75, any other 1; the code and the correlation id are shown."""
    exit_code, _, err = _run(start, service, prompt)
    assert exit_code == code
    assert "error: it is " in err
    assert "correlation id c-1" in err


@pytest.mark.spec("HP-ERR-3")
def test_exit_code_of_a_refusal(start: Start, service: ContractService) -> None:
    """A service that is too busy for longer than the client waits is 75, with the wait."""
    service.refusals = [Refusal(429, error("ADMISSION_REJECT", retriable=True, retry_after_ms=3_600_000))]
    code, _, err = _run(start, service, "hello", "--model", "m")
    assert code == 75
    assert "try again in 3600 s" in err


@pytest.mark.parametrize(
    "arguments", [[], [""], ["x", "--seed", "-1"], ["x", "--session", "no uuid"], ["x", "--nonsense"], ["x", "y"]]
)
def test_usage(start: Start, service: ContractService, arguments: list[str]) -> None:
    """What cannot be asked is exit code 2, before the service hears of it."""
    assert _run(start, service, *arguments)[0] == 2
    assert service.seen == []


def test_wrong_token(start: Start, service: ContractService) -> None:
    """A wrong token says what to set, and shows no token."""
    extra = _against(service) | {"LLORCH_API_TOKEN": "wrong-token"}
    process = start("run", "hello", extra=extra)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert "LLORCH_API_TOKEN" in err
    assert "wrong-token" not in err


def test_a_server_that_was_named_and_is_not_there(start: Start, closed_url: str) -> None:
    """With LLORCH_URL set no server is started in its place; the message says what to do."""
    process = start("run", "hello", extra={"LLORCH_URL": closed_url, "LLORCH_API_TOKEN": "t" * 22})
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert "llama-orch serve" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupt_cancels_the_task(start: Start, service: ContractService, number: int) -> None:
    """Ctrl-C, SIGTERM and a closed terminal cancel the task; the exit code is 130."""
    process = start("run", "forever", extra=_against(service))
    assert process.stdout is not None
    assert process.stdout.readline() == "first\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert service.only_task().canceled.is_set()
    assert "Traceback" not in err


def test_interrupt_during_submission_cancels_the_task(start: Start, service: ContractService) -> None:
    """A task whose cancellation overtakes its submission does not run on."""
    process = start("run", "late-submission", extra=_against(service))
    assert service.submission_came.wait(TIMEOUT_S)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert service.only_task().canceled.is_set()


def test_a_closed_stdout_cancels_the_task(start: Start, service: ContractService) -> None:
    """`| head -1` ends the task, quietly."""
    process = start("run", "endless", extra=_against(service))
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    assert process.wait(TIMEOUT_S) == 0
    assert service.only_task().canceled.is_set()
    assert "error" not in err.lower()


# --- a server of its own ---


def _alone(env: dict[str, str], program: list[str], *arguments: str, **more: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, *program, "run", *arguments]
    return subprocess.Popen(command, env=env | more, text=True, stdout=pipe, stderr=pipe, stdin=subprocess.DEVNULL)


def _server_has_ended(home: Path) -> bool:
    """Wait for the end of the process itself, not of its promises."""
    try:
        descriptor = os.pidfd_open(int((home / "server.pid").read_text()))
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], TIMEOUT_S)[0])
    finally:
        os.close(descriptor)


def test_without_a_server_one_runs_for_the_command(
    env: dict[str, str], home: Path, program_with_fake_server: list[str]
) -> None:
    """With no server at hand one is started, used and ended; its token is made on the way."""
    process = _alone(env, program_with_fake_server, "hello")
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, out) == (0, "Hello wörld")
    assert "starting one for this command" in err
    assert (home / "server.ended").exists()
    assert _server_has_ended(home)
    assert (home / "token").read_text().strip() not in err


def test_interrupt_ends_the_own_server_after_the_task(
    env: dict[str, str], home: Path, program_with_fake_server: list[str]
) -> None:
    """Ctrl-C cancels the task first and ends the server then."""
    process = _alone(env, program_with_fake_server, "forever")
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert json.loads((home / "server.ended").read_text()) == [True]


def test_a_killed_command_leaves_no_server(
    env: dict[str, str], home: Path, program_with_fake_server: list[str]
) -> None:
    """After kill -9 of the command its server ends by itself."""
    process = _alone(env, program_with_fake_server, "forever")
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.communicate(timeout=TIMEOUT_S)
    assert _server_has_ended(home)


def test_a_server_that_cannot_start(env: dict[str, str], home: Path, program_with_fake_server: list[str]) -> None:
    """A failed start shows the end of the server's log and where the rest is."""
    process = _alone(env, program_with_fake_server, "hello", FAKE_FAILS="1")
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert "the card is on fire" in err
    assert str(home / "logs" / "run-server.log") in err


@pytest.mark.spec("HP-SEC-7")
def test_the_own_servers_command_line_holds_no_token() -> None:
    """The server that `run` starts reads the token from the home folder or the environment."""
    from llama_orch.cli.own_server import serve_command

    arguments = serve_command("c.yaml")[1:]
    expected = "-P -m llama_orch.cli serve --host 127.0.0.1 --port 0 --lifeline --config c.yaml"
    assert arguments == expected.split()


@pytest.mark.parametrize("where", [">/dev/full", ">&-"])
def test_a_stdout_that_takes_nothing_cancels_the_task(
    service: ContractService, env: dict[str, str], where: str
) -> None:
    """A full disk or a closed stream behind stdout: a sentence, exit 1, and no task that goes on."""
    command = f"exec {sys.executable} -P -m llama_orch.cli run hello {where}"
    ended = subprocess.run(
        ["bash", "-c", command], env=env | _against(service), stderr=subprocess.PIPE, text=True, timeout=TIMEOUT_S
    )
    assert ended.returncode == 1
    assert "could not be written" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert service.only_task().canceled.is_set()
