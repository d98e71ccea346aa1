"""The published documents are the contract's own, and the page that shows them is ours alone."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from openapi_spec_validator import validate

from llama_orch.api.documents import ASSETS, merged_document
from llama_orch.contract.operations import API_VERSION, OPERATIONS

from .harness import Server
from .test_bad_input import assert_envelope

ROOT = Path(__file__).resolve().parents[2]


def fetch(server: Server, target: str) -> bytes:
    answer = server.call("GET", target, [("Authorization", b"")])
    assert answer.http_status == 200
    assert answer.correlation_id
    return answer.body


@pytest.mark.spec("HP-DIS-2")
@pytest.mark.parametrize("name", ["data", "control", "openai"])
def test_a_document_is_valid_and_versioned(server: Server, name: str) -> None:
    """Each is a valid OpenAPI document, readable without a token, with the API's version."""
    document = json.loads(fetch(server, f"/openapi/{name}.json"))
    validate(document)
    assert document["info"]["version"] == API_VERSION
    assert document["components"]["securitySchemes"]["bearerAuth"]["scheme"] == "bearer"


@pytest.mark.spec("HP-ALN-3")
@pytest.mark.parametrize("name", ["data.json", "control.json", "openai.json", "config.schema.json"])
def test_a_document_is_what_openapi_says(server: Server, name: str) -> None:
    """The bytes served are what the generator makes of openapi/ now."""
    sys.path.insert(0, str(ROOT / "codegen"))
    from generate import outputs

    assert fetch(server, f"/openapi/{name}").decode() == outputs()[f"documents/{name}"]


@pytest.mark.spec("HP-SEC-3")
def test_the_merged_document_secures_what_the_documents_secure() -> None:
    """Every operation is in the document that Connexion gets, with its method, path and security."""
    merged = merged_document(metrics_are_open=False)
    for operation in OPERATIONS.values():
        found = merged["paths"][operation.path][operation.method.lower()]
        assert found["operationId"] == operation.operation_id
        assert found.get("security", merged["security"]) == ([] if operation.is_open else [{"bearerAuth": []}])
    validate(merged)


@pytest.mark.spec("HP-SEC-8")
def test_the_page_runs_no_inline_script(server: Server) -> None:
    """The page, its script and Swagger UI's files come from here, under a policy that allows nothing else."""
    answer = server.call("GET", "/ui/", [("Authorization", b"")])
    policy = answer.headers["Content-Security-Policy"]
    assert "script-src 'self';" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert re.findall(r"<script(?![^>]*\bsrc=)", answer.body.decode()) == []
    assert b"persistAuthorization: false" in fetch(server, "/ui/init.js")
    for name in ASSETS:
        assert fetch(server, f"/ui/{name}")


@pytest.mark.spec("HP-SEC-2", "HP-SEC-8")
def test_the_redirect_is_relative(server: Server) -> None:
    """/ui leads to /ui/ without a word of the client's Host header, and carries the correlation ID."""
    answer = server.call("GET", "/ui", [("X-Correlation-Id", b"redirect")])
    assert (answer.http_status, answer.headers["Location"], answer.correlation_id) == (307, "ui/", "redirect")


@pytest.mark.parametrize("target", ["/openapi/data.json", "/ui/", "/ui"])
def test_documents_are_read_only(server: Server, target: str) -> None:
    """Another method than GET and HEAD is 405; HEAD has no body."""
    answer = server.call("POST", target)
    assert (answer.http_status, answer.headers["Allow"]) == (405, "GET, HEAD")
    assert_envelope(answer, "METHOD_NOT_ALLOWED")
    assert server.call("HEAD", target).body == b""


@pytest.mark.parametrize(
    "target", ["/ui/../app.py", "/ui/%2e%2e/app.py", "/openapi/common.json", "/ui/x.js", "/openapi/"]
)
def test_nothing_else_is_served(server: Server, target: str) -> None:
    """Only the listed names exist: no path leads out of them."""
    assert server.call("GET", target).http_status == 404
