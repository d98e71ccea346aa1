"""The 64 fixed seeds, each with a prompt of its own, and how they are answered by a service.

cases.json holds them: seeds at the borders of 31, 32, 53 and 63 bits and others; prompts of 3 to 250 tokens, so that
half are evaluated in several batches, where what else is in a batch shows first; half of them with a hot sampler, which
a last bit is enough to turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import httpx

from tests.live.client import open_client, stream, submit, until
from tests.live.models import TINY, ref, simulated
from tests.live_service import LiveService
from tests.runtime.frames import Seen, text

GIB = 1 << 30
ANSWER_TOKENS = 20
LOAD_CLIENTS = 2
SLOTS = {"llamacpp": 4, "ctransformers": 1}
CASES: list[dict[str, Any]] = json.loads(Path(__file__).with_name("cases.json").read_text("utf-8"))


def copies(folder: Path) -> list[str]:
    """Two files with the bytes of one model: a task that names one of them runs on the replica that has loaded it."""
    paths = [folder / "one.gguf", folder / "other.gguf"]
    for path in paths:
        path.write_bytes(TINY)
    return [ref(path) for path in paths]


def settings(models: Sequence[str]) -> dict[str, Any]:
    """A replica of each engine for each of the files: processes of one build with one model, each on a card of its own.
    llama.cpp has four slots, ctransformers the one that it can have."""
    cards = [f"card-{number}" for number, _ in enumerate(models)]
    return {
        "devices": simulated(**dict.fromkeys(cards, 12 * GIB)),
        "pools": [
            {"id": f"{engine}-{card}", "engine": engine, "model": model, "devices": [card], "ctx": 512, "slots": slots}
            for engine, slots in SLOTS.items()
            for card, model in zip(cards, models, strict=True)
        ],
        "logs": {"level": "warning"},
        "sessions": {"max_turns": 1_000_000},
    }


class Answer(NamedTuple):
    """What has to be the same."""

    text: str
    end: dict[str, object]


# Of `end`: all but the times and what the KV cache did.
PINNED = (
    "seed", "model_digest", "engine", "engine_version", "sampler_profile_version", "tokens_in", "tokens_out",
    "finish_reason",
)  # fmt: skip


def answers(client: httpx.Client, engine: str, model: str) -> list[Answer]:
    """Of all cases as strict tasks, one after the other."""
    until(lambda: all(pool["ready"] for pool in client.get("/v1/pools").json()["items"]))
    return [_answer(client, engine=engine, model_ref=model, max_tokens=ANSWER_TOKENS, **case) for case in CASES]


def warm_answers(client: httpx.Client, engine: str, model: str) -> tuple[list[Answer], int]:
    """The same as second turns of sessions whose first turn had the same prompt; and how many of them were warm."""
    found, warm = [], 0
    for number, case in enumerate(CASES):
        asked = {
            "engine": engine,
            "model_ref": model,
            "session_id": f"{number:08x}-0000-4000-8000-00000000aaaa",
            **case,
        }
        _frames(client, **asked, max_tokens=1)
        frames = _frames(client, **asked, max_tokens=ANSWER_TOKENS)
        found.append(_answer_of(frames))
        warm += bool(frames[-1].data["kv_warmth"])
    return found, warm


def _answer(client: httpx.Client, **body: Any) -> Answer:
    return _answer_of(_frames(client, **body))


def _frames(client: httpx.Client, **body: Any) -> list[Seen]:
    frames = stream(client, submit(client, **body)["task_id"])
    assert frames[-1].event == "end", frames[-1].data
    return frames


def _answer_of(frames: list[Seen]) -> Answer:
    return Answer(text(frames), {name: frames[-1].data[name] for name in PINNED})


def differing(these: Sequence[Answer], those: Sequence[Answer]) -> list[int]:
    """The seeds that were not answered twice the same."""
    return [case["seed"] for case, this, that in zip(CASES, these, those, strict=True) if this != that]


@contextmanager
def best_effort_load(service: LiveService, engine: str, model: str) -> Iterator[list[int]]:
    """Clients that never pause, with the cases' own prompts and in sessions, so that slots hold the KV of what is about
    to be asked. The result grows by the tokens of each of their tasks."""
    is_over, done = Event(), list[int]()

    def one(number: int) -> None:
        session = {"session_id": f"{number:08x}-0000-4000-8000-000000000000", "determinism": "best_effort"}
        with open_client(service) as client:
            turn = number
            while not is_over.is_set():
                turn += LOAD_CLIENTS
                prompt = CASES[turn % len(CASES)]["prompt"]
                body = {"engine": engine, "model_ref": model, "prompt": prompt, "max_tokens": 6, "seed": turn}
                done.append(int(str(_answer(client, **body, **session).end["tokens_out"])))

    with ThreadPoolExecutor(LOAD_CLIENTS) as threads:
        clients = [threads.submit(one, number) for number in range(LOAD_CLIENTS)]
        try:
            until(lambda: len(done) >= LOAD_CLIENTS or any(client.done() for client in clients))
            yield done
        finally:
            is_over.set()
        for client in clients:
            client.result()
