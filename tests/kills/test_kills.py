"""The proof of `tox -e kills`, with one kill of each kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kills.run import KINDS, run

pytestmark = pytest.mark.xdist_group("death")


@pytest.mark.spec("HP-CTL-5")
def test_what_was_answered_survives_kill_9_of_the_service(tmp_path: Path) -> None:
    """Artifacts, the catalog's models, their states and verifications, and files from elsewhere."""
    counts = run(len(KINDS), 11, tmp_path)
    assert counts["kills"] == len(KINDS)
    assert counts["artifacts put"] >= 10
    assert counts["models entered"] >= 5
    assert counts["fetches begun"] >= 1
