"""The simulated engine: its clock, its faults, and the registry that it is in. Stop strings are tested here too."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_orch.engines import ctransformers
from llama_orch.engines.base import LoadFailed, OutOfMemory
from llama_orch.engines.registry import build_engines
from llama_orch.engines.simulated import ServiceModel, SimulatedEngine
from llama_orch.workers.stop_strings import StopStrings

from .support import a_job, a_spec, a_worker, collect, run, text_of

_FAST = ServiceModel(load_s=0.0, prefill_s_per_token=0.0, decode_s_per_token=0.0)
_NO_FILE = Path("/nonexistent.gguf")


def test_a_load_can_be_made_to_fail() -> None:
    """The next launch fails with the given reason, later ones may work again."""

    async def main() -> None:
        engine = SimulatedEngine(_FAST, load_error="CUDA error: out of memory")
        worker = await engine.launch(a_spec(_NO_FILE))
        with pytest.raises(LoadFailed, match="out of memory"):
            await worker.ready()
        assert await worker.lost() == "CUDA error: out of memory"
        engine.load_error = None
        await (await engine.launch(a_spec(_NO_FILE))).ready()

    run(main())


@pytest.mark.parametrize(
    ("load_error", "kind"),
    [("CUDA error: out of memory", OutOfMemory), (OutOfMemory("full"), OutOfMemory), ("bad magic", LoadFailed)],
)
def test_a_load_fails_with_the_kind_of_its_reason(load_error: str | LoadFailed, kind: type[LoadFailed]) -> None:
    """A text is judged as a real engine's last words are; an exception is raised as it is."""

    async def main() -> None:
        worker = await SimulatedEngine(_FAST, load_error=load_error).launch(a_spec(_NO_FILE))
        with pytest.raises(LoadFailed) as caught:
            await worker.ready()
        assert type(caught.value) is kind
        assert await worker.lost() == str(load_error)

    run(main())


def test_a_crash_interrupts_a_load() -> None:
    """A load of an hour ends with the worker."""

    async def main() -> None:
        worker = await SimulatedEngine(ServiceModel(load_s=3600)).launch(a_spec(_NO_FILE))
        asyncio.get_running_loop().call_soon(worker.crash)
        with pytest.raises(LoadFailed, match="SIGKILL"):
            await worker.ready()

    run(main())


def test_times_follow_the_service_model() -> None:
    """What a completion reports is what the model of the service says."""

    async def main() -> None:
        engine = SimulatedEngine(ServiceModel(load_s=0, prefill_s_per_token=0.001, decode_s_per_token=0.002))
        async with a_worker(engine, a_spec(_NO_FILE)) as worker:
            _, done = await collect(worker, a_job(prompt="a b c", max_tokens=5))
            assert (done.tokens_in, done.tokens_out) == (4, 5)
            assert (done.prefill_ms, done.decode_ms) == (pytest.approx(4), pytest.approx(10))

    run(main())


def test_answers_may_end_by_themselves() -> None:
    """With a mean length, most answers end before their limit."""

    async def main() -> None:
        engine = SimulatedEngine(ServiceModel(load_s=0, prefill_s_per_token=0, decode_s_per_token=0, mean_tokens=5))
        async with a_worker(engine, a_spec(_NO_FILE)) as worker:
            reasons = [(await collect(worker, a_job(seed=seed, max_tokens=60)))[1].finish_reason for seed in range(20)]
            assert reasons.count("stop") > 10

    run(main())


def test_a_hang_can_end() -> None:
    """After `resume` the same stream goes on."""

    async def main() -> None:
        engine = SimulatedEngine(_FAST)
        async with a_worker(engine, a_spec(_NO_FILE)) as worker:
            stream = worker.generate(a_job(max_tokens=3))
            await anext(stream)
            engine.workers["r-1"].hang()
            asyncio.get_running_loop().call_soon(engine.workers["r-1"].resume)
            assert [item async for item in stream]

    run(main())


@pytest.mark.spec("HP-ADM-2")
def test_a_slot_that_is_leased_twice_is_a_loud_mistake() -> None:
    """It is the service's fault, and must not look like an engine's."""

    async def main() -> None:
        async with a_worker(SimulatedEngine(_FAST), a_spec(_NO_FILE)) as worker:
            stream = worker.generate(a_job(max_tokens=3))
            await anext(stream)
            with pytest.raises(RuntimeError, match="twice"):
                await collect(worker, a_job())
            await stream.aclose()
            chunks, _ = await collect(worker, a_job())
            assert text_of(chunks)

    run(main())


def test_the_registry_has_every_engine() -> None:
    """ctransformers only where its package is."""
    names = {"llamacpp", "simulated"} | ({"ctransformers"} if ctransformers.is_installed() else set())
    assert set(build_engines()) == names
    engine = SimulatedEngine(_FAST)
    assert build_engines(simulated=engine)["simulated"] is engine


def test_the_registry_refuses_weakening_arguments() -> None:
    """A configuration cannot move a worker's listener."""
    with pytest.raises(ValueError, match="--host"):
        build_engines("binary", "/bin/true", ["--host", "0.0.0.0"])


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_do_not_depend_on_the_pieces(text: str, stops: list[str], data: st.DataObject) -> None:
    """Fed in any pieces, what is shown is the text up to the first stop string that is complete."""
    matcher, shown, rest = StopStrings(stops), "", text
    while rest and not matcher.has_matched:
        n = data.draw(st.integers(1, len(rest)))
        shown, rest = shown + matcher.feed(rest[:n]), rest[n:]
    shown += matcher.flush()
    assert not any(stop in shown for stop in stops)
    assert text.startswith(shown)
    assert matcher.has_matched == any(stop in text for stop in stops)
    if not matcher.has_matched:
        assert shown == text
