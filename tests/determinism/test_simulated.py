"""The same for the simulated engine, on the real core and runtime in virtual time: alone, again, on two cards at once,
among best-effort tasks, and after a restart."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from llama_orch.contract.config import PoolSettings, QueueSettings
from llama_orch.contract.models import TaskRequest
from llama_orch.testing.cards import parse_cards
from llama_orch.testing.imaginary import ImaginaryLibrary, a_model
from llama_orch.testing.loop import run
from llama_orch.testing.machine import Machine
from llama_orch.testing.rehearsal import read_all
from llama_orch.testing.stage import Stage, on_stage, settings_of
from tests.determinism.cases import CASES, PINNED, Answer
from tests.runtime.frames import parse, text

MODEL = a_model("8b")
POOL = PoolSettings(id="p", model=MODEL.reference, slots=2, ctx=2048, queue=QueueSettings(capacity=1000))


@asynccontextmanager
async def a_stage() -> Any:
    """The service on two cards, once both replicas are ready."""
    machine = Machine(parse_cards("3090,3060"), ImaginaryLibrary([MODEL]))
    async with on_stage(settings_of([POOL]), machine) as stage:
        await asyncio.sleep(10.0)
        yield stage


async def ask(stage: Stage, case: dict[str, Any], determinism: str = "strict") -> tuple[Answer, str | None]:
    """The answer, and where it was made."""
    body = {**case, "model_ref": MODEL.reference, "max_tokens": 16, "determinism": determinism}
    admission = await stage.service.submit(msgspec.convert(body, TaskRequest))
    frames = parse(await read_all(stage.service.open_stream(admission.task_id, -1)))
    assert frames[-1].event == "end", frames[-1].data
    answer = Answer(text(frames), {name: frames[-1].data[name] for name in PINNED})
    return answer, stage.service.get_task(admission.task_id).replica_id


@pytest.mark.spec("HP-DET-1", "HP-DET-3")
def test_64_seeds_whatever_else_there_is() -> None:
    """Of 64 answers none differs, in four ways of asking for them; both cards have answered some in each crowd."""

    async def main() -> None:
        async with a_stage() as stage:
            first = [(await ask(stage, case))[0] for case in CASES]
            again = [(await ask(stage, case))[0] for case in CASES]
            together = await asyncio.gather(*(ask(stage, case) for case in CASES))
            crowd = [(case, how) for case in CASES for how in ("strict", "best_effort")]
            mixed = (await asyncio.gather(*(ask(stage, case, how) for case, how in crowd)))[::2]
        async with a_stage() as stage:
            restarted = [(await ask(stage, case))[0] for case in CASES]
        assert len({answer.text for answer in first}) > 60
        assert {replica_id for _, replica_id in together} == {replica_id for _, replica_id in mixed} == {"p-0", "p-1"}
        for others in (again, restarted, [answer for answer, _ in together], [answer for answer, _ in mixed]):
            assert others == first

    run(main())
