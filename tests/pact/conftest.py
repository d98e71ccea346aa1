"""Consumer tests write pacts into a folder of this run; what is committed changes by `tools/pacts.py --write` alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["PACT_DO_NOT_TRACK"] = "true"  # before pact is imported

from tests.pact.exchange import Exchange


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pacts-to", type=Path, help="the folder that consumer tests write their pacts to")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One process for all of them, under xdist too: tests/pact/test_drift.py compares what the consumer tests wrote."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.xdist_group("pact"))


@pytest.fixture(scope="session")
def pacts_written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the pacts that the consumer tests of this run wrote."""
    folder: Path | None = request.config.getoption("--pacts-to", None)
    return folder or tmp_path_factory.mktemp("pacts")


@pytest.fixture
def exchange(request: pytest.FixtureRequest, pacts_written: Path) -> Iterator[Exchange]:
    """The test's one interaction, described by the test's name."""
    exchange = Exchange(description_of(request.function.__name__))
    yield exchange
    exchange.write(pacts_written)


def description_of(test_name: str) -> str:
    return test_name.removeprefix("test_").replace("_", " ")
