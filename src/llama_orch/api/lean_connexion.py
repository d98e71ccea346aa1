"""Connexion without what this service never asks of it, because a start waits for all of it.

Importing it also imports a test client and an HTTP client, with dozens of modules behind them; and on being given a
document it checks it against OpenAPI's own schema, which takes longer than the rest of a start. Ours are checked
before they are shipped (`tox -e contract`), so they are not checked again by everybody at every start.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

# Module -> what is taken from it by name.
_UNUSED = {
    "starlette.testclient": ("TestClient",),
    "requests": (),
    "httpx._main": ("main",),  # its command line, and with it rich and pygments
}


class _Unused:
    """In the place of a class that nobody makes an instance of."""

    def __init__(self, *_: object, **__: object) -> None:
        raise NotImplementedError("Connexion was imported without it: see llama_orch.api.lean_connexion")


@contextmanager
def _stand_ins() -> Iterator[None]:
    """For modules that nobody has imported yet; gone afterwards, so that whoever wants the true ones gets them."""
    put = [name for name in _UNUSED if name not in sys.modules]
    for name in put:
        module = ModuleType(name)
        for one in _UNUSED[name]:
            setattr(module, one, _Unused)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in put:
            del sys.modules[name]


with _stand_ins():
    import connexion as connexion
    from connexion.spec import OpenAPISpecification


@contextmanager
def checked_before() -> Iterator[None]:
    """Documents that Connexion is given in the meantime are taken as they are."""
    original = OpenAPISpecification.__dict__.get("_validate_spec")

    def taken(_cls: type[OpenAPISpecification], _spec: dict[str, Any]) -> None:
        """As it is."""

    OpenAPISpecification._validate_spec = classmethod(taken)
    try:
        yield
    finally:
        if original is None:
            del OpenAPISpecification._validate_spec
        else:
            OpenAPISpecification._validate_spec = original
