"""Workers' private folders, and the sweep of what services that were killed left behind. Real processes."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llama_orch.engines import private_folder
from llama_orch.engines.private_folder import (
    make_private_folder,
    record_worker,
    remove_private_folder,
    sweep_private_folders,
)
from llama_orch.engines.processes import ProcessIdentity, boot_id, end_session, facts_of

from .support import Watched

pytestmark = pytest.mark.spec("HP-PLC-7")

# A service whose worker does not notice its death: no parent-death signal, no eye on stdin, and a child of its own.
_SERVICE = textwrap.dedent("""
    import subprocess, sys, threading
    from llama_orch.engines.private_folder import make_private_folder, record_worker
    worker = '''
    import subprocess, sys, threading
    child = subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait()"])
    print(child.pid, flush=True)
    threading.Event().wait()
    '''
    folder = make_private_folder()
    process = subprocess.Popen([sys.executable, "-c", worker.replace("\\n    ", "\\n")], stdout=subprocess.PIPE,
                               start_new_session=True)
    record_worker(folder, process.pid)
    print(folder, process.pid, process.stdout.readline().decode().strip(), flush=True)
    threading.Event().wait()
""")


@pytest.fixture(autouse=True)
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where this test's folders are made; its path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="s-", dir="/tmp") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield Path(folder)


@contextmanager
def a_process(*, leads_a_session: bool = True) -> Iterator[ProcessIdentity]:
    """A process of somebody else's that waits until the test is over."""
    command = [sys.executable, "-c", "input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=leads_a_session) as process:
        try:
            yield identity(process.pid)
        finally:
            process.kill()


def identity(pid: int) -> ProcessIdentity:
    facts = facts_of(pid)
    assert facts is not None
    return facts.identity


def earlier(process: ProcessIdentity) -> ProcessIdentity:
    """A process that had the same id before this one."""
    return ProcessIdentity(process.pid, process.started - 1)


def a_dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def a_folder(
    base: Path, service: ProcessIdentity, worker: ProcessIdentity | None = None, boot: str | None = None
) -> Path:
    """A folder as a service would have left it."""
    record: dict[str, Any] = {"boot_id": boot or boot_id(), "service": as_json(service)}
    record["worker"] = None if worker is None else as_json(worker)
    return a_folder_with(base, service.pid, json.dumps(record))


def a_folder_with(base: Path, pid: int, record: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=f"llorch-{pid}-", dir=base))
    (folder / "owner.json").write_text(record)
    return folder


def as_json(process: ProcessIdentity) -> dict[str, int]:
    return {"pid": process.pid, "started": process.started}


def is_alive(process: ProcessIdentity) -> bool:
    return not Watched(process.pid).is_gone_within(0)


def test_a_worker_that_outlived_its_service_is_ended(caplog: pytest.LogCaptureFixture) -> None:
    """kill -9 of a service whose worker did not notice: the next sweep ends it, its children too, and says so."""
    with subprocess.Popen([sys.executable, "-c", _SERVICE], stdout=subprocess.PIPE, text=True) as service:
        assert service.stdout is not None
        folder, worker, child = service.stdout.readline().split()
        left = [Watched(int(worker)), Watched(int(child))]
        sweep_private_folders()
        assert Path(folder).exists()
        service.kill()
        service.wait()
        assert not any(process.is_gone_within(0.2) for process in left)
        with caplog.at_level(logging.WARNING):
            sweep_private_folders()
        assert all(process.is_gone_within(0) for process in left)
        assert not Path(folder).exists()
        assert f"process {worker} outlived its service" in caplog.text


def test_a_process_that_got_the_workers_id_is_left_alone(base: Path) -> None:
    """Id and boot agree, the time of the start does not: another process, which nobody may kill."""
    with a_process() as stranger:
        folder = a_folder(base, earlier(identity(os.getpid())), earlier(stranger))
        sweep_private_folders()
        assert is_alive(stranger)
        assert not folder.exists()


def test_a_living_services_folder_is_left_alone(base: Path) -> None:
    """Id, start and boot agree: its worker goes on."""
    with a_process() as service, a_process() as worker:
        folder = a_folder(base, service, worker)
        sweep_private_folders()
        assert is_alive(worker)
        assert folder.exists()


def test_a_process_that_got_the_services_id_is_not_the_service(base: Path) -> None:
    """A folder does not stay for ever because some other process has its owner's id."""
    with a_process() as stranger, a_process() as worker:
        folder = a_folder(base, earlier(stranger), worker)
        sweep_private_folders()
        assert not is_alive(worker)
        assert is_alive(stranger)
        assert not folder.exists()


def test_a_service_that_only_waits_for_its_parent_is_dead(base: Path) -> None:
    """In a container nobody may read a killed service's exit code: it keeps its id, and runs no more."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as service, a_process() as worker:
        folder = a_folder(base, identity(service.pid), worker)
        service.kill()
        assert Watched(service.pid).is_gone_within(10)
        sweep_private_folders()
        assert not is_alive(worker)
        assert not folder.exists()


def test_the_record_of_another_boot_kills_nothing(base: Path) -> None:
    """Ids and times of another boot name nobody; the folder goes."""
    with a_process() as stranger:
        folder = a_folder(base, identity(os.getpid()), stranger, boot="0b84a2d5-0000-4000-8000-000000000000")
        sweep_private_folders()
        assert is_alive(stranger)
        assert not folder.exists()


def test_a_recorded_process_without_a_session_of_its_own_is_left_alone(base: Path) -> None:
    """It is no worker of ours, and its session is somebody else's (here the test's own)."""
    with a_process(leads_a_session=False) as stranger:
        folder = a_folder(base, earlier(identity(os.getpid())), stranger)
        sweep_private_folders()
        assert is_alive(stranger)
        assert not folder.exists()


@pytest.mark.parametrize(
    "record",
    [
        *("", "{", "[]", "null", '{"boot_id": 5}', '{"boot_id": "x", "service": {"pid": "1", "started": 2}}'),
        '{"boot_id": "' + "x" * 5000 + '"}',
    ],
)
def test_a_damaged_record_kills_nothing(base: Path, record: str) -> None:
    """Then the folder's name tells whose it was: a dead service's folder goes, a living one's stays."""
    dead, living = a_folder_with(base, a_dead_pid(), record), a_folder_with(base, os.getpid(), record)
    sweep_private_folders()
    assert not dead.exists()
    assert living.exists()


def test_a_record_that_is_no_file_kills_nothing(base: Path) -> None:
    """A link to somebody else's record, and a folder of that name, are no records."""
    with a_process() as stranger:
        elsewhere = a_folder(base, earlier(stranger), stranger) / "owner.json"
        target = elsewhere.rename(base / "record.json")
        folders = [a_folder_with(base, a_dead_pid(), "") for _ in range(2)]
        for folder in folders:
            (folder / "owner.json").unlink()
        (folders[0] / "owner.json").symlink_to(target)
        (folders[1] / "owner.json").mkdir()
        sweep_private_folders()
        assert is_alive(stranger)
        assert not any(folder.exists() for folder in folders)


def test_what_is_not_our_folder_is_left_alone(base: Path) -> None:
    """A link and a file with such a name are not followed and not removed."""
    pid = a_dead_pid()
    elsewhere = base / "elsewhere"
    elsewhere.mkdir()
    link, file = base / f"llorch-{pid}-link", base / f"llorch-{pid}-file"
    link.symlink_to(elsewhere)
    file.touch()
    sweep_private_folders()
    assert link.is_symlink()
    assert file.exists()
    assert elsewhere.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_another_users_folder_is_left_alone(base: Path) -> None:
    """Neither the folder nor whom it names."""
    with a_process() as stranger:
        folder = a_folder(base, earlier(stranger), stranger)
        os.chown(folder, 12345, 12345)
        sweep_private_folders()
        assert is_alive(stranger)
        assert folder.exists()


def test_a_worker_that_does_not_end_keeps_its_record(
    base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The start goes on with a line in the log, and the next sweep tries again."""
    with a_process() as service, a_process() as worker:
        folder = a_folder(base, earlier(service), worker)
        monkeypatch.setattr(private_folder, "_KILL_WAIT_S", 0.0)
        sweep_private_folders()
        assert f"process {worker.pid} does not end" in caplog.text
        assert folder.exists()
        monkeypatch.undo()
        assert end_session(worker, limit_s=5) == 1
        assert not is_alive(worker)


def test_a_fresh_folder_is_private_and_has_its_owner() -> None:
    """Only this user may enter, a socket's path fits, and the sweep knows who lives there from the first moment."""
    folder = make_private_folder()
    try:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert len(str(folder / "engine.sock")) <= 107
        assert _record(folder) == {"boot_id": boot_id(), "service": as_json(identity(os.getpid())), "worker": None}
        with a_process() as worker:
            record_worker(folder, worker.pid)
            assert _record(folder)["worker"] == as_json(worker)
        record_worker(folder, a_dead_pid())
        assert _record(folder)["worker"] == as_json(worker)
        assert [file.name for file in folder.iterdir()] == ["owner.json"]
        sweep_private_folders()
        assert folder.exists()
    finally:
        remove_private_folder(folder)


def _record(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "owner.json").read_text())
    return record


def test_a_long_temporary_folder_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Unix socket's path has 107 bytes: a base that is too long is not used."""
    base = tmp_path / ("x" * 100)
    base.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    folder = make_private_folder()
    remove_private_folder(folder)
    assert base not in folder.parents
