"""What is particular to ctransformers: its traps, each with the test that it stays closed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from llama_orch.engines import ctransformers
from llama_orch.engines.base import JobRefused, LoadFailed
from llama_orch.engines.ctransformers import CtransformersEngine
from llama_orch.workers.ctransformers import instruction_set

from .support import a_job, a_spec, a_worker, collect, run, text_of

needs_library = pytest.mark.skipif(not ctransformers.is_installed(), reason="the extra ctransformers is not installed")


def _variant(model: Path, tmp_path: Path, old: bytes, new: bytes) -> Path:
    """A copy of the model with one string of its header changed."""
    content = model.read_bytes()
    assert old in content
    path = tmp_path / "variant.gguf"
    path.write_bytes(content.replace(old, new))
    return path


def test_another_architecture_is_refused_from_the_header(tiny_model: Path, tmp_path: Path) -> None:
    """The library would fail on it, or abort: no worker is started."""
    engine = CtransformersEngine()
    assert engine.refusal(tiny_model) is None
    path = _variant(
        tiny_model,
        tmp_path,
        b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama",
        b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0qwen2",
    )
    assert "llama architecture only" in str(engine.refusal(path))
    with pytest.raises(LoadFailed, match="qwen2"):
        run(engine.launch(a_spec(path)))


def test_another_vocabulary_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """It knows SentencePiece vocabularies only."""
    path = _variant(
        tiny_model,
        tmp_path,
        b"tokenizer.ggml.model\x08\0\0\0\x05\0\0\0\0\0\0\0llama",
        b"tokenizer.ggml.model\x08\0\0\0\x05\0\0\0\0\0\0\0gpt-2",
    )
    assert "SentencePiece" in str(CtransformersEngine().refusal(path))


def test_a_tensor_type_that_it_does_not_know_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """It fails on some types and aborts on others, so only those that were seen to load are let through."""
    at = tiny_model.read_bytes().find(b"output_norm.weight")
    content = bytearray(tiny_model.read_bytes())
    kind_at = at + len(b"output_norm.weight") + 4 + 8
    assert content[kind_at : kind_at + 4] == bytes(4)
    content[kind_at] = 30  # BF16, which needs no more room than F32
    path = tmp_path / "variant.gguf"
    path.write_bytes(content)
    assert "BF16" in str(CtransformersEngine().refusal(path))


@needs_library
def test_it_has_one_slot(tiny_model: Path) -> None:
    """More slots are a mistake of the configuration, and said so."""
    assert CtransformersEngine().traits.max_slots == 1
    with pytest.raises(LoadFailed, match="slots"):
        run(CtransformersEngine().launch(a_spec(tiny_model, slots=2)))


@needs_library
def test_a_long_text_of_wide_characters_is_counted(tiny_model: Path) -> None:
    """Its own tokenizer overruns its buffer here, which corrupts memory or crashes."""

    async def main() -> None:
        async with a_worker(CtransformersEngine(), a_spec(tiny_model)) as worker:
            assert await worker.count_tokens("🎉" * 20_000) > 20_000
            await collect(worker, a_job(max_tokens=4))

    run(main())


@needs_library
def test_a_nul_character_is_refused(tiny_model: Path) -> None:
    """A C string would end there, and the rest of the prompt be lost without a word."""

    async def main() -> None:
        async with a_worker(CtransformersEngine(), a_spec(tiny_model)) as worker:
            with pytest.raises(JobRefused, match="NUL"):
                await collect(worker, a_job(prompt="the\0of"))

    run(main())


@needs_library
def test_tokens_are_counted_while_it_decodes(tiny_model: Path) -> None:
    """Admission counts tokens while answers are written; it must not wait for their end."""

    async def main() -> None:
        async with a_worker(CtransformersEngine(), a_spec(tiny_model)) as worker:
            stream = worker.generate(a_job(max_tokens=450))
            await anext(stream)
            await worker.count_tokens("the of and")
            await stream.aclose()

    run(main())


@needs_library
@pytest.mark.spec("HP-DET-1")
def test_another_job_waits_for_the_slot(tiny_model: Path) -> None:
    """Two at once: one after the other, and neither changes the other's bytes."""

    async def main() -> None:
        async with a_worker(CtransformersEngine(), a_spec(tiny_model)) as worker:
            alone = [text_of((await collect(worker, a_job(seed=seed)))[0]) for seed in (1, 2)]
            both = await asyncio.gather(*(collect(worker, a_job(seed=seed)) for seed in (1, 2)))
            assert [text_of(chunks) for chunks, _ in both] == alone

    run(main())


@needs_library
def test_greedy_ignores_the_seed(tiny_model: Path) -> None:
    """Temperature 0 is the most likely token, whatever the dice."""

    async def main() -> None:
        async with a_worker(CtransformersEngine(), a_spec(tiny_model)) as worker:
            texts = {text_of((await collect(worker, a_job(seed=seed, temperature=0.0)))[0]) for seed in range(4)}
            assert len(texts) == 1

    run(main())


@needs_library
@pytest.mark.parametrize(
    "template",
    [
        pytest.param("{{ ''.__class__.__mro__[1].__subclasses__() }}", id="escape"),
        pytest.param("{{ raise_exception('roles must alternate') }}", id="raises"),
        pytest.param("{% for", id="syntax"),
        pytest.param("{{ messages[9].content.x }}", id="missing"),
    ],
)
def test_a_hostile_template_is_refused(template: str, tiny_model: Path, tmp_path: Path) -> None:
    """Templates come out of the file: the sandbox holds, and the worker stays sound."""
    content = tiny_model.read_bytes()
    at = content.find(b"tokenizer.chat_template") + len(b"tokenizer.chat_template") + 4
    length = int.from_bytes(content[at : at + 8], "little")
    path = tmp_path / "variant.gguf"
    path.write_bytes(content[: at + 8] + template.ljust(length).encode()[:length] + content[at + 8 + length :])

    async def main() -> None:
        async with a_worker(CtransformersEngine(), a_spec(path)) as worker:
            with pytest.raises(JobRefused, match="template"):
                await worker.render_chat([{"role": "user", "content": "x"}])
            assert await worker.count_tokens("x") > 0

    run(main())


@pytest.mark.parametrize(
    ("flags", "library"),
    [("fpu sse2 avx avx2 fma f16c", "avx2"), ("fpu avx f16c", "avx"), ("fpu avx2", "basic"), ("", "basic")],
)
def test_the_library_fits_the_processor(flags: str, library: str) -> None:
    """The wheel does not look for itself, and the wrong one is an illegal instruction."""
    assert instruction_set(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\n") == library
