"""The outbound policy over HTTP: what is asked and answered, and which refusals there are."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llama_orch.contract.models import FetchRequest

from .harness import Answer, Server
from .service_fake import BROKEN_URL, CROWDED_URL, DENIED_URL, ENDING_TASK, UNREADABLE_URL
from .test_bad_input import assert_envelope

pytestmark = pytest.mark.spec("HP-SEC-4")
URL = "https://example.com/a?b"


def check(server: Server, **body: Any) -> Answer:
    return server.call("POST", "/v1/policy/outbound/check", body=json.dumps(body).encode())


def fetch(server: Server, **body: Any) -> Answer:
    return server.call("POST", "/v1/tools/fetch", body=json.dumps(body).encode())


@pytest.mark.parametrize(
    ("url", "allowed", "rule", "read"),
    [(URL, True, "default", URL), (DENIED_URL, False, "deny[0]", DENIED_URL), (UNREADABLE_URL, True, "default", None)],
)
def test_a_check_is_200_whatever_it_says(
    checking_server: Server, url: str, allowed: bool, rule: str, read: str | None
) -> None:
    """The decision is the answer and not an error."""
    answer = check(checking_server, url=url)
    assert answer.http_status == 200
    assert answer.json == {
        "allowed": allowed,
        "rule": rule,
        "reason": "because",
        "url": read,
        "addresses": ["192.0.2.1"],
        "audit_id": ENDING_TASK,
    }


def test_a_fetch_gives_what_the_other_side_said(checking_server: Server) -> None:
    """200 from us, with its status in the body; the bounds have defaults."""
    answer = fetch(checking_server, url=URL)
    assert answer.http_status == 200
    assert answer.json == {
        "status": 404,
        "headers": {"content-type": "text/plain"},
        "text": "n\u00e4h",
        "url": URL,
        "audit_id": ENDING_TASK,
    }
    assert checking_server.service.fetched[-1] == FetchRequest(url=URL, max_bytes=1_048_576, timeout_ms=10_000)


def test_a_fetch_that_fails(checking_server: Server) -> None:
    """403 with the rule, 502 and 503 that may be repeated; each can be found in the log."""
    denied = fetch(checking_server, url=DENIED_URL)
    assert denied.http_status == 403
    error = assert_envelope(denied, "POLICY_DENIED")
    assert (error.policy_label, error.retriable, error.details) == ("deny[0]", False, {"audit_id": ENDING_TASK})
    broken = fetch(checking_server, url=BROKEN_URL)
    assert broken.http_status == 502
    error = assert_envelope(broken, "UPSTREAM_FAILED")
    assert (error.retriable, error.details) == (True, {"audit_id": ENDING_TASK})
    crowded = fetch(checking_server, url=CROWDED_URL)
    assert (crowded.http_status, crowded.headers["X-Backoff-Ms"]) == (503, "1200")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "`url`"),
        ({"url": ""}, "`$.url`"),
        ({"url": "h" * 8193}, "`$.url`"),
        ({"url": 1}, "`$.url`"),
        ({"url": URL, "max_bytes": 0}, "`$.max_bytes`"),
        ({"url": URL, "max_bytes": 8_388_609}, "`$.max_bytes`"),
        ({"url": URL, "timeout_ms": 25_001}, "`$.timeout_ms`"),
        ({"url": URL, "method": "POST"}, "unknown field `method`"),
        ({"url": URL, "headers": {"Authorization": "x"}}, "unknown field `headers`"),
    ],
)
def test_a_wrong_body(server: Server, body: dict[str, Any], says: str) -> None:
    """400: a fetch is a GET without headers of the caller's, within bounds."""
    answer = fetch(server, **body)
    assert answer.http_status == 400
    assert says in assert_envelope(answer, "INVALID_PARAMS").message
