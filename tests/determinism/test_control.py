"""The 64 seeds can tell: asked of llama.cpp itself, beside others on one worker, some of them are answered otherwise.

This is what strict tasks are kept from. Should none differ any more, then the suite proves nothing that this does not,
and the lease of whole replicas is more than is needed.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from llama_orch.engines.base import Job, Sampling, Worker
from llama_orch.engines.llamacpp import LlamaCppEngine
from tests.determinism.cases import ANSWER_TOKENS, CASES, SLOTS
from tests.engines.conftest import tiny_model
from tests.engines.support import a_spec, a_worker, collect, run, text_of

__all__ = ["tiny_model"]

pytestmark = pytest.mark.xdist_group("determinism")


def a_case(case: dict[str, Any], slot: int, max_tokens: int) -> Job:
    sampling = Sampling(**case.get("sampling", {}))
    return Job("t", case["prompt"], max_tokens=max_tokens, seed=case["seed"], sampling=sampling, slot=slot)


async def text(worker: Worker, case: dict[str, Any]) -> str:
    """The answer on slot 0, with the prompt evaluated from its first token."""
    return text_of((await collect(worker, a_case(case, 0, ANSWER_TOKENS)))[0])


async def is_any_different(worker: Worker, before: list[str]) -> bool:
    """Whether one of the cases is not answered as before."""
    for case, known in zip(CASES, before, strict=True):
        if await text(worker, case) != known:
            return True
    return False


async def load(worker: Worker, slot: int) -> None:
    """Prompts of all lengths and short answers, without end."""
    while True:
        for case in CASES[slot:]:
            await collect(worker, a_case(case, slot, max_tokens=6))


@pytest.mark.spec("HP-DET-1", "HP-DET-3")
def test_beside_others_answers_differ(tiny_model: Path) -> None:
    """Alone none of 64 differs; with three others at work in the same process one does, and the search ends there (nine
    did on the machine that this was written on). The machine decides who shares a batch: it may look three times."""

    async def main() -> None:
        async with a_worker(LlamaCppEngine(), a_spec(tiny_model, slots=SLOTS["llamacpp"])) as worker:
            alone = [await text(worker, case) for case in CASES]
            assert not await is_any_different(worker, alone)
            others = [asyncio.create_task(load(worker, slot)) for slot in range(1, SLOTS["llamacpp"])]
            try:
                for _ in range(3):
                    if await is_any_different(worker, alone):
                        break
                else:
                    pytest.fail("nothing differs beside others: the tests of determinism would not see it either")
            finally:
                for other in others:
                    other.cancel()
                ends = await asyncio.gather(*others, return_exceptions=True)
            assert all(isinstance(end, asyncio.CancelledError) for end in ends)

    run(main())
