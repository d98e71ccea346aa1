"""Runs on a sound server: what is sent, what comes back, and what is counted."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from llama_orch.engines.base import Chunk, EngineBusy, JobRefused, ReadJob
from llama_orch.engines.remote.dialect import estimated_tokens
from tests.engines.remote.support import attached
from tests.engines.remote.upstream import (
    DONE,
    MODEL,
    Answer,
    data,
    delta,
    fails,
    models,
    says,
    streams,
    tells,
    usage,
    usual,
)
from tests.engines.support import a_job, collect, run, text_of

MESSAGES = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"})
SCHEMA = {"type": "boolean"}


@pytest.mark.spec("HP-REM-6")
def test_what_a_stranger_is_asked() -> None:
    """Only what the API has: no top_k, min_p or repeat penalty; messages as messages."""

    async def main() -> None:
        async with attached() as (worker, upstream):
            await collect(worker, a_job(prompt="Once", max_tokens=5, seed=7, stop=("x",), temperature=0.5, top_p=0.9))
            await collect(worker, a_job(prompt="flat", messages=MESSAGES, max_tokens=5, seed=2**63 - 1))
            (plain,), (chat,) = upstream.asked("/v1/completions"), upstream.asked("/v1/chat/completions")
            assert plain.body == {
                "model": MODEL,
                "max_tokens": 5,
                "temperature": 0.5,
                "top_p": 0.9,
                "seed": 7,
                "stop": ["x"],
                "stream": True,
                "stream_options": {"include_usage": True},
                "prompt": "Once",
            }
            assert chat.body["messages"] == list(MESSAGES)
            assert "prompt" not in chat.body
            assert 0 <= chat.body["seed"] < 2**32 - 1
            assert "authorization" not in plain.headers

    run(main())


@pytest.mark.spec("HP-REM-6")
@pytest.mark.parametrize(
    ("owner", "extras"),
    [
        ("llamacpp", {"top_k": 0, "min_p": 0.1, "repeat_penalty": 1.2, "grammar": "root ::= x"}),
        ("vllm", {"top_k": -1, "min_p": 0.1, "repetition_penalty": 1.2, "response_format": None}),
        ("somebody", {"response_format": None}),
    ],
)
def test_what_is_known_of_a_server_is_used(owner: str, extras: dict[str, Any]) -> None:
    """Sampler settings, and a schema as the schema that it is, or as the grammar that was made of it."""

    async def main() -> None:
        async with attached(usual(models=models(owner)), json_schema=True) as (worker, upstream):
            asked = {"top_k": 0, "min_p": 0.1, "repeat_penalty": 1.2, "json_schema": SCHEMA, "grammar": "root ::= x"}
            await collect(worker, a_job(**asked))
            body = upstream.asked("/v1/completions")[0].body
            names = ("top_k", "min_p", "repeat_penalty", "repetition_penalty", "grammar", "response_format")
            found = {name: body[name] for name in names if name in body}
            if "response_format" in extras:
                told = {"name": "answer", "schema": SCHEMA, "strict": True}
                extras["response_format"] = {"type": "json_schema", "json_schema": told}
            assert found == extras

    run(main())


@pytest.mark.spec("HP-REM-6")
def test_figures_are_the_servers() -> None:
    """Two tokens in one event count as two, once the server has told; what was taken over is told as well."""
    answer = streams(delta("one two"), delta(" three"), delta("", "length"), usage(11, 3, cached=4), DONE)

    async def main() -> None:
        async with attached(usual(completions=answer)) as (worker, _):
            chunks, done = await collect(worker, a_job())
            assert text_of(chunks) == "one two three"
            assert sum(chunk.tokens for chunk in chunks) == 3
            assert (done.tokens_in, done.tokens_out, done.tokens_cached) == (11, 3, 4)
            assert done.finish_reason == "length"

    run(main())


ENDS: dict[str, tuple[bytes, str, str]] = {
    "no usage": (streams(delta("a"), delta("b", "stop"), DONE), "ab", "stop"),
    "no farewell": (streams(delta("a", "length"), usage(1, 1)), "a", "length"),
    "no reason": (streams(delta("a"), DONE), "a", "stop"),
    "another reason": (streams(delta("a", "content_filter"), DONE), "a", "stop"),
    "comments and blank lines": (streams(b": hi\n\n", delta("a"), b"\n\n\n", b"event: x\n", DONE), "a", "stop"),
    "line ends of another kind": (streams(delta("a").replace(b"\n", b"\r\n"), DONE), "a", "stop"),
    "no blank after the colon": (streams(delta("a").replace(b"data: ", b"data:"), DONE), "a", "stop"),
    "a usage of nonsense": (streams(delta("a", "stop"), usage(-1, 2**60), DONE), "a", "stop"),
    "thoughts": (
        streams(data({"choices": [{"delta": {"reasoning_content": "hm"}}]}), delta("a", "stop"), DONE),
        "a",
        "stop",
    ),
    "a chunk of a completion": (
        streams(data({"choices": [{"text": "a", "index": 0, "finish_reason": None, "logprobs": None}]}), DONE),
        "a",
        "stop",
    ),
    "nothing": (streams(delta("", "stop"), DONE), "", "stop"),
}


@pytest.mark.spec("HP-REM-7")
@pytest.mark.parametrize(("answer", "text", "reason"), ENDS.values(), ids=ENDS)
def test_an_answer_in_the_words_of_others(answer: bytes, text: str, reason: str) -> None:
    async def main() -> None:
        async with attached(usual(completions=answer)) as (worker, _):
            chunks, done = await collect(worker, a_job(prompt="abcdef"))
            assert (text_of(chunks), done.finish_reason) == (text, reason)
            assert done.tokens_in in (1, estimated_tokens("abcdef"))
            assert done.tokens_out == sum(chunk.tokens for chunk in chunks)

    run(main())


def test_a_cancel_closes_the_connection() -> None:
    """Also before the first token, and while the server is silent."""
    ended = list[str]()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: Any) -> None:
        writer.write(streams(delta("a")) if heard.body["max_tokens"] == 1 else b"")
        await writer.drain()
        await reader.read(1)
        ended.append("closed")

    async def main() -> None:
        async with attached(usual(completions=silent)) as (worker, upstream):
            async with aclosing(worker.generate(a_job(max_tokens=1))) as items:
                assert await anext(items) == Chunk("a", 1)
            waiting = asyncio.ensure_future(collect(worker, a_job(max_tokens=2)))
            while len(upstream.asked("/v1/completions")) < 2:
                await asyncio.wait([waiting], timeout=0.01)
            waiting.cancel()
            await asyncio.wait([waiting])
            while len(ended) < 2:
                await asyncio.wait([asyncio.ensure_future(asyncio.Event().wait())], timeout=0.01)

    run(main())


@pytest.mark.spec("HP-REM-6")
@pytest.mark.parametrize(
    ("owner", "answer", "count"),
    [
        ("llamacpp", says({"tokens": [1, 2, 3]}), 3),
        ("vllm", says({"count": 5, "max_model_len": 100, "tokens": [1, 2, 3, 4, 5]}), 5),
        ("vllm", fails(404), estimated_tokens("héllo")),
        ("vllm", says({"count": -1}), estimated_tokens("héllo")),
        ("llamacpp", says(b"nonsense"), estimated_tokens("héllo")),
        ("llamacpp", b"", estimated_tokens("héllo")),
        ("somebody", says({"tokens": [1]}), 11),
    ],
)
def test_who_counts(owner: str, answer: bytes, count: int) -> None:
    """The server where it can; else, and whenever it does not, two bytes are a token."""

    async def main() -> None:
        async with attached({**usual(models=models(owner)), "/tokenize": [answer]}) as (worker, upstream):
            assert await worker.count_tokens("héllo") == count
            assert bool(upstream.asked("/tokenize")) is (owner != "somebody")

    run(main())


def test_a_conversation_for_counting() -> None:
    """By llama-server's own template; others' is guessed at."""

    async def main() -> None:
        answers = {**usual(models=models("llamacpp")), "/apply-template": [says({"prompt": "PROMPT"}), fails(500)]}
        async with attached(answers) as (worker, upstream):
            messages = [dict(one) for one in MESSAGES]
            assert await worker.render_chat(messages) == "PROMPT"
            assert upstream.asked("/apply-template")[0].body == {"messages": messages}
            assert "Be brief." in await worker.render_chat(messages)

    run(main())


def vectors(*lists: list[float], tokens: int | None = 4) -> bytes:
    told = {} if tokens is None else {"usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
    return says({"data": [{"embedding": one, "index": n} for n, one in enumerate(lists)], **told})


@pytest.mark.spec("HP-REM-1")
def test_a_text_is_embedded() -> None:
    """The vector has length 1, whatever the server's has."""

    async def main() -> None:
        answers = usual(embeddings=[vectors([3.0, 4.0]), vectors([0, 2], tokens=None)])
        async with attached(answers, workload="embedding") as (worker, upstream):
            first = await worker.read(ReadJob("text", 0))
            assert first.vector == pytest.approx((0.6, 0.8))
            assert first.tokens_in == 4
            assert (await worker.read(ReadJob("text", 0))).tokens_in == estimated_tokens("text")
            asked = upstream.asked("/v1/embeddings")[0].body
            assert asked == {"model": MODEL, "input": "text", "encoding_format": "float"}
            with pytest.raises(JobRefused, match="does not rank"):
                await worker.read(ReadJob("text", 0, query="q"))

    run(main())


@pytest.mark.spec("HP-REM-4", "HP-REM-7")
@pytest.mark.parametrize(
    "bad",
    [vectors(), vectors([1.0], [1.0]), vectors([]), vectors([0.0]), vectors([1.7e308, 1.7e308]), says({"data": 3})],
    ids=["none", "two", "empty", "zero", "endless", "nonsense"],
)
def test_a_vector_that_is_none_is_asked_for_again(bad: bytes) -> None:
    async def main() -> None:
        async with attached(usual(embeddings=[bad, vectors([1.0])]), workload="embedding") as (worker, _):
            assert (await worker.read(ReadJob("text", 0))).vector == (1.0,)

    run(main())


# -- backpressure ------------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-REM-5")
@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_waited_for(status: int) -> None:
    answers = usual(completions=[fails(status, "full", "Retry-After: 0.05"), tells("a")])

    async def main() -> None:
        async with attached(answers) as (worker, upstream):
            loop = asyncio.get_running_loop()
            began = loop.time()
            chunks, _ = await collect(worker, a_job())
            assert text_of(chunks) == "a"
            assert loop.time() - began >= 0.05
            assert len(upstream.asked("/v1/completions")) == 2

    run(main())


@pytest.mark.spec("HP-REM-5")
def test_a_server_that_stays_busy() -> None:
    """The task ends in time, with what the server says; and the next one is served once it is well."""
    answers = usual(
        completions=[*[fails(429, "quota", "Retry-After: 0.02")] * 3, fails(429, "quota", "Retry-After: 9")]
    )

    async def main() -> None:
        async with attached(answers, busy_timeout_ms=200) as (worker, upstream):
            with pytest.raises(EngineBusy, match="answers 429: quota"):
                await collect(worker, a_job())
            assert len(upstream.asked("/v1/completions")) == 4

    run(main())


@pytest.mark.spec("HP-REM-5")
def test_no_more_at_a_time_than_the_server_takes() -> None:
    """Of eight at once it takes two; all are served, and after the first refusals seldom more than that are tried."""

    async def two_at_a_time(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: Any) -> None:
        is_full = upstreams[0].active[heard.path] > 2
        if not is_full:
            await asyncio.wait([asyncio.ensure_future(asyncio.Event().wait())], timeout=0.05)
        writer.write(fails(429, "full", "Retry-After: 0.01") if is_full else tells("a"))
        await writer.drain()

    upstreams: list[Any] = []

    async def main() -> None:
        listed: list[Answer] = [two_at_a_time]
        async with attached(usual(completions=listed)) as (worker, upstream):
            upstreams.append(upstream)
            runs = await asyncio.gather(*(collect(worker, a_job()) for _ in range(8)))
            assert [text_of(chunks) for chunks, _ in runs] == ["a"] * 8
            assert len(upstream.asked("/v1/completions")) <= 24

    run(main())
