"""Trials of grammars on llama.cpp itself, in processes that may be lost."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from llama_orch.core.gbnf import GrammarError, check_grammar
from llama_orch.core.json_schema import json_schema_to_gbnf
from llama_orch.engines import trials
from llama_orch.engines.base import EngineBusy
from llama_orch.engines.trials import GrammarTrials
from tests.core.test_gbnf import JSON, NEED_A_TRIAL
from tests.hostile import GRAMMARS, KEPT

from .support import children, run, until

pytestmark = pytest.mark.spec("HP-ADM-7")

GONE_WITHIN_S = 15.0  # on a machine that has other things to do; two or three seconds where it has not


def refusal(grammar: str) -> str | None:
    return run(GrammarTrials().refusal(grammar))


@pytest.mark.parametrize("name", sorted(NEED_A_TRIAL))
def test_what_only_shows_at_work_is_found_in_time(name: str) -> None:
    """The process is ended by its limits, and nothing of it is left."""
    check_grammar(GRAMMARS[name])
    began = time.monotonic()
    reason = refusal(GRAMMARS[name])
    assert reason is not None
    assert "too much time" in reason
    assert time.monotonic() - began < GONE_WITHIN_S
    assert children(os.getpid()) == []


@pytest.mark.parametrize("name", ["hidden left recursion", "30,000 deep", "doubling", "1,500 optional parts"])
def test_a_trial_alone_would_find_them_too(name: str) -> None:
    """What is refused before a trial has earned it: memory, a crash, no end."""
    with pytest.raises(GrammarError):
        check_grammar(GRAMMARS[name])
    assert refusal(GRAMMARS[name]) is not None


@pytest.mark.parametrize(
    "grammar", [JSON, 'root ::= "yes" | "no"', *(json_schema_to_gbnf(one) for one in KEPT.values())]
)
def test_a_harmless_one_passes(grammar: str) -> None:
    """llama.cpp's own grammar of JSON, and those of the schemas that are kept."""
    assert refusal(grammar) is None


def test_what_llama_cpp_says_of_it_is_told() -> None:
    """Its parser's own words, should the check before have missed something."""
    assert refusal("root ::= x") == "llama.cpp refuses it: Undefined rule identifier 'x'"


def test_a_grammar_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many ask for it, and at the same time."""
    tried: list[str] = []

    async def attempt(grammar: str) -> str | None:
        tried.append(grammar)
        await asyncio.to_thread(int)  # the others have their turns
        return None if grammar == "good" else "bad"

    monkeypatch.setattr(trials, "_attempt", attempt)

    async def main() -> None:
        judge = GrammarTrials()
        found = await asyncio.gather(*(judge.refusal(name) for name in ("good", "other", "good", "other", "good")))
        assert found == [None, "bad", None, "bad", None]
        assert sorted(tried) == ["good", "other"]

    run(main())


def test_a_trial_that_cannot_begin_condemns_no_grammar(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is the machine's fault: EngineBusy, and the next one tries again."""

    async def main() -> None:
        judge = GrammarTrials()
        with monkeypatch.context() as broken:
            broken.setattr(trials, "_MODEL", tmp_path / "gone.gguf")
            with pytest.raises(EngineBusy, match="did not start to try"):
                await judge.refusal(JSON)
        with monkeypatch.context() as broken:
            broken.setattr(trials.sys, "executable", str(tmp_path / "no-python"))
            with pytest.raises(EngineBusy, match="no process could be started"):
                await judge.refusal(JSON)
        assert await judge.refusal(JSON) is None

    run(main())


def test_who_gives_up_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that leaves while its grammar is tried: the process ends with the request."""

    async def main() -> None:
        asking = asyncio.ensure_future(GrammarTrials().refusal(GRAMMARS["300 stars"]))
        await until(lambda: bool(children(os.getpid())))
        asking.cancel()
        await asyncio.wait([asking])
        assert asking.cancelled()
        assert children(os.getpid()) == []

    run(main())
