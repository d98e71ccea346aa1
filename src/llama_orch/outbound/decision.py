"""What was decided about one request, for the log, the metric and the API alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from llama_orch.policy.addresses import Address
from llama_orch.policy.urls import Target

Purpose = Literal["check", "tool", "model", "engine"]


class Decision(NamedTuple):
    """`rule` is a word from a small set; `reason` a sentence without secrets. `target` is None where the URL could not
    be read; `addresses` is empty where nothing was looked up or the name stands for nothing. All requests of one fetch,
    redirects included, have its `audit_id`."""

    is_allowed: bool
    rule: str
    reason: str
    purpose: Purpose
    target: Target | None
    addresses: tuple[Address, ...]
    audit_id: str


Record = Callable[[Decision], None]
