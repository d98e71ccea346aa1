"""A handler's answer with headers or a status of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """`body` is a model of the contract."""

    body: Any
    headers: Mapping[str, str]
    http_status: int | None = None  # None: the operation's only success
