"""What is committed is what the sources say: our pacts, and the states in docs/pacts.md."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from llama_orch.contract.operations import OPERATIONS
from tests.pact import test_consumer, test_openai_consumer
from tests.pact.conftest import description_of
from tests.pact.exchange import CONSUMER, PROVIDER, TOKEN
from tests.pact.states import described

pytestmark = pytest.mark.spec("HP-ALN-2")

ROOT = Path(__file__).resolve().parents[2]
RENEW = "renew it with `python tools/pacts.py --write`"
CONSUMERS = {CONSUMER: test_consumer, test_openai_consumer.CONSUMER: test_openai_consumer}
PACTS = {name: ROOT / "pacts" / f"{name}--{PROVIDER}.json" for name in CONSUMERS}


def interactions(pact: Path) -> dict[str, str]:
    assert pact.exists(), RENEW
    found = json.loads(pact.read_text())["interactions"]
    return {one["description"]: json.dumps(one, indent=1, ensure_ascii=False) for one in found}


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_the_committed_pact_is_what_the_consumer_tests_write(pacts_written: Path, consumer: str) -> None:
    """The same bytes where all of them have run; the interactions of those that have, otherwise."""
    committed = interactions(PACTS[consumer])
    descriptions = {description_of(name) for name in vars(CONSUMERS[consumer]) if name.startswith("test_")}
    assert committed.keys() == descriptions, RENEW
    written = pacts_written / f"{consumer}-{PROVIDER}.json"
    if not written.exists():
        return
    now = interactions(written)
    for description, interaction in now.items():
        assert committed[description] == interaction, RENEW
    if now.keys() == descriptions:
        assert PACTS[consumer].read_bytes() == written.read_bytes() + b"\n", RENEW


def test_every_operation_has_an_interaction() -> None:
    """A pact that leaves out an operation says nothing of it."""
    found = [one["request"] for pact in PACTS.values() for one in json.loads(pact.read_text())["interactions"]]
    asked = [(request["method"], request["path"]) for request in found]
    for operation in OPERATIONS.values():
        path = re.compile(re.sub(r"\{\w+\}", "[^/]+", operation.path))
        assert any(method == operation.method and path.fullmatch(where) for method, where in asked), operation


def test_the_page_lists_the_states() -> None:
    """docs/pacts.md has the table that `python tools/pacts.py --write` would write now, and the token."""
    tool = load(ROOT / "tools" / "pacts.py")
    page = tool.PAGE.read_text()
    assert page == tool.page(page), RENEW
    assert TOKEN in page
    assert all(one.meaning for one in described())


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("llorch_pacts", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
