"""HP-ALN-4: the rehearsal of the reference deployment ends well."""

from __future__ import annotations

import pytest

from tests.smoke.rehearsal import rehearse


@pytest.mark.spec("HP-ALN-4", "HP-PLC-4", "HP-CTL-2", "HP-CTL-3", "HP-CTL-5", "HP-SES-4")
def test_the_reference_deployment() -> None:
    """Two declared cards, both engines: catalog, drain, reload, retire, artifacts, policy, budgets, cancel, kill -9."""
    chapters = [line for line in rehearse() if line.startswith("## ")]
    assert len(chapters) == 11
