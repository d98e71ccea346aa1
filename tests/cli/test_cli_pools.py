"""`llama-orch pools drain` and `reload`: what they send, how they wait, and how they end."""

from __future__ import annotations

import json
import signal

import pytest
from conftest import Invoke, Start
from contract_service import DRAINS, RELOADS, ContractService, Refusal, error

from llama_orch.client import calls

TIMEOUT_S = 60


@pytest.fixture(autouse=True)
def no_time_between_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "POLL_S", 0.0)


def looks(service: ContractService) -> int:
    return len(service.headers_of("/health"))


@pytest.mark.spec("HP-CTL-2")
@pytest.mark.parametrize(("arguments", "deadline_ms"), [([], 30_000), (["--deadline-ms", "0"], 0)])
def test_a_drain_is_begun(remote: Invoke, service: ContractService, arguments: list[str], deadline_ms: int) -> None:
    """`pools drain` sends the deadline, shows the health of that moment and does not wait."""
    result = remote("pools", "drain", "default", *arguments)
    assert result.exit_code == 0
    assert (service.seen[-1].method, service.seen[-1].path) == ("POST", "/v1/pools/default/drain")
    assert service.seen[-1].body == {"deadline_ms": deadline_ms}
    assert "draining" in result.stdout
    assert "default-0" in result.stdout
    assert looks(service) == 0


@pytest.mark.spec("HP-CTL-2")
def test_a_reload_is_begun(remote: Invoke, service: ContractService) -> None:
    """`pools reload --no-wait` sends the model and shows the health of that moment."""
    result = remote("pools", "reload", "default", "builtin:next", "--no-wait")
    assert result.exit_code == 0
    assert (service.seen[-1].method, service.seen[-1].path) == ("POST", "/v1/pools/default/reload")
    assert service.seen[-1].body == {"new_model_ref": "builtin:next"}
    assert "waiting for 1 task" in result.stdout
    assert looks(service) == 0


@pytest.mark.parametrize(
    ("arguments", "story"),
    [
        (["drain", "default"], DRAINS["default"][:1]),
        (["drain", "default", "--no-wait"], DRAINS["default"][:1]),
        (["drain", "default", "--wait"], DRAINS["default"]),
        (["drain", "passing", "--wait"], DRAINS["passing"]),
        (["reload", "default", "builtin:next", "--no-wait"], RELOADS["builtin:next"][:1]),
        (["reload", "default", "builtin:next"], RELOADS["builtin:next"]),
        (["reload", "default", "builtin:next", "--wait"], RELOADS["builtin:next"]),
    ],
)
def test_json_is_the_last_health(
    remote: Invoke, service: ContractService, arguments: list[str], story: list[object]
) -> None:
    """--json prints one health: that of the answer, or after a wait that of its end, null where the pool is gone."""
    result = remote("pools", *arguments, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == story[-1]
    assert looks(service) == len(story) - 1


@pytest.mark.spec("HP-CTL-2")
def test_a_drain_is_waited_for(remote: Invoke, service: ContractService) -> None:
    """--wait ends when no task waits and no worker is left; the way there is on stderr."""
    result = remote("pools", "drain", "default", "--wait")
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        "draining: slots busy 1, tasks waiting 2, replicas ready",
        "draining: slots busy 0, tasks waiting 0, replicas backoff",
        "draining: slots busy 0, tasks waiting 1, replicas unloaded",
        "draining: slots busy 0, tasks waiting 0, replicas unloading",
    ]
    assert "unloaded" in result.stdout


@pytest.mark.parametrize("state", ["unloaded", "stopped", "failed"])
def test_a_drain_of_a_pool_without_workers_is_over(remote: Invoke, service: ContractService, state: str) -> None:
    """What has no worker is drained, whatever the reason."""
    (health, *_), replicas = DRAINS["default"], [{"state": state}, {"state": "unloaded"}]
    assert health is not None
    known = health["replicas"][0] | {"slots_busy": 0}
    ended = health | {"replicas": [known | replica for replica in replicas]}
    ended |= {"metrics": health["metrics"] | {"queue_depth": 0}}
    service.refusals = [Refusal(202, ended)]
    assert remote("pools", "drain", "default", "--wait").exit_code == 0
    assert looks(service) == 0


def test_a_pool_that_goes_with_its_model_is_drained(remote: Invoke) -> None:
    """A pool that was there on demand ends with the drain: that it is not found any more is success."""
    result = remote("pools", "drain", "passing", "--wait")
    assert result.exit_code == 0
    assert result.stdout == ""
    assert "gone" in result.stderr


def test_a_drain_that_is_called_off(remote: Invoke) -> None:
    """A pool that is back in service before it was empty was not drained: exit 1, and no endless wait."""
    result = remote("pools", "drain", "called-off", "--wait")
    assert result.exit_code == 1
    assert "called off" in result.stderr


@pytest.mark.spec("HP-CTL-2")
def test_a_reload_is_waited_for(remote: Invoke) -> None:
    """Without more the command ends with the outcome; each news is one line on stderr, without control characters."""
    result = remote("pools", "reload", "default", "builtin:next")
    assert result.exit_code == 0
    assert result.stderr.splitlines() == ["waiting for 1 task", "loading builtin:next"]
    assert "done: it serves" in result.stdout


@pytest.mark.spec("HP-CTL-2")
@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("builtin:broken", "failed: the file is damaged; builtin:tiny serves"),
        ("builtin:forgotten", "restarted"),
    ],
)
def test_a_reload_that_fails(remote: Invoke, model: str, words: str) -> None:
    """A failed reload, and one that the service has forgotten, is exit 1 with the reason on stderr."""
    result = remote("pools", "reload", "default", model)
    assert result.exit_code == 1
    assert words in result.stderr


@pytest.mark.spec("HP-CTL-2")
def test_a_second_reload_is_a_conflict(remote: Invoke, service: ContractService) -> None:
    """A reload while another one runs is refused, and the command does not wait for the other one."""
    assert remote("pools", "reload", "default", "builtin:endless", "--no-wait").exit_code == 0
    result = remote("pools", "reload", "default", "builtin:next")
    assert result.exit_code == 1
    assert "code CONFLICT" in result.stderr
    assert looks(service) == 0


@pytest.mark.spec("HP-ERR-3")
@pytest.mark.parametrize("act", [["drain", "default"], ["reload", "default", "builtin:next"]])
@pytest.mark.parametrize(("status", "code"), [(429, "ADMISSION_REJECT"), (503, "POOL_UNAVAILABLE")])
def test_not_now(remote: Invoke, service: ContractService, act: list[str], status: int, code: str) -> None:
    """A refusal that can pass, but takes longer than the client waits, is exit 75, and so is one of a look."""
    busy = Refusal(status, error(code, retriable=True, retry_after_ms=3_600_000))
    service.refusals = [busy]
    assert remote("pools", *act, "--wait").exit_code == 75
    begun = (DRAINS["default"] if act[0] == "drain" else RELOADS["builtin:next"])[0]
    service.refusals = [Refusal(202, begun or {}), busy]
    result = remote("pools", *act, "--wait")
    assert result.exit_code == 75
    assert "try again in 3600 s" in result.stderr


@pytest.mark.parametrize("act", [["drain", "nowhere"], ["reload", "nowhere", "builtin:next"]])
def test_a_pool_that_is_not_there(remote: Invoke, act: list[str]) -> None:
    """An unknown pool is exit 1 with the service's error, for the drain of one as well."""
    result = remote("pools", *act, "--wait")
    assert result.exit_code == 1
    assert "code NOT_FOUND" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["drain"],
        ["drain", "default", "--deadline-ms", "-1"],
        ["drain", "default", "--deadline-ms", "604800001"],
        ["drain", "default", "--deadline-ms", "9" * 100],
        ["drain", "default", "--deadline-ms", "1.5"],
        ["drain", "default", "--deadline-ms", "soon"],
        ["drain", "default", "more"],
        ["reload", "default"],
        ["reload", "default", ""],
        ["reload", "default", "x" * 1025],
        ["reload", "default", "builtin:\udcff"],
        ["reload", "default", "builtin:next", "more"],
    ],
)
def test_usage(remote: Invoke, service: ContractService, arguments: list[str]) -> None:
    """What the contract does not take is exit 2, before the service hears of it."""
    assert remote("pools", *arguments).exit_code == 2
    assert service.seen == []


@pytest.mark.parametrize("act", [["drain", "endless", "--wait"], ["reload", "default", "builtin:endless"]])
def test_interrupt_stops_the_waiting_alone(start: Start, service: ContractService, act: list[str]) -> None:
    """Ctrl-C is exit 130, and says that the service goes on with it."""
    process = start("pools", *act, extra={"LLORCH_URL": service.url, "LLORCH_API_TOKEN": service.token})
    assert service.looked.wait(TIMEOUT_S)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert f"interrupted: the {act[0]} goes on; llama-orch pools health {act[1]}" in err
    assert "Traceback" not in err
