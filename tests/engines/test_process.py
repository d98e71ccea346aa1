"""A worker's process: the protocol, how it ends, and that nothing of it stays behind."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from llama_orch.engines.base import LoadFailed, OutOfMemory
from llama_orch.engines.client import LlamaClient
from llama_orch.engines.http_worker import HttpWorker
from llama_orch.engines.private_folder import sweep_private_folders
from llama_orch.engines.process import WorkerProcess, exit_reason, worker_environment
from llama_orch.engines.processes import facts_of, session_members

from .support import Watched, a_spec, children, run, until

_KEY = "k" * 64


@pytest.fixture(autouse=True)
def _fake_worker_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])]))


@asynccontextmanager
async def a_process(act: str, stall_timeout_s: float = 30.0) -> AsyncGenerator[WorkerProcess, None]:
    process = WorkerProcess("fake_worker", {"engine": "fake", "replica_id": "r-1"}, stall_timeout_s)
    await process.start({"act": act, "api_key": _KEY}, (), secret=_KEY)
    try:
        yield process
    finally:
        await process.stop(grace_s=5)
        _assert_nothing_is_left(process)


def _assert_nothing_is_left(process: WorkerProcess) -> None:
    assert process.pid is not None
    assert not Path(f"/proc/{process.pid}").exists()
    assert session_members(process.pid) == []
    assert not process.folder.exists()


def _shown_by_ps(pid: int | None) -> list[bytes]:
    return [Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ")]


def test_a_worker_says_that_it_is_ready() -> None:
    """The ready line comes through, and stop ends the process by the end of stdin alone."""

    async def main() -> None:
        async with a_process("ready") as process:
            assert (await process.ready()).engine_version == "1"
            await process.stop(grace_s=30)
            assert await process.lost() == "exited with code 0"

    run(main())


def test_buffer_lines_become_facts() -> None:
    """What the engine says it allocated is added up by device and kind."""

    async def main() -> None:
        async with a_process("ready") as process:
            await process.ready()
            await until(lambda: bool(process.log.lines))
            assert process.log.buffer_bytes == {"CUDA0/weights": 4 << 20}

    run(main())


@pytest.mark.spec("HP-SEC-7", "HP-OBS-5")
def test_a_key_never_reaches_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """A worker's key is struck from its lines, control characters too, and the lines carry the worker's fields."""

    async def main() -> None:
        async with a_process("ready") as process:
            await process.ready()
            await until(lambda: any("red" in line for line in process.log.lines))

    with caplog.at_level(logging.DEBUG, "llama_orch.worker"):
        run(main())
    assert caplog.records
    assert all(_KEY not in record.getMessage() and "\x1b" not in record.getMessage() for record in caplog.records)
    assert {record.__dict__["fields"]["replica_id"] for record in caplog.records} == {"r-1"}


@pytest.mark.spec("HP-SEC-7")
def test_a_key_is_not_on_the_command_line() -> None:
    """The key goes through stdin: neither arguments nor environment show it."""

    async def main() -> None:
        async with a_process("ready") as process:
            await process.ready()
            assert not any(_KEY.encode() in shown for shown in _shown_by_ps(process.pid))

    run(main())


def test_what_a_library_prints_does_not_look_like_the_ready_line() -> None:
    """Descriptor 1 belongs to stderr in a worker; the ready line has a way of its own."""

    async def main() -> None:
        async with a_process("prints") as process:
            assert (await process.ready()).engine_version == "1"

    run(main())


@pytest.mark.parametrize(("act", "reason"), [("refuse", "no such luck"), ("abort", r"GGML_ASSERT\(x > 0\)")])
def test_a_failed_load_says_why(act: str, reason: str) -> None:
    """An exception and an abort alike become a LoadFailed with the nearest reason, and leave nothing."""

    async def main() -> None:
        async with a_process(act) as process:
            with pytest.raises(LoadFailed, match=reason):
                await process.ready()
            _assert_nothing_is_left(process)

    run(main())


def test_a_worker_that_dies_of_memory_right_after_its_load() -> None:
    """It said that it is ready and then answers nothing: the reason is what it died of."""

    async def main() -> None:
        async with a_process("loaded, then no memory") as process:
            client = LlamaClient(process.folder / "engine.sock", _KEY)
            worker = HttpWorker(process, client, a_spec(Path("model.gguf")), has_chat_template=False)
            with pytest.raises(OutOfMemory, match="killed by SIGABRT; CUDA error: out of memory"):
                await worker.ready()
            _assert_nothing_is_left(process)

    run(main())


def test_a_silent_load_is_a_stall() -> None:
    """No output for the stall timeout ends the load."""

    async def main() -> None:
        async with a_process("silent", stall_timeout_s=0.5) as process:
            with pytest.raises(LoadFailed, match="no sign of progress"):
                await process.ready()
            _assert_nothing_is_left(process)

    run(main())


def test_a_stalled_load_takes_its_children_along() -> None:
    """The stall ends the whole session and not only the process that is silent."""

    async def main() -> None:
        async with a_process("silent child", stall_timeout_s=1.0) as process:
            loading = asyncio.create_task(process.ready())
            await until(lambda: bool(process.log.lines))
            child = Watched(int(process.log.lines[0].split()[1]))
            with pytest.raises(LoadFailed, match="no sign of progress for 1 s"):
                await loading
            assert child.is_gone_within(0)
            _assert_nothing_is_left(process)

    run(main())


def test_a_slow_load_that_speaks_is_no_stall() -> None:
    """Any output pushes the deadline: this load takes longer than the timeout."""

    async def main() -> None:
        async with a_process("slow", stall_timeout_s=1.0) as process:
            assert (await process.ready()).ready

    run(main())


@pytest.mark.spec("HP-PLC-7")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_load_that_was_killed_names_the_signal(number: signal.Signals) -> None:
    """Somebody, such as the kernel, killed it while it loaded; a lack of memory is not guessed from SIGKILL."""

    async def main() -> None:
        async with a_process("silent child") as process:
            loading = asyncio.create_task(process.ready())
            await until(lambda: bool(process.log.lines))
            child = Watched(int(process.log.lines[0].split()[1]))
            assert process.pid is not None
            os.kill(process.pid, number)
            with pytest.raises(LoadFailed, match=f"ended while it loaded the model: killed by {number.name}") as caught:
                await loading
            assert type(caught.value) is LoadFailed
            assert child.is_gone_within(0)
            _assert_nothing_is_left(process)

    run(main())


@pytest.mark.spec("HP-PLC-7")
def test_a_canceled_load_leaves_nothing() -> None:
    """CancelledError in `ready` ends the process before it goes on."""

    async def main() -> None:
        async with a_process("silent") as process:
            loading = asyncio.create_task(process.ready())
            assert process.pid is not None
            watched = Watched(process.pid)
            asyncio.get_running_loop().call_soon(loading.cancel)
            with pytest.raises(asyncio.CancelledError):
                await loading
            assert watched.is_gone_within(0)
            _assert_nothing_is_left(process)

    run(main())


@pytest.mark.spec("HP-PLC-7")
def test_a_deaf_worker_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """End of stdin, SIGTERM, SIGKILL: the last one is heard by all."""
    monkeypatch.setenv("FAKE_WORKER", "deaf")

    async def main() -> None:
        async with a_process("ready") as process:
            await process.ready()
            await process.stop(grace_s=0.01)
            assert await process.lost() == "killed by SIGKILL"

    run(main())


@pytest.mark.spec("HP-PLC-7")
def test_a_worker_that_hears_sigterm_only_is_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM comes after the grace and before SIGKILL."""
    monkeypatch.setenv("FAKE_WORKER", "hears SIGTERM")

    async def main() -> None:
        async with a_process("ready") as process:
            await process.ready()
            await process.stop(grace_s=0.01)
            assert await process.lost() == "killed by SIGTERM"

    run(main())


@pytest.mark.spec("HP-PLC-7")
def test_a_deaf_worker_and_its_deaf_child_are_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No signal to the worker's group reaches the child, which has one of its own; the end of the session does."""
    monkeypatch.setenv("FAKE_WORKER", "deaf, with a deaf child")

    async def main() -> None:
        async with a_process("ready") as process:
            child = Watched(int((await process.ready()).engine_version))
            await process.stop(grace_s=0.01)
            assert await process.lost() == "killed by SIGKILL"
            assert child.is_gone_within(0)

    run(main())


@pytest.mark.spec("HP-PLC-7")
def test_a_grandchild_goes_too() -> None:
    """What the worker started ends with it, though it ignores the worker's end."""

    async def main() -> None:
        async with a_process("child") as process:
            grandchild = Watched(int((await process.ready()).engine_version))
            await process.stop(grace_s=5)
            assert grandchild.is_gone_within(2)

    run(main())


@pytest.mark.spec("HP-PLC-7")
def test_the_folder_says_who_lives_in_it() -> None:
    """From the start on, the sweep of a later service could find this worker."""

    async def main() -> None:
        async with a_process("ready") as process:
            assert process.pid is not None
            facts = facts_of(process.pid)
            assert facts is not None
            recorded = json.loads((process.folder / "owner.json").read_text())["worker"]
            assert recorded == {"pid": process.pid, "started": facts.identity.started}
            assert facts.session == process.pid

    run(main())


def test_a_folder_that_takes_no_record_is_a_failed_load() -> None:
    """A worker that no later sweep could find does not start: its process is gone before LoadFailed comes."""

    async def main() -> None:
        process = WorkerProcess("fake_worker", {"engine": "fake"})
        (process.folder / "owner.json.new").mkdir()
        with pytest.raises(LoadFailed, match="directory"):
            await process.start({"act": "ready", "api_key": _KEY}, (), secret=_KEY)
        _assert_nothing_is_left(process)

    run(main())


def test_an_endless_line_is_cut() -> None:
    """A worker cannot fill the service's memory through its log."""

    async def main() -> None:
        async with a_process("long line") as process:
            await process.ready()
            await until(lambda: "after" in process.log.lines)
            assert max(map(len, process.log.lines)) <= 2000

    run(main())


@pytest.mark.spec("HP-PLC-6", "HP-SEC-7")
def test_the_environment_is_scrubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings, proxies, preloads and tokens of the service do not reach a worker; the device mask does."""
    secret = {"LLAMA_ARG_HOST", "GGML_X", "https_proxy", "LD_PRELOAD", "LLORCH_API_TOKEN", "HF_TOKEN", "PYTHONSTARTUP"}
    for name in secret - {"LD_PRELOAD"}:
        monkeypatch.setenv(name, "x")

    async def main() -> None:
        async with a_process("environment") as process:
            environment = json.loads((await process.ready()).engine_version)
        assert not secret & set(environment)
        assert environment["CUDA_VISIBLE_DEVICES"] == ""

    run(main())
    given = worker_environment(dict.fromkeys(secret, "x") | {"CUDA_VISIBLE_DEVICES": "7"}, ("GPU-a", "GPU-b"))
    assert given == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}


@pytest.mark.spec("HP-PLC-7")
@pytest.mark.parametrize("launcher", ["embedded", "binary"])
def test_a_killed_service_leaves_no_worker(launcher: str, tiny_model: Path, llama_server: Path) -> None:
    """kill -9 of the service: its worker, and the user's binary under the wrapper, are gone within 2 seconds."""
    service = textwrap.dedent(f"""
        import asyncio, sys
        from pathlib import Path
        from llama_orch.engines.base import ReplicaSpec
        from llama_orch.engines.llamacpp import LlamaCppEngine
        async def main():
            binary = Path({str(llama_server)!r}) if {launcher!r} == "binary" else None
            worker = await LlamaCppEngine({launcher!r}, binary).launch(
                ReplicaSpec("r", "p", Path({str(tiny_model)!r}), 1, 256))
            facts = await worker.ready()
            print(facts.pid, flush=True)
            await asyncio.Event().wait()
        asyncio.run(main())
    """)
    with subprocess.Popen([sys.executable, "-c", service], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        watched = [Watched(pid) for pid in (worker, *children(worker))]
        assert len(watched) == (2 if launcher == "binary" else 1)
        parent.kill()
        parent.wait()
        assert all(process.is_gone_within(2) for process in watched)
    assert sweep_private_folders() >= 1


@pytest.mark.parametrize(
    ("code", "reason"), [(0, "exited with code 0"), (-9, "killed by SIGKILL"), (-99, "killed by signal 99")]
)
def test_an_exit_has_a_reason(code: int, reason: str) -> None:
    """How a process ended, in words."""
    assert exit_reason(code) == reason


def test_a_process_with_an_odd_name_is_no_obstacle() -> None:
    """Names in /proc are bytes that any local user chooses; the sweep of a dead worker's session reads past them."""
    rename = "import ctypes; ctypes.CDLL(None).prctl(15, b'\\xff\\xfe) R 1 1 1', 0, 0, 0)"
    program = f"{rename}; print('renamed', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as odd:
        assert odd.stdout is not None
        assert odd.stdout.readline() == b"renamed\n"
        assert odd.pid not in session_members(2**22 + 1)
        odd.communicate(b"\n")
