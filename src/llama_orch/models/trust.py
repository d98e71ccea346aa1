"""Whether a model is what was declared, and whether the trust policy takes it (HP-CTL-4). Plain functions.

permissive: what was declared has to be true, and what was not declared is a warning. strict: a digest has to be
declared, the registry has to be one of `allowed_registries` where there are any, and what `require_signature` and
`require_sbom` ask for has to be there. What ships inside the package is trusted: it came with the program that would
check it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from llama_orch.contract.config import TrustPolicySettings
from llama_orch.contract.models import CatalogModelRequest
from llama_orch.models.catalog import Entry, Finding

HUB = "huggingface.co"


@dataclass(frozen=True, slots=True)
class Judgement:
    """`problems` keep the model from being served; `warnings` do not. Each is a sentence."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def judge(declared: CatalogModelRequest, finding: Finding, policy: TrustPolicySettings) -> Judgement:
    """What a verification's finding means by this policy."""
    if finding.error is not None:
        return Judgement([finding.error])
    judgement = Judgement(contradictions(declared, finding))
    for gap, is_required in _gaps(declared, policy):
        is_problem = is_required and is_strict(declared, policy)
        (judgement.problems if is_problem else judgement.warnings).append(gap)
    return judgement


def is_strict(declared: CatalogModelRequest, policy: TrustPolicySettings) -> bool:
    return policy.mode == "strict" and not declared.source_url.startswith("builtin:")


def has_claims(declared: CatalogModelRequest) -> bool:
    """Whether anything was declared that the file could contradict."""
    sbom = declared.sbom is not None and declared.sbom.model_digest is not None
    return declared.digest is not None or bool(declared.manifests) or bool(declared.signatures) or sbom


def needs_verification(entry: Entry, policy: TrustPolicySettings) -> bool:
    """Whether it may not be served before its file was read."""
    return entry.finding is None and (has_claims(entry.declared) or is_strict(entry.declared, policy))


def lacks(declared: CatalogModelRequest, policy: TrustPolicySettings) -> list[str]:
    """What keeps the model from being served whatever its file is, so that it need not be fetched to be known."""
    return [gap for gap, is_required in _gaps(declared, policy) if is_required and is_strict(declared, policy)]


def contradictions(declared: CatalogModelRequest, finding: Finding) -> list[str]:
    claims = [("the declared digest", declared.digest)]
    claims += [("a manifest", manifest.digest) for manifest in declared.manifests]
    claims += [(f"the signature of {signature.signer}", signature.digest) for signature in declared.signatures]
    claims += [("the SBOM", None if declared.sbom is None else declared.sbom.model_digest)]
    wrong = [
        f"the file's digest is {finding.digest}, and {who} is for {digest}"
        for who, digest in claims
        if digest not in (None, finding.digest)
    ]
    sizes = [m.size_bytes for m in declared.manifests if m.size_bytes not in (None, finding.size_bytes)]
    return wrong + [f"the file has {finding.size_bytes} bytes, and a manifest says {size}" for size in sizes]


def _gaps(declared: CatalogModelRequest, policy: TrustPolicySettings) -> list[tuple[str, bool]]:
    """What is missing, and whether a strict policy requires it."""
    gaps = []
    if declared.digest is None:
        gaps.append(("no digest was declared, so that nothing says which file is meant", True))
    if not declared.signatures:
        gaps.append(("no signature was declared", policy.require_signature))
    if declared.sbom is None:
        gaps.append(("no SBOM was declared", policy.require_sbom))
    if (registry := foreign_registry(declared.source_url, policy)) is not None:
        gaps.append((f"{registry} is none of `catalog.trust_policy.allowed_registries`", True))
    return gaps


def foreign_registry(source: str, policy: TrustPolicySettings) -> str | None:
    """The host that the source is fetched from, where the policy names others. Files of this machine come from none."""
    kind, _, rest = source.partition(":")
    if kind not in ("hf", "https") or not policy.allowed_registries:
        return None
    host = HUB if kind == "hf" else (urlsplit(source).hostname or "").lower()
    allowed = {one.strip().lower() for one in policy.allowed_registries}
    owner = f"{host}/{rest.split('/')[0]}" if kind == "hf" else host
    return None if allowed & {host, owner.lower()} else owner
