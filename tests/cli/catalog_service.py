"""The catalog of the small service: `story` is entered at the beginning; its verification passes, that of any other
model fails, each after some looks."""

from __future__ import annotations

from typing import Any

UNVERIFIED: dict[str, Any] = {
    "state": "unverified",
    "outcome": None,
    "digest": None,
    "warnings": [],
    "problems": [],
    "read_bytes": None,
    "total_bytes": None,
    "verified_at": None,
}
DIGEST = "sha256:" + "ab" * 32
_DONE = UNVERIFIED | {"state": "done", "digest": DIGEST, "verified_at": "2026-01-01T12:00:01.000Z"}
_UNDER_WAY = [
    UNVERIFIED | {"state": "queued", "read_bytes": 0, "total_bytes": 4 << 30},
    UNVERIFIED | {"state": "running", "read_bytes": 1 << 30, "total_bytes": 4 << 30},
    UNVERIFIED | {"state": "running", "read_bytes": 1 << 30, "total_bytes": 4 << 30},
    UNVERIFIED | {"state": "running", "read_bytes": 3 << 30, "total_bytes": 4 << 30},
]
PASSES = [*_UNDER_WAY, _DONE | {"outcome": "passed", "warnings": ["no \x1bsignature was declared"]}]
FAILS = [*_UNDER_WAY, _DONE | {"outcome": "failed", "problems": ["the file's digest is another one"]}]
ENTRY: dict[str, Any] = {"source_url": "builtin:tiny", "digest": None, "tags": []}


def fetch(state: str, received_bytes: int, error: str | None = None) -> dict[str, Any]:
    total = None if state == "queued" else 4 << 30
    return {"state": state, "received_bytes": received_bytes, "total_bytes": total, "error": error}


_COMING = [fetch("queued", 0), *(fetch("running", count << 30) for count in (1, 1, 2))]
FETCHES = {
    "hf:a/b/c.gguf": [*_COMING, fetch("done", 4 << 30)],
    "hf:a/b/wrong.gguf": [*_COMING, fetch("failed", 4 << 30, "what was \x1bfetched is another file")],
}


def a_model(model_id: str, **fields: Any) -> dict[str, Any]:
    return {
        "id": model_id,
        **ENTRY,
        "manifests": [],
        "signatures": [],
        "sbom": None,
        "trust_policy": {
            "mode": "permissive",
            "allowed_registries": [],
            "require_signature": False,
            "require_sbom": False,
        },
        "state": "Active",
        "size_bytes": 4 << 30,
        "verification": UNVERIFIED,
        "gguf": {"architecture": "lla\x1bma", "context_length": 2048, "quantisation": "Q4_K_M", "vram_bytes": 5 << 30},
        "fetch": None,
        "created_at": "2026-01-01T12:00:00.000Z",
        **fields,
    }


class SmallCatalog:
    """`answer` gives status and body; KeyError for what is not there."""

    def __init__(self) -> None:
        self.models = {"story": a_model("story")}
        self._stories: dict[str, list[dict[str, Any]]] = {}
        self._fetches: dict[str, list[dict[str, Any]]] = {}
        self.endless = False  # a verification stays where it is

    def answer(self, method: str, path: list[str], body: Any) -> tuple[int, Any]:
        match method, path:
            case "GET", []:
                return 200, {"items": list(self.models.values()), "next_cursor": None}
            case "POST", []:
                is_new = body["id"] not in self.models
                self.models.setdefault(body["id"], a_model(body["id"], **body))
                return 201 if is_new else 200, self.models[body["id"]]
            case "GET", [id]:
                return 200, self._seen(self.models[id])
            case "DELETE", [id]:
                del self.models[id]
                return 204, None
            case "POST", [id, "verify"]:
                self._stories[id] = list(PASSES if id == "story" else FAILS)
                return 202, self._seen(self.models[id])["verification"]
            case "POST", [id, "fetch"]:
                self._fetches[id] = list(FETCHES[self.models[id]["source_url"]])
                return 202, self._seen(self.models[id])["fetch"]
            case "POST", [id, "state"]:
                self.models[id] |= {"state": body["state"]}
                return 202, self.models[id]
        raise KeyError(path)

    def _seen(self, model: dict[str, Any]) -> dict[str, Any]:
        """A verification goes on from one look to the next."""
        if story := self._stories.get(model["id"]):
            model |= {"verification": story[1] if self.endless else story.pop(0)}
        if fetches := self._fetches.get(model["id"]):
            model |= {"fetch": fetches.pop(0)}
        return model
