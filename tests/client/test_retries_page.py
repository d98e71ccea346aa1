"""docs/retries.md says what the contract and the client do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llama_orch.client import ATTEMPTS_MAX, WAIT_MAX_S
from llama_orch.client.retry import JITTER, JITTER_MAX_S, backoff_s
from llama_orch.client.wire import ANSWER_TIMEOUT_S
from llama_orch.contract.codes import CODES
from llama_orch.core.prediction import ADVICE_MAX_MS, ADVICE_MIN_MS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "retries.md").read_text(encoding="utf-8")
TEXT = " ".join(PAGE.split())
ROW = re.compile(r"^\| `(\w+)` \| (\d+) \| (yes|no) \| \S", re.MULTILINE)


@pytest.mark.spec("HP-ERR-3", "HP-ERR-4")
def test_the_table_is_the_contracts() -> None:
    """Every code is there once, with the status and the word on repeating that the contract has."""
    rows = ROW.findall(PAGE)
    assert len(rows) == len(CODES)
    assert {code: (int(status), again == "yes") for code, status, again in rows} == {
        code.value: (facts.http_status, facts.is_retryable) for code, facts in CODES.items()
    }


@pytest.mark.spec("HP-ERR-3")
@pytest.mark.parametrize(
    "says",
    [
        f"({ATTEMPTS_MAX} unless you say more)",
        f"seconds of waiting together ({WAIT_MAX_S:g})",
        f"does not answer for {ANSWER_TIMEOUT_S:g} s",
        f"begin with {backoff_s(1):g} s and double it, up to {backoff_s(99):g} s",
        f"at least {ADVICE_MIN_MS} ms and at most five minutes",
        "a quarter of the wait or a second, whichever is less",
    ],
)
def test_the_figures_are_those_of_the_code(says: str) -> None:
    """What the page says in figures is what the constants are."""
    assert says in TEXT
    assert (JITTER, JITTER_MAX_S, ADVICE_MAX_MS) == (0.25, 1.0, 300_000)
