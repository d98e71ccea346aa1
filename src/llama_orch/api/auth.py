"""The one API token (HP-SEC-3). Only `Authorization: Bearer` carries it; a token in a URL would end up in logs and
histories."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable
from typing import Any

from connexion.security import BearerSecurityHandler

from llama_orch import context
from llama_orch.errors import Unauthorized

Check = Callable[..., Awaitable[dict[str, str]]]


def identity(token: str) -> str:
    """What logs say instead of the token (HP-SEC-7)."""
    return f"token:{hashlib.sha256(token.encode()).hexdigest()[:6]}"


class TokenCheck:
    """Compares digests: in constant time, whatever the lengths, and for any bytes (`compare_digest` refuses non-ASCII
    text)."""

    def __init__(self, token: str) -> None:
        self._digest = hashlib.sha256(token.encode()).digest()
        self._identity = identity(token)

    def __call__(self, presented: str) -> dict[str, str]:
        """`presented` is a header's text, which Starlette decodes as Latin-1. Returns Connexion's token info."""
        digest = hashlib.sha256(presented.encode("latin-1")).digest()
        if not hmac.compare_digest(digest, self._digest):
            raise Unauthorized("the token is wrong; `llama-orch token` prints the right one")
        context.identity.set(self._identity)
        return {"sub": self._identity}


class Bearer(BearerSecurityHandler):
    """Hooks the check into Connexion without naming Python in the contract, and without a signature look-up per
    request."""

    def __init__(self, check: TokenCheck) -> None:
        self._check = check

    def _resolve_func(self, security_scheme: dict[str, Any]) -> TokenCheck:
        return self._check

    def _generic_check(self, func: TokenCheck, exception_msg: str) -> Check:
        async def checked(request: object, token: str, required_scopes: object = None) -> dict[str, str]:
            return func(token)

        return checked


def security_map(token: str) -> dict[str, Callable[[], Bearer]]:
    """Connexion calls the value to make a handler for each operation."""
    check = TokenCheck(token)
    return {"bearer": lambda: Bearer(check)}
