"""HP-DET-1, checked as HP-DET-3 asks: 64 fixed seeds, on each engine, through the real service.

Alone and again, on another replica of the same build, under best-effort load on the same replica, in warm sessions, and
after a restart: of 64 answers none differs. That such a test can fail is shown twice: by `test_control.py` with the
engine alone, and by the defect `strict_shares_its_replica` (docs/mutants.md).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.determinism.cases import CASES, Answer, answers, best_effort_load, copies, differing, settings, warm_answers
from tests.live.client import ENGINES, open_client
from tests.live_service import LiveService, live_service

pytestmark = [pytest.mark.spec("HP-DET-1", "HP-DET-3"), pytest.mark.xdist_group("determinism")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return copies(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def service(models: list[str]) -> Iterator[LiveService]:
    with live_service(settings(models)) as running:
        yield running


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def first(service: LiveService, engine: str, models: list[str]) -> list[Answer]:
    """Alone on the first replica: what all the others are held against."""
    with open_client(service) as client:
        return answers(client, engine, models[0])


@pytest.mark.spec("HP-ADM-6", "HP-DET-2")
def test_there_are_64_seeds_and_they_matter(first: list[Answer]) -> None:
    """No seed twice, hardly an answer twice, and each `end` has the seed that was asked for."""
    assert len({case["seed"] for case in CASES}) == len(CASES) == 64
    assert [one.end["seed"] for one in first] == [case["seed"] for case in CASES]
    assert len({one.text for one in first}) > 60


def test_the_same_again(service: LiveService, engine: str, models: list[str], first: list[Answer]) -> None:
    """On the replica that has answered them all before."""
    with open_client(service) as client:
        assert differing(first, answers(client, engine, models[0])) == []


def test_the_same_on_another_replica(service: LiveService, engine: str, models: list[str], first: list[Answer]) -> None:
    """Another process of the same build, on another card. `Answer` has the model's digest: it is the same model."""
    with open_client(service) as client:
        assert differing(first, answers(client, engine, models[1])) == []


def test_the_same_under_load(service: LiveService, engine: str, models: list[str], first: list[Answer]) -> None:
    """Best-effort tasks wait and run on the same replica all the time, and they have their turns as well."""
    with open_client(service) as client, best_effort_load(service, engine, models[0]) as done:
        before = len(done)
        beside = answers(client, engine, models[0])
        assert len(done) - before >= len(CASES)  # between two strict tasks somebody else had a turn
    assert differing(first, beside) == []


@pytest.mark.spec("HP-SES-3")
def test_the_same_in_a_warm_session(service: LiveService, engine: str, models: list[str], first: list[Answer]) -> None:
    """As second turns that take over what the first ones left, where their prompts are long enough for that."""
    with open_client(service) as client:
        found, warm = warm_answers(client, engine, models[0])
    assert warm > 10
    assert differing(first, found) == []


def test_the_same_after_a_restart(engine: str, models: list[str], first: list[Answer]) -> None:
    """Another service, other workers."""
    with live_service(settings(models[:1])) as restarted, open_client(restarted) as client:
        assert differing(first, answers(client, engine, models[0])) == []
