"""What a finding means by a policy."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs

from llama_orch.contract.config import TrustPolicySettings
from llama_orch.contract.models import CatalogModelRequest, ModelManifest, ModelSbom, ModelSignature, ModelState
from llama_orch.models.catalog import CatalogBook, Entry, Finding
from llama_orch.models.trust import foreign_registry, judge, needs_verification

TRUE, WRONG = "sha256:" + "a" * 64, "sha256:" + "b" * 64
FOUND = Finding(at_s=0.0, key="k", digest=TRUE, size_bytes=7)
PERMISSIVE, STRICT = TrustPolicySettings(), TrustPolicySettings(mode="strict")
DEMANDING = TrustPolicySettings(mode="strict", require_signature=True, require_sbom=True)
SIGNATURE = ModelSignature(signer="s", digest=TRUE, signature="x")
SBOM = ModelSbom(format="SPDX", url="https://example.org/s")


def declared(source: str = "file:/m.gguf", **fields: Any) -> CatalogModelRequest:
    return CatalogModelRequest(id="m", source_url=source, **fields)


@pytest.mark.spec("HP-CTL-4")
@pytest.mark.parametrize("policy", [PERMISSIVE, STRICT], ids=["permissive", "strict"])
@pytest.mark.parametrize(
    ("claims", "who"),
    [
        ({"digest": WRONG}, "declared digest"),
        ({"manifests": [ModelManifest(digest=TRUE), ModelManifest(digest=WRONG)]}, "manifest"),
        ({"manifests": [ModelManifest(digest=TRUE, size_bytes=8)]}, "8"),
        ({"signatures": [structs.replace(SIGNATURE, digest=WRONG)]}, "signature of s"),
        ({"sbom": structs.replace(SBOM, model_digest=WRONG)}, "SBOM"),
    ],
    ids=["digest", "manifest", "size", "signature", "sbom"],
)
def test_what_is_not_true_is_a_problem_by_every_policy(
    policy: TrustPolicySettings, claims: dict[str, Any], who: str
) -> None:
    """The sentence says who claims it."""
    problems = judge(declared(**{"digest": TRUE} | claims), FOUND, policy).problems
    assert len(problems) == 1
    assert who in problems[0]


@pytest.mark.spec("HP-CTL-4", "HP-OBS-4")
@pytest.mark.parametrize(
    ("policy", "problems", "warnings"),
    [(PERMISSIVE, 0, 2), (STRICT, 0, 2), (DEMANDING, 2, 0)],
    ids=["permissive", "strict", "demanding"],
)
def test_what_is_missing_is_a_warning_unless_a_strict_policy_asks_for_it(
    policy: TrustPolicySettings, problems: int, warnings: int
) -> None:
    judgement = judge(declared(digest=TRUE), FOUND, policy)
    assert (len(judgement.problems), len(judgement.warnings)) == (problems, warnings)


@pytest.mark.spec("HP-OBS-4")
def test_a_permissive_policy_never_makes_a_failure_of_what_is_missing() -> None:
    """Whatever it asks for."""
    asking = TrustPolicySettings(require_signature=True, require_sbom=True, allowed_registries=["a.example"])
    assert judge(declared("hf:o/r/m.gguf"), FOUND, asking).problems == []


def test_a_strict_policy_wants_a_digest_except_of_what_ships_with_the_program() -> None:
    assert len(judge(declared(), FOUND, STRICT).problems) == 1
    assert judge(declared("builtin:tiny"), FOUND, DEMANDING).problems == []
    assert judge(declared(digest=TRUE, signatures=[SIGNATURE], sbom=SBOM), FOUND, DEMANDING).warnings == []


def test_a_file_that_could_not_be_read_is_a_problem_and_nothing_else() -> None:
    judgement = judge(declared(digest=TRUE), Finding(at_s=0.0, error="there is no such file"), STRICT)
    assert (judgement.problems, judgement.warnings) == (["there is no such file"], [])


@pytest.mark.parametrize(
    ("source", "allowed", "foreign"),
    [
        ("hf:Org/repo/m.gguf", [], None),
        ("hf:Org/repo/m.gguf", ["huggingface.co"], None),
        ("hf:Org/repo/m.gguf", ["huggingface.co/org"], None),
        ("hf:Org/repo/m.gguf", ["huggingface.co/other"], "huggingface.co/Org"),
        ("https://A.example/m.gguf", ["a.example"], None),
        ("https://a.example.evil.org/m.gguf", ["a.example"], "a.example.evil.org"),
        ("https://a.example@evil.org/m.gguf", ["a.example"], "evil.org"),
        ("file:/m.gguf", ["a.example"], None),
        ("builtin:tiny", ["a.example"], None),
    ],
)
def test_registries(source: str, allowed: list[str], foreign: str | None) -> None:
    """The host, or the host and the owner on the hub; files of this machine come from none."""
    assert foreign_registry(source, TrustPolicySettings(allowed_registries=allowed)) == foreign


@pytest.mark.parametrize(
    ("request_", "policy", "is_needed"),
    [
        (declared(), PERMISSIVE, False),
        (declared(signatures=[SIGNATURE]), PERMISSIVE, True),
        (declared(digest=TRUE), PERMISSIVE, True),
        (declared(sbom=SBOM), PERMISSIVE, False),
        (declared(), STRICT, True),
        (declared("builtin:tiny"), STRICT, False),
    ],
)
def test_what_has_to_be_verified_before_it_is_served(
    request_: CatalogModelRequest, policy: TrustPolicySettings, is_needed: bool
) -> None:
    """Whatever was claimed of it; by a strict policy everything. Once it was verified, nothing."""
    entry = Entry(number=1, declared=request_, created_s=0.0)
    assert needs_verification(entry, policy) is is_needed
    assert not needs_verification(structs.replace(entry, finding=FOUND), policy)


def test_of_several_entries_of_one_source_the_one_that_may_be_served_is_found() -> None:
    old = Entry(number=1, declared=declared(), created_s=0.0, state=ModelState.RETIRED)
    new = Entry(number=2, declared=structs.replace(declared(digest=TRUE), id="n"), created_s=0.0)
    book = CatalogBook([new, old])
    assert book.find("file:/m.gguf") == new
    assert book.find("m") == old
    assert book.find(TRUE) == new
    assert book.source_of(WRONG) == WRONG
