"""`llama-orch run --repeat`: what is kept of a run, and what is said when it is asked again."""

from __future__ import annotations

import json
import os
import stat
import uuid
from pathlib import Path
from typing import Any

import contract_service
import pytest
from conftest import TASK_ID, Start
from contract_service import END, ContractService, token

from llama_orch.cli import run_records
from llama_orch.cli.output import UsageError
from llama_orch.cli.run_records import Record, Records
from llama_orch.settings import Home, SettingsError

pytestmark = pytest.mark.spec("HP-DET-2")

TIMEOUT_S = 60
PROFILE = {"version": "v1", "temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "repeat_penalty": 1.0}


def run(start: Start, service: ContractService, *arguments: str, **extra: str) -> tuple[int, str, str]:
    env = {"LLORCH_URL": service.url, "LLORCH_API_TOKEN": service.token, **extra}
    process = start("run", *arguments, extra=env)
    out, err = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, out, err


def a_run(start: Start, service: ContractService, *arguments: str) -> str:
    """A run that is kept; its task's id."""
    code, _, err = run(start, service, "hello", *arguments)
    assert code == 0
    task_id: str = service.only_task().request["task_id"]
    assert err.endswith(f"to repeat it: llama-orch run --repeat {task_id}\n")
    return task_id


def a_record(task_id: str = TASK_ID, **fields: Any) -> Record:
    request = {"task_id": task_id, "model_ref": "builtin:tiny", "prompt": "hello"}
    return run_records.msgspec.convert({"request": request, "text": "Hi", "end": END, **fields}, Record)


def test_the_same_again(start: Start, service: ContractService) -> None:
    """The same request under an id of its own, with the seed that was used; the answer is on stdout, the verdict on
    stderr."""
    task_id = a_run(start, service, "--max-tokens", "9", "--session", str(uuid.uuid4()))
    code, out, err = run(start, service, "--repeat", task_id)
    assert (code, out) == (0, "Hello wörld")
    assert "the bytes agree: 12 of 12\n" in err
    first, second = (dict(task.request) for task in service.tasks.values())
    assert first.pop("task_id") != second.pop("task_id")
    assert (first.pop("seed"), second.pop("seed")) == (None, END["seed"])
    assert (first.pop("session_id") is None, second.pop("session_id")) == (False, None)
    assert first == second


@pytest.mark.parametrize(
    ("name", "now", "words"),
    [
        ("model_digest", "sha256:" + "cd" * 32, f"model digest: sha256:{'ab' * 32} then, sha256:{'cd' * 32} now"),
        ("engine", "other", "engine: simulated then, other now"),
        ("engine_version", "2.0", "engine version: 1.0 then, 2.0 now"),
        ("sampler_profile_version", "v2", "sampler profile: v1 then, v2 now"),
        ("seed", 8, "seed: 7 then, 8 now"),
        ("tokens_in", 3, "prompt, by tokenizer and chat template: 2 tokens then, 3 tokens now"),
    ],
)
def test_what_changed_is_named(
    start: Start, service: ContractService, monkeypatch: pytest.MonkeyPatch, name: str, now: object, words: str
) -> None:
    """Other bytes are exit code 1, with each thing that an answer depends on and that is not as it was."""
    task_id = a_run(start, service)
    script = [token(0, "Hello"), token(1, " you"), ("end", END | {name: now})]
    monkeypatch.setitem(contract_service._SCRIPTS, "hello", script)
    code, out, err = run(start, service, "--repeat", task_id)
    assert (code, out) == (1, "Hello you")
    verdict = err.partition("the bytes differ, from byte 6 on: 12 then, 9 now\n")[2]
    assert verdict == f"  {words}\n"


def test_a_profile_with_other_figures_under_its_name(
    start: Start, service: ContractService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name is the version, and a person may have changed what is behind it."""
    monkeypatch.setitem(contract_service.CAPABILITIES, "sampler_profiles", [PROFILE])
    task_id = a_run(start, service)
    monkeypatch.setitem(contract_service.CAPABILITIES, "sampler_profiles", [PROFILE | {"top_k": 20}])
    monkeypatch.setitem(contract_service._SCRIPTS, "hello", [token(0, "Hel"), ("end", END)])
    code, _, err = run(start, service, "--repeat", task_id)
    assert code == 1
    assert "  sampler profile v1 has other figures under the same name: top_k 40 then, 20 now\n" in err


def test_nothing_that_is_told_has_changed(
    start: Start, service: ContractService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then that is said, and what may be behind it: tasks beside a best-effort one, a limit that is the pool's."""
    task_id = a_run(start, service, "--determinism", "best_effort")
    monkeypatch.setitem(contract_service._SCRIPTS, "hello", [token(0, "Hello"), ("end", END | {"tokens_out": 1})])
    code, _, err = run(start, service, "--repeat", task_id)
    assert code == 1
    assert "none of model digest, engine, engine version, sampler profile, seed and prompt has changed" in err
    assert "the task is best_effort" in err
    assert "the pool's counts: 2 tokens then, 1 now" in err


@pytest.mark.spec("HP-ERR-3")
def test_a_repeat_that_fails_has_its_own_exit_code(
    start: Start, service: ContractService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is compared with an answer that has no end."""
    task_id = a_run(start, service)
    monkeypatch.setitem(contract_service._SCRIPTS, "hello", contract_service._SCRIPTS["lost"])
    code, _, err = run(start, service, "--repeat", task_id)
    assert code == 75
    assert "the bytes" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--repeat", TASK_ID],
        ["--repeat", "no uuid"],
        ["--repeat", "../token"],
        ["hello", "--repeat", TASK_ID],
        ["--repeat", TASK_ID, "--seed", "7"],
        ["--repeat", TASK_ID, "--determinism", "strict"],
    ],
)
def test_usage(start: Start, service: ContractService, arguments: list[str]) -> None:
    """A task that is not known, and options that are the record's: exit code 2, before the service hears of it."""
    code, out, err = run(start, service, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert service.seen == []


@pytest.mark.spec("HP-SEC-7")
@pytest.mark.parametrize(("arguments", "env"), [(["--no-record"], {}), ([], {"LLORCH_RECORD": "0"})])
def test_nothing_is_kept_where_it_is_not_wanted(
    start: Start, service: ContractService, home: Path, arguments: list[str], env: dict[str, str]
) -> None:
    """By an option, or for good by the environment."""
    assert "to repeat it" not in run(start, service, "hello", *arguments, **env)[2]
    assert not (home / "runs").exists()


@pytest.mark.spec("HP-SEC-7")
def test_a_record_is_its_users_alone(start: Start, service: ContractService, home: Path) -> None:
    """Prompts are nobody else's business: 0600 in a folder of 0700. The token is not in it."""
    task_id = a_run(start, service)
    (path,) = (home / "runs").iterdir()
    assert path.name == f"{task_id}.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert json.loads(path.read_text())["text"] == "Hello wörld"
    assert service.token not in path.read_text()


def test_a_failed_or_canceled_run_is_not_kept(start: Start, service: ContractService, home: Path) -> None:
    """There is nothing to hold a repetition against."""
    assert run(start, service, "lost")[0] == 75
    assert not (home / "runs").exists()


def test_the_oldest_is_forgotten(tmp_path: Path) -> None:
    """Of RUNS_MAX and two runs the first two are gone."""
    records = Records(Home(tmp_path))
    ids = [str(uuid.UUID(int=number)) for number in range(run_records.RUNS_MAX + 2)]
    for number, task_id in enumerate(ids):
        assert records.put(a_record(task_id))
        os.utime(tmp_path / "runs" / f"{task_id}.json", ns=(number, number))
    assert records.put(a_record(ids[-1]))
    assert len(list((tmp_path / "runs").iterdir())) == run_records.RUNS_MAX
    assert records.get(ids[2]) == a_record(ids[2])
    with pytest.raises(UsageError, match="no record of task"):
        records.get(ids[1])


def test_a_run_that_is_too_large_is_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It costs a line on stderr; so does a folder that cannot be written to."""
    assert not Records(Home(tmp_path)).put(a_record(text="x" * run_records.RECORD_BYTES_MAX))
    assert "too large to be kept" in capsys.readouterr().err
    (tmp_path / "runs").write_text("a file")
    assert not Records(Home(tmp_path)).put(a_record())
    assert "not kept for --repeat" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"request": 1}'])
def test_a_damaged_record_is_said_to_be_one(tmp_path: Path, content: bytes) -> None:
    """And is not repeated as something else."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / f"{TASK_ID}.json").write_bytes(content)
    with pytest.raises(SettingsError, match="is not a record"):
        Records(Home(tmp_path)).get(TASK_ID)
