"""One server per worker for the tests that only ask; its service's records are told apart by task ID."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .harness import Server, serving


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture(scope="session")
def checking_server() -> Iterator[Server]:
    """The same with responses held against the contract."""
    with serving(validate_responses=True) as running:
        yield running
