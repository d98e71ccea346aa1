"""Vectors and scores over llama-server's dialect: one text, one request."""

from __future__ import annotations

import asyncio

import msgspec

from llama_orch.engines.base import DecodeStalled, JobRefused, Reading, ReadJob, WorkerLost
from llama_orch.engines.client import LlamaClient


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int


class _Vector(msgspec.Struct, frozen=True):
    embedding: list[float | None]


class _Vectors(msgspec.Struct, frozen=True):
    data: tuple[_Vector]
    usage: _Usage


class _Score(msgspec.Struct, frozen=True):
    relevance_score: float | None


class _Scores(msgspec.Struct, frozen=True):
    results: tuple[_Score]
    usage: _Usage


async def read(client: LlamaClient, job: ReadJob) -> Reading:
    """The vector of a text, or a document's score; `ms` is for the caller to measure."""
    try:
        async with asyncio.timeout(job.idle_timeout_s):
            return await (_vector(client, job.text) if job.query is None else _score(client, job.query, job.text))
    except TimeoutError as error:
        raise DecodeStalled(f"a text was not read within {job.idle_timeout_s:g} s") from error
    except msgspec.DecodeError as error:
        raise WorkerLost("a text to read was answered with nonsense") from error


async def _vector(client: LlamaClient, text: str) -> Reading:
    answer = await client.request("POST", "/v1/embeddings", {"input": text}, limit_s=None)
    vectors = msgspec.json.decode(answer, type=_Vectors)
    # Nine digits say all that a 32-bit number holds, in half the bytes of what JSON has for it as a 64-bit one.
    vector = tuple(float(f"{value:.9g}") for value in _numbers(vectors.data[0].embedding))
    return Reading(vectors.usage.prompt_tokens, 0.0, vector=vector)


async def _score(client: LlamaClient, query: str, document: str) -> Reading:
    answer = await client.request("POST", "/rerank", {"query": query, "documents": [document]}, limit_s=None)
    scores = msgspec.json.decode(answer, type=_Scores)
    return Reading(scores.usage.prompt_tokens, 0.0, score=_numbers([scores.results[0].relevance_score])[0])


def _numbers(values: list[float | None]) -> tuple[float, ...]:
    """Numbers throughout: JSON has null for what is none."""
    numbers = tuple(value for value in values if value is not None)
    if len(numbers) < len(values):
        raise JobRefused("the model makes no numbers of this text")
    return numbers
