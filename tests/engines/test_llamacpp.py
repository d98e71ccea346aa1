"""What is particular to llama.cpp: several slots, its settings, and the engine's own refusals."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from llama_orch.engines.base import JobRefused, LoadFailed
from llama_orch.engines.client import completion_body
from llama_orch.engines.llamacpp import LlamaCppEngine
from llama_orch.workers import llamacpp as worker_module

from .support import PROMPT, a_job, a_spec, a_worker, collect, run, text_of


def test_the_version_is_known_without_loading_anything() -> None:
    """Capabilities name the build before any worker runs, and the worker reports the same."""
    assert LlamaCppEngine().traits.version == version("xllamacpp")


def test_the_worker_reports_the_same_version(tiny_model: Path) -> None:
    """HP-DET-2 compares the two."""

    async def main() -> None:
        engine = LlamaCppEngine()
        worker = await engine.launch(a_spec(tiny_model))
        try:
            facts = await worker.ready()
            assert facts.engine_version == engine.traits.version
            assert {"CPU/weights", "CPU/kv", "CPU/compute"} <= set(facts.buffer_bytes)
        finally:
            await worker.stop(5)

    run(main())


@pytest.mark.spec("HP-DET-1", "HP-DET-3")
def test_the_slot_does_not_change_the_text(tiny_model: Path) -> None:
    """Alone on a replica of four slots, a seed gives the same bytes in each of them as on a replica of one."""

    async def main() -> None:
        async with a_worker(LlamaCppEngine(), a_spec(tiny_model)) as worker:
            alone = [text_of((await collect(worker, a_job(seed=seed)))[0]) for seed in range(16)]
        async with a_worker(LlamaCppEngine(), a_spec(tiny_model, slots=4)) as worker:
            for slot in range(4):
                texts = [text_of((await collect(worker, a_job(seed=seed, slot=slot)))[0]) for seed in range(16)]
                assert texts == alone

    run(main())


@pytest.mark.spec("HP-STR-6")
def test_a_cancel_leaves_the_other_slots_alone(tiny_model: Path) -> None:
    """Four streams at once; one is canceled, three run to their end."""

    async def main() -> None:
        async with a_worker(LlamaCppEngine(), a_spec(tiny_model, slots=4)) as worker:
            others = [asyncio.create_task(collect(worker, a_job(slot=slot, max_tokens=200))) for slot in (1, 2, 3)]
            stream = worker.generate(a_job(slot=0, max_tokens=400))
            await anext(stream)
            await stream.aclose()
            for _, done in await asyncio.gather(*others):
                assert done.tokens_out <= 200

    run(main())


def test_a_job_is_refused_on_a_slot_that_is_not_there(tiny_model: Path) -> None:
    """llama.cpp would take slot 5 of 2 for slot 1."""

    async def main() -> None:
        async with a_worker(LlamaCppEngine(), a_spec(tiny_model, slots=2)) as worker:
            with pytest.raises(JobRefused, match="slot"):
                await collect(worker, a_job(slot=5))
            with pytest.raises(JobRefused, match="slot"):
                await worker.evict(2)

    run(main())


@pytest.mark.spec("HP-SEC-7")
def test_neither_key_nor_prompt_is_logged(tiny_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    """llama.cpp prints the end of its key at this level, and more at others: none of it gets into our log."""

    async def main() -> str:
        async with a_worker(LlamaCppEngine(), a_spec(tiny_model)) as worker:
            await collect(worker, a_job(prompt="the XYZZY of and"))
            return str(worker._client._api_key)  # type: ignore[attr-defined]

    with caplog.at_level(logging.DEBUG, "llama_orch.worker"):
        key = run(main())
    assert caplog.records
    assert not any(text in record.getMessage() for record in caplog.records for text in (key[-4:], "XYZZY"))


@pytest.mark.spec("HP-SEC-1")
def test_a_wrong_key_is_not_served(tiny_model: Path) -> None:
    """The socket is in a folder that only this user can enter, and still asks for its key."""

    async def main() -> None:
        async with a_worker(LlamaCppEngine(), a_spec(tiny_model)) as worker:
            client = worker._client  # type: ignore[attr-defined]
            client._api_key = "wrong"
            with pytest.raises(Exception, match="API Key"):
                await client.slots()

    run(main())


def test_an_idle_limit_does_not_hit_a_long_prefill(tiny_model: Path) -> None:
    """Progress events come while a long prompt is evaluated."""

    async def main() -> None:
        async with a_worker(LlamaCppEngine(), a_spec(tiny_model, ctx=2048)) as worker:
            stream = worker._client.complete(completion_body(a_job(prompt=PROMPT * 20), 1), 30)  # type: ignore[attr-defined]
            events = [event async for event in stream.events()]
            stream.close()
            assert events[0].tokens_predicted == 0
            assert events[-1].stop

    run(main())


def test_without_a_template_there_is_no_chat(tiny_model: Path, tmp_path: Path) -> None:
    """llama.cpp would use a template of its own that the model was never trained on."""
    path = tmp_path / "x.gguf"
    path.write_bytes(tiny_model.read_bytes().replace(b"tokenizer.chat_template", b"tokenizer.chat_templatf"))

    async def main() -> None:
        async with a_worker(LlamaCppEngine(), a_spec(path)) as worker:
            with pytest.raises(JobRefused, match="template"):
                await worker.render_chat([{"role": "user", "content": "x"}])

    run(main())


def test_a_card_that_is_not_there_fails_the_load(tiny_model: Path) -> None:
    """A CPU build never pretends to be on a GPU."""
    spec = replace(a_spec(tiny_model), backend="cuda", device_uuids=("GPU-none",))

    async def main() -> None:
        worker = await LlamaCppEngine().launch(spec)
        with pytest.raises(LoadFailed, match="GPU"):
            await worker.ready()

    run(main())


def test_a_missing_file_fails_at_launch(tmp_path: Path) -> None:
    """No process is started for nothing."""
    with pytest.raises(LoadFailed):
        run(LlamaCppEngine().launch(a_spec(tmp_path / "none.gguf")))
    assert LlamaCppEngine().refusal(tmp_path / "none.gguf")


def test_a_header_that_is_no_model_of_its_architecture_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """What every architecture of llama.cpp must state is missing under the name that is given: no worker starts."""
    named = b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama"
    assert named in tiny_model.read_bytes()
    path = tmp_path / "other.gguf"
    path.write_bytes(tiny_model.read_bytes().replace(named, named.replace(b"llama", b"llamx")))
    engine = LlamaCppEngine()
    assert engine.refusal(tiny_model) is None
    assert "names 'llamx' but lacks llamx.context_length" in str(engine.refusal(path))
    with pytest.raises(LoadFailed, match="llamx"):
        run(engine.launch(a_spec(path)))


@pytest.mark.spec("HP-DET-1", "HP-DET-2")
def test_what_decides_the_bytes_is_pinned() -> None:
    """Batch sizes and separate KV are set, not left to a default of the build."""
    import xllamacpp

    configuration = {
        "socket_path": "/x/engine.sock",
        "api_key": "k",
        "slots": 3,
        "ctx": 256,
        "threads": 2,
        "gpu": False,
    }
    configuration |= {"model_path": "/x", "slot_save_path": "/x/", "cache_ram_mib": 0, "tensor_split": [2.0, 1.0]}
    params = worker_module.parameters(xllamacpp, configuration)
    assert (params.n_batch, params.n_ubatch, params.kv_unified, params.n_ctx) == (128, 128, False, 768)
    assert (params.ui, params.fit_params, params.n_gpu_layers, params.server_tools) == (False, False, 0, [])
    assert list(params.tensor_split)[:3] == [2.0, 1.0, 0.0]
