"""The contract for people and tools: its documents, as fixed bytes, and Swagger UI on them. No token is needed, since
they say nothing about this installation; the edge's Host allow-list applies to them too."""

from __future__ import annotations

import json
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from swagger_ui_bundle import swagger_ui_path

from llama_orch.contract.operations import OPERATIONS
from llama_orch.errors import MethodNotAllowed

NAMES = ("data", "control", "openai")
ASSETS = ("swagger-ui.css", "swagger-ui-bundle.js", "swagger-ui-standalone-preset.js", "favicon-32x32.png")
TYPES = {"json": "application/json", "js": "text/javascript; charset=utf-8", "css": "text/css", "png": "image/png"}
TYPES |= {"html": "text/html; charset=utf-8"}
SECURITY_HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),
]
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Llama-Orch API</title>
<link rel="icon" href="favicon-32x32.png">
<link rel="stylesheet" href="swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="swagger-ui-bundle.js"></script>
<script src="swagger-ui-standalone-preset.js"></script>
<script src="init.js"></script>
</body>
</html>
"""
INIT = """SwaggerUIBundle({
  urls: %s,
  dom_id: "#swagger-ui",
  layout: "StandaloneLayout",
  presets: [SwaggerUIBundle.presets.apis, SwaggerUIStandalonePreset],
  deepLinking: true,
  persistAuthorization: false,
  validatorUrl: null,
});
"""


def document_bytes(file_name: str) -> bytes:
    return (files("llama_orch.contract") / "documents" / file_name).read_bytes()


def merged_document(*, metrics_are_open: bool) -> dict[str, Any]:
    """One document for Connexion, which cannot route several on one base path. That they fit together is checked when
    the code is generated. Paths come in the order of OPERATIONS, literal ones before templates: the router takes the
    first that fits."""
    parts = [json.loads(document_bytes(f"{name}.json")) for name in NAMES]
    paths = {path: item for part in parts for path, item in part["paths"].items()}
    components: dict[str, dict[str, Any]] = {}
    for part in parts:
        for kind, items in part["components"].items():
            components.setdefault(kind, {}).update(items)
    if metrics_are_open:
        paths["/metrics"]["get"]["security"] = []
    return {
        "openapi": parts[0]["openapi"],
        "info": parts[0]["info"],
        "security": parts[0]["security"],
        "paths": {operation.path: paths[operation.path] for operation in OPERATIONS.values()},
        "components": components,
    }


def _pages() -> dict[str, bytes | Traversable]:
    urls = []
    pages: dict[str, bytes | Traversable] = {"/openapi/config.schema.json": document_bytes("config.schema.json")}
    for name in NAMES:
        pages[f"/openapi/{name}.json"] = document_bytes(f"{name}.json")
        title = json.loads(document_bytes(f"{name}.json"))["info"]["title"]
        urls.append({"name": title, "url": f"../openapi/{name}.json"})
    pages["/ui/"] = pages["/ui/index.html"] = PAGE.encode()
    pages["/ui/init.js"] = (INIT % json.dumps(urls)).encode()
    return pages | {f"/ui/{name}": swagger_ui_path / name for name in ASSETS}


class Documents:
    """Answers for its own paths, exact ones only, and passes everything else on."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._pages = _pages()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["type"] == "http" else ""
        if path not in self._pages and path != "/ui":
            await self._app(scope, receive, send)
            return
        if scope["method"] not in ("GET", "HEAD"):
            raise MethodNotAllowed("this path takes GET, HEAD", "GET, HEAD")
        if path == "/ui":  # relative: nothing of it comes from the client
            await _send(send, 307, [(b"location", b"ui/")], b"")
            return
        page = self._pages[path]
        content = page if isinstance(page, bytes) else page.read_bytes()  # Swagger UI's megabytes are not kept
        media_type = TYPES[path.rpartition(".")[2]] if "." in path else TYPES["html"]
        await _send(send, 200, [(b"content-type", media_type.encode())], content)


async def _send(send: Send, http_status: int, headers: list[tuple[bytes, bytes]], content: bytes) -> None:
    length = (b"content-length", str(len(content)).encode())
    await send({"type": "http.response.start", "status": http_status, "headers": [*headers, length, *SECURITY_HEADERS]})
    await send({"type": "http.response.body", "body": content})
