"""Workers that embed and rank: what each engine offers, and that its numbers depend on the text alone."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_orch.engines import ctransformers
from llama_orch.engines.base import Engine, JobRefused, LoadFailed, Offer, ReadJob, WorkerLost
from llama_orch.engines.ctransformers import CtransformersEngine
from llama_orch.engines.llamacpp import LlamaCppEngine
from llama_orch.engines.simulated import ServiceModel, SimulatedEngine
from tests.encoders import CLS, CTX, LAST, MEAN, RANK, a_pooling_decoder, an_encoder

from .support import a_job, a_spec, a_worker, collect, run

TEXTS = ["the fox is red", "the old dog", "a house by the sea"]
ENGINES: dict[str, Callable[[Path], Engine]] = {
    "llamacpp": lambda _: LlamaCppEngine(),
    "llamacpp-binary": lambda binary: LlamaCppEngine("binary", binary),
    "ctransformers": lambda _: CtransformersEngine(),
    "simulated": lambda _: SimulatedEngine(ServiceModel(load_s=0.01, prefill_s_per_token=0.0001)),
}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, llama_server: Path) -> Engine:
    if request.param == "ctransformers" and not ctransformers.is_installed():
        pytest.skip("the extra ctransformers is not installed")
    return ENGINES[request.param](llama_server)


def for_embedding(engine: Engine, folder: Path) -> Path:
    """A model that this engine embeds with."""
    is_decoder = engine.traits.name == "ctransformers"
    return a_pooling_decoder(folder / "embeds.gguf") if is_decoder else an_encoder(folder / "embeds.gguf")


@pytest.mark.spec("HP-DET-1", "HP-STR-1")
def test_a_vector_depends_on_its_text_alone(engine: Engine, tmp_path: Path) -> None:
    """Of length 1, the same again, after others, beside others, and in another process."""
    model = for_embedding(engine, tmp_path)
    slots = engine.traits.max_slots or 3

    async def vectors() -> list[tuple[float, ...]]:
        async with a_worker(engine, a_spec(model, slots)) as worker:
            first = [(await worker.read(ReadJob(text, 0))).vector for text in TEXTS]
            again = [(await worker.read(ReadJob(text, slots - 1))).vector for text in reversed(TEXTS)]
            assert again[::-1] == first
            beside = await asyncio.gather(
                *(worker.read(ReadJob(text, slot)) for slot, text in enumerate(TEXTS[:slots]))
            )
            assert [one.vector for one in beside] == first[:slots]
            assert all(one.tokens_in > 2 and one.ms >= 0 for one in beside)
            return first

    async def main() -> None:
        first = await vectors()
        assert first == await vectors()
        assert len(set(first)) == 3
        for vector in first:
            assert math.isclose(sum(value * value for value in vector), 1.0, abs_tol=1e-5)

    run(main())


@pytest.mark.spec("HP-STR-1")
@pytest.mark.parametrize("name", ["llamacpp", "llamacpp-binary", "simulated"])
def test_a_score_depends_on_query_and_document(name: str, llama_server: Path, tmp_path: Path) -> None:
    """And on nothing else."""

    async def main() -> None:
        async with a_worker(ENGINES[name](llama_server), a_spec(an_encoder(tmp_path / "ranks.gguf", RANK))) as worker:

            async def score(query: str, text: str) -> float:
                return (await worker.read(ReadJob(text, 0, query=query))).score

            first = await score("the fox", TEXTS[0])
            assert await score("the fox", TEXTS[1]) != first
            assert await score("a dog", TEXTS[0]) != first
            assert await score("the fox", TEXTS[0]) == first

    run(main())


@pytest.mark.spec("HP-ADM-7")
def test_a_text_over_the_context_is_refused(engine: Engine, tmp_path: Path) -> None:
    """The job, not the worker."""

    async def main() -> None:
        async with a_worker(engine, a_spec(for_embedding(engine, tmp_path), ctx=CTX)) as worker:
            with pytest.raises(JobRefused, match=r"context|too large"):
                await worker.read(ReadJob("fox " * 600, 0))
            assert (await worker.read(ReadJob("the fox", 0))).vector

    run(main())


@pytest.mark.spec("HP-STR-6")
def test_a_canceled_reading_leaves_the_slot_free(engine: Engine, tmp_path: Path) -> None:
    """When the cancel is through, the engine is done with the text, and the slot serves the next one."""

    async def main() -> None:
        async with a_worker(engine, a_spec(for_embedding(engine, tmp_path), ctx=CTX)) as worker:
            for _ in range(3):
                task = asyncio.create_task(worker.read(ReadJob("fox " * 160, 0)))
                await asyncio.wait([task], timeout=0)  # it has begun
                task.cancel()
                await asyncio.wait([task])
                assert task.cancelled()
                await worker.evict(0)
                assert (await worker.read(ReadJob("the fox", 0))).tokens_in > 1

    run(main())


@pytest.mark.spec("HP-DIS-1", "HP-ADM-4")
def test_what_a_model_is_for_is_read_from_its_header(tiny_model: Path, tmp_path: Path) -> None:
    """llama.cpp serves it for that and for nothing else."""
    llamacpp = LlamaCppEngine()
    features = ("chat", "grammar", "json_schema", "kv_reuse", "logprobs", "min_p")
    assert llamacpp.offer(tiny_model) == Offer(("completion",), features)
    for pooling in (MEAN, CLS, LAST):
        path = an_encoder(tmp_path / f"{pooling}.gguf", pooling)
        assert llamacpp.refusal(path) is None
        assert llamacpp.offer(path) == Offer(("embedding",), reads_whole_ctx=True)
    assert llamacpp.offer(an_encoder(tmp_path / "ranks.gguf", RANK)) == Offer(("rerank",), reads_whole_ctx=True)
    assert llamacpp.offer(a_pooling_decoder(tmp_path / "decoder.gguf")) == Offer(("embedding",))


def test_an_encoder_that_does_not_say_how_it_pools_is_refused(tmp_path: Path) -> None:
    """Whatever were chosen for it could be wrong."""
    path = an_encoder(tmp_path / "unsaid.gguf", pooling=None)
    assert "does not say how it pools its tokens (bert.pooling_type)" in str(LlamaCppEngine().refusal(path))
    assert "bert.pooling_type 9, which is unknown" in str(
        LlamaCppEngine().refusal(an_encoder(tmp_path / "nine.gguf", pooling=9))
    )

    async def main() -> None:
        with pytest.raises(LoadFailed, match="how it pools"):
            await LlamaCppEngine().launch(a_spec(path))

    run(main())


@pytest.mark.spec("HP-ADM-4")
def test_ctransformers_embeds_as_llama_cpp_does(tmp_path: Path) -> None:
    """The last token's vector: nearly the same numbers from two programs. A model that pools in another way it leaves
    alone."""
    if not ctransformers.is_installed():
        pytest.skip("the extra ctransformers is not installed")
    model = a_pooling_decoder(tmp_path / "last.gguf")
    assert CtransformersEngine().offer(model).workloads == ("completion", "embedding")
    assert CtransformersEngine().offer(a_pooling_decoder(tmp_path / "mean.gguf", MEAN)).workloads == ("completion",)

    async def vector(engine: Engine) -> tuple[float, ...]:
        async with a_worker(engine, a_spec(model)) as worker:
            return (await worker.read(ReadJob("Once upon a time there was a brave fox.", 0))).vector

    async def main() -> None:
        old, new = await vector(CtransformersEngine()), await vector(LlamaCppEngine())
        assert sum(a * b for a, b in zip(old, new, strict=True)) > 0.999

    run(main())


def test_a_story_is_the_same_after_an_embedding(tiny_model: Path) -> None:
    """ctransformers has one context for both: nothing of one is left in the other."""
    if not ctransformers.is_installed():
        pytest.skip("the extra ctransformers is not installed")

    async def main() -> None:
        async with a_worker(CtransformersEngine(), a_spec(tiny_model)) as worker:
            before = await collect(worker, a_job(max_tokens=12))
            await worker.read(ReadJob("the of and to in is that it was something else", 0))
            for reuse in ("exact", "none"):
                chunks, done = await collect(worker, a_job(max_tokens=12, kv_reuse=reuse))
                assert chunks == before[0]
                assert done.tokens_cached == 0

    run(main())


def test_a_worker_that_dies_while_it_reads_is_lost(tmp_path: Path) -> None:
    """And not refused: the replica has to be replaced."""

    async def main() -> None:
        worker = await LlamaCppEngine().launch(a_spec(an_encoder(tmp_path / "embeds.gguf")))
        await worker.ready()
        await worker.stop(5)
        with pytest.raises(WorkerLost):
            await worker.read(ReadJob("the fox", 0))

    run(main())
