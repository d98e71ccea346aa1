"""Artifacts over HTTP: statuses, filters, and the disk's troubles."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from llama_orch.contract.models import ArtifactKind

from .artifacts_fake import FULL_DISK
from .harness import Answer, Server, serving
from .test_bad_input import assert_envelope

PATH = "/v1/artifacts"


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(validate_responses=True) as running:
        yield running


def put(server: Server, content: dict[str, Any], **fields: Any) -> Answer:
    body = {"kind": "plan", "content": content, **fields}
    return server.call("POST", PATH, body=json.dumps(body).encode())


@pytest.mark.spec("HP-ART-1")
def test_created_is_201_and_there_already_is_200(server: Server) -> None:
    first, again = put(server, {"a": 1}), put(server, {"a": 1}, kind="diff")
    assert (first.http_status, again.http_status) == (201, 200)
    assert first.json == again.json


@pytest.mark.spec("HP-ART-1")
def test_an_artifact_is_read_and_deleted(server: Server) -> None:
    ref = put(server, {"a": 1}, tags=["x"], metadata={"by": "me"}).json
    whole = server.call("GET", f"{PATH}/{ref['id']}")
    assert whole.http_status == 200
    assert whole.json == ref | {"content": {"a": 1}, "metadata": {"by": "me"}}
    assert server.call("DELETE", f"{PATH}/{ref['id'].upper()}").http_status == 204  # hexadecimal in either case
    for method in ("GET", "DELETE"):
        answer = server.call(method, f"{PATH}/{ref['id']}")
        assert answer.http_status == 404
        assert_envelope(answer, "NOT_FOUND")


@pytest.mark.spec("HP-ART-1")
def test_an_unknown_parent_is_404(server: Server) -> None:
    answer = put(server, {"a": 1}, parent="ab" * 32)
    assert answer.http_status == 404
    assert_envelope(answer, "NOT_FOUND")


@pytest.mark.spec("HP-ART-1")
def test_filters_reach_the_store_with_their_types(server: Server) -> None:
    server.call("GET", PATH)
    server.call("GET", f"{PATH}?kind=trace&tag=a%20b&parent=x&limit=3&cursor=7")
    assert server.service.asked == [
        {"kind": None, "tag": None, "parent": None, "limit": 50, "cursor": None},
        {"kind": ArtifactKind.TRACE, "tag": "a b", "parent": "x", "limit": 3, "cursor": "7"},
    ]


@pytest.mark.spec("HP-CTL-5")
def test_a_full_disk_is_507_and_the_service_goes_on(server: Server) -> None:
    answer = put(server, {"a": 1}, tags=[FULL_DISK])
    assert answer.http_status == 507
    assert assert_envelope(answer, "STORAGE_UNAVAILABLE").retriable
    assert put(server, {"a": 2}).http_status == 201


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"kind": "plans"}, "must be one of plan, summary, diff, trace, other"),
        ({"content": [1]}, "Expected `object`, got `array` - at `$.content`"),
        ({"tags": [""]}, "`$.tags[0]`"),
        ({"tags": ["x" * 129]}, "`$.tags[0]`"),
        ({"tag": ["x"]}, "did you mean `tags`?"),
        ({"metadata": None}, "`$.metadata`"),
        ({"parent": ""}, "`$.parent`"),
    ],
)
def test_what_the_contract_does_not_allow_is_400(server: Server, fields: dict[str, Any], says: str) -> None:
    answer = put(server, **({"content": {}} | fields))
    assert answer.http_status == 400
    assert says in assert_envelope(answer, "INVALID_PARAMS").message
