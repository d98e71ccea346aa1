"""A lack of memory is told apart from every other end, by what real engines say when an allocation fails."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from llama_orch.engines import ctransformers
from llama_orch.engines.base import (
    Engine,
    LoadFailed,
    OutOfMemory,
    ReplicaSpec,
    WorkerLost,
    is_out_of_memory,
    load_failed,
)
from llama_orch.engines.ctransformers import CtransformersEngine
from llama_orch.engines.llamacpp import LlamaCppEngine
from llama_orch.engines.worker_log import WorkerLog

from .support import a_spec, a_worker, run

needs_ctransformers = pytest.mark.skipif(not ctransformers.is_installed(), reason="ctransformers is an extra")

# As the engines print them: on a card, on a CPU (those were seen, with build 11549), in C++, in Python, in the system.
ON_A_CARD = [
    "0.01.200.000 E ggml_backend_cuda_buffer_type_alloc_buffer: allocating 9000.00 MiB on device 0: cudaMalloc failed: "
    "out of memory",
    "0.01.200.000 E alloc_tensor_range: failed to allocate CUDA0 buffer of size 9437184000",
    "0.01.200.000 E ggml_gallocr_reserve_n_impl: failed to allocate CUDA0 buffer of size 9437184000",
    "0.01.200.000 E llama_model_load: error loading model: unable to allocate CUDA0 buffer",
    "0.01.200.000 E graph_reserve: failed to allocate compute buffers",
    "CUDA error: out of memory",
    "CUDA error: the resource allocation failed",
    "ggml_vulkan: Device memory allocation of size 4294967296 failed.",
    "ggml_vulkan: vk::Device::allocateMemory: ErrorOutOfDeviceMemory",
]
ON_A_CPU = [
    "0.00.030.589 E ggml_aligned_malloc: insufficient memory (attempted to allocate 480.00 MB)",
    "0.00.030.637 E ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 503316480",
    "0.00.030.658 E ggml_backend_buft_alloc_buffer_n_default: failed to allocate CPU buffer of size 503316480",
    "0.00.031.158 E llama_init_from_model: failed to initialize the context: failed to allocate buffer for kv cache",
    "0.00.330.182 E srv    operator(): got exception: std::bad_alloc",
    "terminate called after throwing an instance of 'std::bad_alloc'",
    "cannot allocate memory for thread-local data: ABORT",
    "mmap failed: Cannot allocate memory",
    "GGML_ASSERT: /builds/models/ggml/llama.cpp:453: data",
    "memory allocation of 1048576 bytes failed",
    "MemoryError: std::bad_alloc",
]
# Other troubles, and allocations that llama.cpp can do without.
OF_ANOTHER_KIND = [
    "ggml.c:1: GGML_ASSERT(x > 0) failed",
    "CUDA error: an illegal memory access was encountered",
    "0.00.031.158 E llama_model_load: error loading model: unknown model architecture: 'llamx'",
    "0.00.031.158 E decode: failed to find a memory slot for batch of size 128",
    "0.00.031.158 E gguf_init_from_file_impl: encountered bad_alloc error while reading key 3",
    "0.00.031.158 E srv  alloc: failed to allocate memory for prompt cache state: std::bad_alloc",
    "ggml_cuda_host_malloc: failed to allocate 512.00 MiB of pinned memory: out of memory",
    "0.00.031.158 D ggml_cuda_host_malloc: out of memory",
    "terminate called after throwing an instance of 'std::system_error'",
    "killed by SIGKILL",
]


def _log(*lines: str) -> WorkerLog:
    log = WorkerLog({})
    log.feed("".join(f"{line}\n" for line in lines).encode())
    return log


@pytest.mark.parametrize("line", [*ON_A_CARD, *ON_A_CPU])
def test_a_line_that_tells_of_it(line: str) -> None:
    """Whatever part of a library says it, the log takes it for the reason, and the reason for a lack of memory."""
    fatal = _log(line).fatal_error
    assert fatal
    assert is_out_of_memory(f"killed by SIGABRT; {fatal}")
    assert type(load_failed(fatal)) is OutOfMemory


@pytest.mark.parametrize("line", OF_ANOTHER_KIND)
def test_a_line_that_does_not(line: str) -> None:
    """Nothing is guessed: SIGKILL alone is no lack of memory, whoever sent it."""
    log = _log(line)
    assert not is_out_of_memory(log.fatal_error)
    assert not is_out_of_memory(log.first_error)
    assert type(load_failed(log.fatal_error or log.first_error)) is LoadFailed


def test_what_comes_of_it_does_not_hide_it() -> None:
    """llama.cpp aborts after the line that matters, and prints where; the first such line has size and device."""
    log = _log(ON_A_CARD[0], ON_A_CARD[1], "ggml/src/ggml-cuda/ggml-cuda.cu:104: CUDA error")
    assert log.fatal_error.startswith("ggml_backend_cuda_buffer_type_alloc_buffer: allocating 9000.00 MiB on device 0")
    assert _log("x.cu:104: CUDA error", "CUDA error: out of memory").fatal_error == "CUDA error: out of memory"


def test_an_exception_is_told_with_its_words() -> None:
    """The C++ runtime prints type and words on two lines; the reason has both."""
    thrown = "terminate called after throwing an instance of 'std::{}'"
    log = _log(thrown.format("system_error"), "  what():  Resource temporarily unavailable")
    assert log.fatal_error == thrown.format("system_error") + ": Resource temporarily unavailable"
    assert is_out_of_memory(_log(thrown.format("runtime_error"), "  what():  CUDA error: out of memory").fatal_error)


def test_what_the_worker_survived_explains_no_later_death() -> None:
    """A failed allocation that llama.cpp got over is no reason once it has gone on working."""
    log = _log(ON_A_CPU[4], *("0.00.400.000 I slot      release: stop processing" for _ in range(150)))
    assert log.fatal_error
    log.feed(b"0.00.500.000 I srv  update_slots: all slots are idle\n" * 100)
    assert log.fatal_error == ""


@contextmanager
def _little_memory(limit_bytes: int) -> Iterator[None]:
    """What is started meanwhile may have no more address space than this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _load_without_memory(engine: Engine, spec: ReplicaSpec) -> str:
    async def main() -> str:
        with _little_memory(4 << 30):
            worker = await engine.launch(spec)
        with pytest.raises(OutOfMemory) as caught:
            await worker.ready()
        assert is_out_of_memory(await worker.lost())
        return str(caught.value)

    return run(main())


@pytest.mark.spec("HP-PLC-7")
@pytest.mark.parametrize("launcher", ["embedded", "binary"])
def test_llama_cpp_has_no_room_for_its_context(launcher: str, tiny_model: Path, llama_server: Path) -> None:
    """Real llama.cpp with 15 GiB of KV in 4 GiB of address space: OutOfMemory, with the size that it asked for."""
    engine = LlamaCppEngine() if launcher == "embedded" else LlamaCppEngine("binary", llama_server)
    assert "15360.00 MB" in _load_without_memory(engine, a_spec(tiny_model, slots=4, ctx=1 << 20))


@needs_ctransformers
def test_ctransformers_has_no_room_for_its_context(tiny_model: Path) -> None:
    """It aborts without words; the place of the assertion tells."""
    assert "llama.cpp:453" in _load_without_memory(CtransformersEngine(), a_spec(tiny_model, ctx=1 << 22))


@pytest.mark.spec("HP-PLC-7")
def test_llama_cpp_runs_out_of_memory_later(tiny_model: Path) -> None:
    """A worker that can allocate nothing more dies of the next requests; the reason of the loss says of what."""

    async def main() -> None:
        async with a_worker(LlamaCppEngine(), a_spec(tiny_model)) as worker:
            _allow_nothing_more(worker._process.pid)  # type: ignore[attr-defined]
            with suppress(WorkerLost):
                while True:
                    await worker.count_tokens("the little fox " * 1000)
            assert is_out_of_memory(await worker.lost())

    run(main())


def _allow_nothing_more(pid: int | None) -> None:
    assert pid is not None
    size = re.search(r"VmSize:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert size is not None
    resource.prlimit(pid, resource.RLIMIT_AS, (int(size[1]) << 10, int(size[1]) << 10))
