"""What every engine must keep, whatever is behind it. A new engine is one line in `ENGINES`."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from llama_orch.engines import ctransformers
from llama_orch.engines.base import Chunk, Completion, DecodeStalled, Engine, JobRefused, LoadFailed, Worker, WorkerLost
from llama_orch.engines.ctransformers import CtransformersEngine
from llama_orch.engines.llamacpp import LlamaCppEngine
from llama_orch.engines.simulated import ServiceModel, SimulatedEngine, SimulatedWorker

from .support import PROMPT, a_job, a_spec, a_worker, collect, run, text_of, until

ENGINES: dict[str, Callable[[Path], Engine]] = {
    "llamacpp": lambda _: LlamaCppEngine(),
    "llamacpp-binary": lambda binary: LlamaCppEngine("binary", binary),
    "ctransformers": lambda _: CtransformersEngine(),
    "simulated": lambda _: SimulatedEngine(ServiceModel(load_s=0.01, decode_s_per_token=0.002)),
}
REAL = [name for name in ENGINES if name != "simulated"]
SEEDS = range(64)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, llama_server: Path) -> Engine:
    if request.param == "ctransformers" and not ctransformers.is_installed():
        pytest.skip("the extra ctransformers is not installed")
    return ENGINES[request.param](llama_server)


def _kill(worker: object) -> None:
    """End the worker the hard way, as the kernel or another person would."""
    if isinstance(worker, SimulatedWorker):
        worker.crash()
    else:
        os.kill(worker._process.pid, signal.SIGKILL)  # type: ignore[attr-defined]


def _thaw(worker: object) -> None:
    if isinstance(worker, SimulatedWorker):
        worker.resume()
    else:
        os.killpg(worker._process.pid, signal.SIGCONT)  # type: ignore[attr-defined]


def _freeze(worker: object) -> None:
    """Have the worker do nothing at all, while it still exists."""
    if isinstance(worker, SimulatedWorker):
        worker.hang()
    else:
        os.killpg(worker._process.pid, signal.SIGSTOP)  # type: ignore[attr-defined]


async def _drain(stream: AsyncIterator[object]) -> None:
    async for _ in stream:
        pass


async def _frozen_in_mid_stream(worker: Worker, idle_timeout_s: float = 60.0) -> asyncio.Task[None]:
    """A task that reads a stream whose worker was frozen after its first token and before its last. A small model may
    be done before it can be frozen; then the next seed has its turn."""
    for seed in range(50):
        stream = worker.generate(a_job(seed=seed, max_tokens=480, temperature=1.5, idle_timeout_s=idle_timeout_s))
        await anext(stream)
        _freeze(worker)
        reading = asyncio.create_task(_drain(stream))
        await asyncio.wait([reading], timeout=0.2)
        if not reading.done():
            return reading
        reading.result()
        _thaw(worker)
    raise AssertionError("every stream ended before its worker was frozen")


def test_a_worker_reports_what_it_granted(engine: Engine, tiny_model: Path) -> None:
    """Slots and context come from the engine, not from the request."""

    async def main() -> None:
        worker = await engine.launch(a_spec(tiny_model))
        try:
            facts = await worker.ready()
        finally:
            await worker.stop(5)
        assert (facts.slots, facts.ctx) == (1, 512)
        assert facts.engine_version
        assert engine.refusal(tiny_model) is None

    run(main())


def test_a_stream_is_chunks_and_then_one_completion(engine: Engine, tiny_model: Path) -> None:
    """The tokens of the chunks add up to those of the completion, and the limit is kept."""

    async def main() -> None:
        async with a_worker(engine, a_spec(tiny_model)) as worker:
            chunks, done = await collect(worker, a_job(max_tokens=24))
            assert sum(chunk.tokens for chunk in chunks) == done.tokens_out <= 24
            assert done.tokens_in == await worker.count_tokens(a_job().prompt)
            assert done.tokens_cached == 0
            assert done.finish_reason == ("length" if done.tokens_out == 24 else "stop")
            assert done.prefill_ms >= 0
            assert done.decode_ms >= 0

    run(main())


@pytest.mark.spec("HP-DET-1", "HP-DET-3", "HP-ADM-6")
def test_a_seed_decides_the_text(engine: Engine, tiny_model: Path) -> None:
    """64 seeds, twice: each the same again, and not all alike."""

    async def texts(worker: object) -> list[str]:
        return [text_of((await collect(worker, a_job(seed=seed, max_tokens=12)))[0]) for seed in SEEDS]  # type: ignore[arg-type]

    async def main() -> None:
        async with a_worker(engine, a_spec(tiny_model)) as worker:
            first = await texts(worker)
            await collect(worker, a_job(prompt="something else in between"))
            assert await texts(worker) == first
            assert len(set(first)) > len(SEEDS) // 2
        async with a_worker(engine, a_spec(tiny_model)) as worker:
            assert await texts(worker) == first

    run(main())


@pytest.mark.spec("HP-STR-6")
def test_closing_the_stream_frees_the_slot(engine: Engine, tiny_model: Path) -> None:
    """When `aclose` returns, the engine has stopped, and the same slot serves the next job."""

    async def main() -> None:
        async with a_worker(engine, a_spec(tiny_model)) as worker:
            stream = worker.generate(a_job(max_tokens=400))
            assert isinstance(await anext(stream), Chunk)
            await stream.aclose()
            if not isinstance(worker, SimulatedWorker):
                assert not any(slot.is_processing for slot in await worker._client.slots())  # type: ignore[attr-defined]
            _, done = await collect(worker, a_job(max_tokens=4))
            assert done.tokens_out <= 4

    run(main())


@pytest.mark.spec("HP-STR-6")
def test_canceling_the_task_frees_the_slot(engine: Engine, tiny_model: Path) -> None:
    """A cancel that hits before anything came is a cancel too."""

    async def main() -> None:
        async with a_worker(engine, a_spec(tiny_model)) as worker:
            task = asyncio.create_task(collect(worker, a_job(max_tokens=400)))
            await until(lambda: task.done() or worker_is_busy(task))
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled() or not task.exception()
            _, done = await collect(worker, a_job(max_tokens=4))
            assert done.tokens_out <= 4

    def worker_is_busy(task: asyncio.Task[object]) -> bool:
        return bool(task.get_stack())

    run(main())


def test_leaving_after_the_completion_is_not_a_cancel(engine: Engine, tiny_model: Path) -> None:
    """Who has seen the completion may stop iterating, and the worker is not asked about its slots."""

    async def main() -> None:
        async with a_worker(engine, a_spec(tiny_model)) as worker:
            async with aclosing(worker.generate(a_job(max_tokens=3))) as stream:
                async for item in stream:
                    if isinstance(item, Completion):
                        break
            await collect(worker, a_job(max_tokens=3))

    run(main())


@pytest.mark.spec("HP-ADM-7")
def test_a_prompt_over_the_context_is_refused(engine: Engine, tiny_model: Path) -> None:
    """The job is refused, the worker is still sound."""

    async def main() -> None:
        async with a_worker(engine, a_spec(tiny_model)) as worker:
            with pytest.raises(JobRefused, match="context"):
                await collect(worker, a_job(prompt="the of " * 600))
            await collect(worker, a_job(max_tokens=2))

    run(main())


def test_the_end_of_the_context_ends_the_answer(engine: Engine, tiny_model: Path) -> None:
    """No engine decodes past its context, however many tokens were asked for."""

    async def main() -> None:
        async with a_worker(engine, a_spec(tiny_model)) as worker:
            jobs = [a_job(prompt="the of " * 200, max_tokens=4000, seed=seed, temperature=1.5) for seed in range(8)]
            ends = [(await collect(worker, job))[1] for job in jobs]
            assert all(done.tokens_in + done.tokens_out <= 513 for done in ends)
            assert "length" in {done.finish_reason for done in ends}

    run(main())


@pytest.mark.spec("HP-STR-5")
def test_text_is_whole_utf8(engine: Engine, tiny_model: Path) -> None:
    """Multi-byte characters go in and come out whole: every chunk encodes, and counting does not trip over them."""

    async def main() -> None:
        async with a_worker(engine, a_spec(tiny_model)) as worker:
            prompt = "naïve 日本語 🎉🎉 é" * 4
            assert await worker.count_tokens(prompt) > 1
            for seed in range(8):
                chunks, _ = await collect(worker, a_job(prompt=prompt, seed=seed, temperature=2.0, top_k=0))
                for chunk in chunks:
                    chunk.text.encode()

    run(main())


def test_a_stop_string_ends_the_answer(engine: Engine, tiny_model: Path) -> None:
    """The stop string and what follows are never shown."""

    async def main() -> None:
        async with a_worker(engine, a_spec(tiny_model)) as worker:
            text = text_of((await collect(worker, a_job(max_tokens=24)))[0])
            found = re.search("[a-z]{2}", text[len(text) // 4 :])
            assert found
            stop = found[0]
            chunks, done = await collect(worker, a_job(max_tokens=24, stop=(stop,)))
            assert text_of(chunks) == text[: text.find(stop)]
            assert done.finish_reason == "stop"

    run(main())


@pytest.mark.spec("HP-SES-1", "HP-SES-3")
def test_kv_is_reused_when_asked_and_gone_when_evicted(engine: Engine, tiny_model: Path) -> None:
    """A second turn on the same slot finds its beginning there; after an eviction it does not."""

    async def main() -> None:
        async with a_worker(engine, a_spec(tiny_model)) as worker:
            await collect(worker, a_job(kv_reuse="any"))
            _, warm = await collect(worker, a_job(prompt=a_job().prompt + " more", kv_reuse="any"))
            assert warm.tokens_cached > 0
            await worker.evict(0)
            _, cold = await collect(worker, a_job(kv_reuse="any"))
            assert cold.tokens_cached == 0

    run(main())


@pytest.mark.spec("HP-DET-1", "HP-SES-3")
def test_an_exact_reuse_leaves_every_byte(engine: Engine, tiny_model: Path) -> None:
    """Turn after turn of a conversation on its slot: the engine reads only the new part, and says what it would have
    said cold. What is not exact any more, because others or an inexact run used the slot, is read anew."""

    async def main() -> None:
        async with a_worker(engine, a_spec(tiny_model, ctx=1024)) as worker:
            for seed in range(6):
                history = " ".join([PROMPT] * (9 + seed))
                for turn in range(3):
                    told = {"prompt": history, "seed": seed, "max_tokens": 16}
                    chunks, warm = await collect(worker, a_job(**told, kv_reuse="exact"))
                    assert (warm.tokens_cached >= 64) is (turn > 0), (seed, turn)
                    assert warm.tokens_cached < warm.tokens_in
                    history += text_of(chunks) + " and then" + f" {PROMPT}" * (1 + seed)
                    turns.append((told, text_of(chunks)))
                await collect(worker, a_job(prompt="Once", kv_reuse="any" if seed % 2 else "none"))
            for told, text in turns:
                chunks, cold = await collect(worker, a_job(**told))
                assert (cold.tokens_cached, text_of(chunks)) == (0, text)

    turns: list[tuple[dict[str, object], str]] = []
    run(main())


@pytest.mark.spec("HP-PLC-7")
def test_a_worker_killed_in_mid_stream_is_lost(engine: Engine, tiny_model: Path) -> None:
    """The stream ends with WorkerLost, `lost` says how, and later requests fail at once."""

    async def main() -> None:
        async with a_worker(engine, a_spec(tiny_model)) as worker:
            reading = await _frozen_in_mid_stream(worker)
            _kill(worker)
            with pytest.raises(WorkerLost):
                await reading
            assert "SIGKILL" in await worker.lost()
            with pytest.raises(WorkerLost):
                await worker.count_tokens("x")

    run(main())


@pytest.mark.spec("HP-PLC-7")
def test_a_worker_that_hangs_is_found_out(engine: Engine, tiny_model: Path) -> None:
    """No token for longer than the job's idle limit is DecodeStalled; the worker can still be stopped."""

    async def main() -> None:
        async with a_worker(engine, a_spec(tiny_model)) as worker:
            reading = await _frozen_in_mid_stream(worker, idle_timeout_s=2.0)
            with pytest.raises(DecodeStalled):
                await reading
            await worker.stop(grace_s=0.05)
            assert await worker.lost()

    run(main())


@pytest.mark.spec("HP-PLC-7")
def test_stop_is_idempotent_and_ends_a_stream(engine: Engine, tiny_model: Path) -> None:
    """A second stop finds nothing to do, and a stream that was open breaks."""

    async def main() -> None:
        async with a_worker(engine, a_spec(tiny_model)) as worker:
            reading = await _frozen_in_mid_stream(worker)
            await worker.stop(grace_s=0.05)
            await worker.stop(grace_s=0.05)
            with pytest.raises(WorkerLost):
                await reading

    run(main())


@pytest.mark.parametrize("changes", [{"max_tokens": 0}, {"slot": 1}, {"slot": -1}])
def test_a_job_out_of_range_is_refused(engine: Engine, tiny_model: Path, changes: dict[str, int]) -> None:
    """Negative values have been memory errors upstream, and a slot too high lands on another one."""

    async def main() -> None:
        async with a_worker(engine, a_spec(tiny_model)) as worker:
            with pytest.raises(JobRefused):
                await collect(worker, a_job(**changes))

    run(main())


def test_a_chat_is_rendered(engine: Engine, tiny_model: Path) -> None:
    """The model's own template makes the prompt."""

    async def main() -> None:
        async with a_worker(engine, a_spec(tiny_model)) as worker:
            prompt = await worker.render_chat([{"role": "user", "content": "hello there"}])
            assert "hello there" in prompt
            assert prompt != "hello there"

    run(main())


@pytest.mark.parametrize("name", REAL)
def test_a_file_that_is_no_model_fails_to_load(name: str, llama_server: Path, tmp_path: Path) -> None:
    """A LoadFailed with a sentence, from the header alone."""
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + bytes(100))

    async def main() -> None:
        with pytest.raises(LoadFailed, match="GGUF"):
            await ENGINES[name](llama_server).launch(a_spec(path))

    if name == "ctransformers" and not ctransformers.is_installed():
        pytest.skip("the extra ctransformers is not installed")
    run(main())
