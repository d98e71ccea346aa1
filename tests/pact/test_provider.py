"""Every pact in pacts/ is kept by the real service: ours, and those that other consumers put there (docs/pacts.md)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pact.exchange import TOKEN
from tests.pact.stage import Stage, a_stage
from tests.pact.verification import UnknownState, check_states, interactions_of, verify

pytestmark = pytest.mark.spec("HP-ALN-2")

PACTS = sorted((Path(__file__).resolve().parents[2] / "pacts").glob("*.json"))
CASES = [(pact, number, one["description"]) for pact in PACTS for number, one in enumerate(interactions_of(pact))]


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with a_stage() as stage:
        yield stage


@pytest.fixture(scope="module")
def problems_of(stage: Stage) -> Callable[[Path], list[str]]:
    """Of a pact's interactions, by number; the first who asks has the whole file verified."""
    found: dict[Path, list[str]] = {}

    def look_up(pact: Path) -> list[str]:
        if pact not in found:
            found[pact] = verify(pact, stage)
        return found[pact]

    return look_up


@pytest.mark.parametrize("pact", PACTS, ids=lambda pact: pact.stem)
def test_every_state_can_be_set_up(pact: Path) -> None:
    """Each provider state that the file names has a handler."""
    check_states(pact)


@pytest.mark.parametrize(("pact", "number"), [case[:2] for case in CASES], ids=[f"{c[0].stem}: {c[2]}" for c in CASES])
def test_the_service_keeps_its_word(problems_of: Callable[[Path], list[str]], pact: Path, number: int) -> None:
    """The interaction's request gets the answer that the consumer relies on."""
    if problem := problems_of(pact)[number]:
        pytest.fail(problem, pytrace=False)


# -- pacts of others -------------------------------------------------------------------------------------------------

TASK_ID = "c2a7e0d4-95b8-4f31-8c6e-7d10b3f9a526"


def a_pact(folder: Path, state: str, answer: dict[str, Any], **parameters: object) -> Path:
    """A file that another tool may have written, in an older version of the format: one reads a task."""
    request = {"method": "GET", "path": f"/v1/tasks/{TASK_ID}", "headers": {"Authorization": f"Bearer {TOKEN}"}}
    interaction = {
        "description": "a task is read",
        "providerStates": [{"name": state, "params": parameters}],
        "request": request,
        "response": answer,
    }
    parties = {"consumer": {"name": "someone-else"}, "provider": {"name": "llama-orch"}}
    pact = folder / "someone-else--llama-orch.json"
    pact.write_text(
        json.dumps(parties | {"interactions": [interaction], "metadata": {"pactSpecification": {"version": "3.0.0"}}})
    )
    return pact


def test_a_pact_of_another_consumer_is_verified(stage: Stage, tmp_path: Path) -> None:
    """A state's parameters are fields of the task; an answer may hold more than the consumer asks for."""
    answer = {"status": 200, "body": {"task_id": TASK_ID, "state": "succeeded", "seed": 11, "tokens_out": 3}}
    pact = a_pact(tmp_path, "a task has succeeded", answer, task_id=TASK_ID, seed=11, max_tokens=3)
    assert verify(pact, stage) == [""]


def test_a_wrong_expectation_fails_in_words(stage: Stage, tmp_path: Path) -> None:
    """The failure says where, what was expected and what came."""
    answer = {"status": 201, "headers": {"X-Made-Up": "yes"}, "body": {"state": "done"}}
    (problem,) = verify(a_pact(tmp_path, "a task has succeeded", answer, task_id=TASK_ID), stage)
    assert "StatusMismatch: expected 201 but was 200" in problem
    assert "HeaderMismatch X-Made-Up: Expected a header 'X-Made-Up' but was missing" in problem
    assert "BodyMismatch $.state: Expected 'succeeded' (String) to be equal to 'done' (String)" in problem


def test_an_unknown_state_fails_at_once(stage: Stage, tmp_path: Path) -> None:
    """Nothing is sent, and the failure says where the known ones are."""
    pact = a_pact(tmp_path, "the moon is full", {"status": 200})
    with pytest.raises(UnknownState, match=r"names \['the moon is full'\]; docs/pacts\.md"):
        verify(pact, stage)


def test_a_state_that_fails_is_its_interactions_failure(stage: Stage, tmp_path: Path) -> None:
    """It is not tried again; the failure has the reason, here the service's own refusal."""
    pact = a_pact(tmp_path, "a task has succeeded", {"status": 404}, task_id=TASK_ID, max_tokens=0)
    (problem,) = verify(pact, stage)
    assert problem.startswith("setup of the state 'a task has succeeded' failed: the task was refused")
    assert "max_tokens" in problem


def test_every_interaction_begins_with_a_fresh_service(stage: Stage, tmp_path: Path) -> None:
    """What one interaction left behind is unknown to the next."""
    pact = a_pact(tmp_path, "a task has succeeded", {"status": 200}, task_id=TASK_ID)
    content = json.loads(pact.read_text())
    (first,) = content["interactions"]
    second = first | {"providerStates": [{"name": "an idle pool"}], "response": {"status": 404}}
    pact.write_text(json.dumps(content | {"interactions": [first, second]}))
    assert verify(pact, stage) == ["", ""]
