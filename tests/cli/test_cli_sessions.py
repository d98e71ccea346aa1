"""`llama-orch sessions`: read one, end one."""

from __future__ import annotations

import json

import pytest
from conftest import Invoke
from contract_service import SESSION, SESSION_ID, ContractService

pytestmark = pytest.mark.spec("HP-SES-1")


def test_a_session_is_shown(remote: Invoke) -> None:
    """Line by line, or as the service's own JSON."""
    shown = remote("sessions", "get", SESSION_ID)
    assert shown.exit_code == 0
    assert {"turns", "kv_warmth", "12000", "598200"} <= set(shown.stdout.split())
    assert json.loads(remote("sessions", "get", SESSION_ID, "--json").stdout) == SESSION


def test_a_session_is_ended(remote: Invoke, service: ContractService) -> None:
    """A second time as well; to read it afterwards is an error."""
    for _ in range(2):
        assert remote("sessions", "rm", SESSION_ID).exit_code == 0
    assert service.sessions == {}
    assert remote("sessions", "get", SESSION_ID).exit_code == 1
