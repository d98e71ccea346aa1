"""What a warm session saves: time to the first token of a turn behind a history of 1,000 tokens, warm against cold.

    python benchmarks/sessions.py [--rounds 20] [--model builtin:tiny]

Through the service, on both engines, strict and best_effort; warm and cold in turns, on one replica each, so that a
noisy machine is noisy for both. Each round has a history of its own: a first turn reads it, the second one, which is
measured, has it and 40 tokens more; the same prompt is then measured cold. Prints milliseconds (minimum, median,
maximum), the tokens that the engine read, and how many strict answers differ between warm and cold (none may).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
from served import a_service

WORDS = (
    *("once", "upon", "a", "time", "there", "was", "little", "fox", "who", "lived", "in", "the", "wood", "and"),
    *("had", "friend", "they", "played", "all", "day", "until", "mom", "said"),
)
ENGINES = ("llamacpp", "ctransformers")
PREFIX_TOKENS = 1000
NEW_WORDS = 40
ANSWER_TOKENS = 8


@dataclass
class Figures:
    """Milliseconds to the first token, and strict answers that differ."""

    warm_ms: list[float] = field(default_factory=list)
    cold_ms: list[float] = field(default_factory=list)
    differ: int = 0

    def row(self, name: str) -> str:
        def three(values: list[float]) -> str:
            return f"{min(values):.1f} / {statistics.median(values):.1f} / {max(values):.1f}"

        ratio = statistics.median(self.warm_ms) / statistics.median(self.cold_ms)
        return f"| {name} | {three(self.warm_ms)} | {three(self.cold_ms)} | {ratio:.2f} | {self.differ} |"


async def turn(client: httpx.AsyncClient, **body: Any) -> tuple[float, str, bool]:
    """Milliseconds from the submission to the first token, the text, and whether it was warm."""
    began, first, text, is_warm = time.perf_counter(), 0.0, "", False
    admission = (await client.post("/v1/tasks", json={"max_tokens": ANSWER_TOKENS, **body})).raise_for_status().json()
    async with client.stream("GET", f"/v1/tasks/{admission['task_id']}/stream") as stream:
        event = ""
        async for line in stream.aiter_lines():
            if line.startswith("event: "):
                event = line[7:]
            elif line.startswith("data: ") and event == "token":
                first = first or (time.perf_counter() - began) * 1000
                text += msgspec.json.decode(line[6:])["t"]
            elif line.startswith("data: ") and event == "end":
                is_warm = msgspec.json.decode(line[6:])["kv_warmth"]
    return first, text, is_warm


async def one_round(client: httpx.AsyncClient, asked: dict[str, Any], history: str, dice: random.Random) -> Figures:
    """Two turns of a session, and the second one again without it."""
    session_id = str(uuid.UUID(int=dice.getrandbits(128)))
    await turn(client, **asked, prompt=history, session_id=session_id)
    told = {**asked, "prompt": f"{history} {words(dice, NEW_WORDS)}"}
    warm_ms, warm_text, is_warm = await turn(client, **told, session_id=session_id)
    await client.delete(f"/v1/sessions/{session_id}")
    cold_ms, cold_text, is_cold_warm = await turn(client, **told, kv_hint="cold")
    if not is_warm or is_cold_warm:
        raise RuntimeError(f"the warm turn was {'warm' if is_warm else 'cold'}, the cold one {is_cold_warm}")
    return Figures([warm_ms], [cold_ms], int(warm_text != cold_text))


def words(dice: random.Random, count: int) -> str:
    return " ".join(dice.choice(WORDS) for _ in range(count))


async def measure(rounds: int, model: str) -> None:
    pools = [{"id": name, "engine": name, "model": model, "ctx": 2048, "slots": 1} for name in ENGINES]
    found: dict[tuple[str, str], Figures] = {}
    with tempfile.TemporaryDirectory() as folder:
        async with a_service({"pools": pools, "sessions": {"max_turns": 100}}, Path(folder)) as served:
            for engine in ENGINES:  # a first task waits for its model
                await turn(served.client, model_ref=model, engine=engine, prompt="Once", session_id=str(uuid.uuid4()))
            for number in range(rounds + 1):
                for engine in ENGINES:
                    for determinism in ("strict", "best_effort"):
                        dice = random.Random(f"{number} {engine} {determinism}")
                        asked = {"model_ref": model, "engine": engine, "determinism": determinism, "seed": number}
                        one = await one_round(served.client, asked, words(dice, PREFIX_TOKENS - 1), dice)
                        kept = found.setdefault((engine, determinism), Figures())
                        if number:  # the first one warms caches of other kinds
                            kept.warm_ms += one.warm_ms
                            kept.cold_ms += one.cold_ms
                            kept.differ += one.differ
    print(f"{rounds} rounds, {model}, history of about {PREFIX_TOKENS} tokens, {NEW_WORDS} words more\n")
    print("| | warm, ms to the first token (min / median / max) | cold | warm / cold | answers that differ |")
    print("| --- | --- | --- | --- | --- |")
    for (engine, determinism), figures in found.items():
        print(figures.row(f"{engine}, {determinism}"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--model", default="builtin:tiny")
    given = parser.parse_args()
    asyncio.run(measure(given.rounds, given.model))
