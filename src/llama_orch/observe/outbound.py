"""The audit of outbound requests: one line and one count for each decision (HP-SEC-4)."""

from __future__ import annotations

import logging

from llama_orch.observe.logs import event
from llama_orch.observe.metrics import Metrics
from llama_orch.outbound.decision import Decision

log = logging.getLogger("llama_orch.outbound")


class OutboundJournal:
    """`decided` is what the door is given to record with."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._seen: dict[str, tuple[object, ...]] = {}  # origins of servers -> what was decided of them last

    def decided(self, decision: Decision) -> None:
        word = "allow" if decision.is_allowed else "deny"
        labels = {"decision": word, "rule": decision.rule, "purpose": decision.purpose}
        self._metrics.count("policy_outbound_decisions_total", labels)
        event(
            log,
            self._level(decision),
            f"outbound request {'allowed' if decision.is_allowed else 'denied'}",
            audit_id=decision.audit_id,
            **labels,
            reason=decision.reason,
            url=None if decision.target is None else decision.target.shown,
            addresses=[str(address) for address in decision.addresses],
        )

    def _level(self, decision: Decision) -> int:
        """A server of engine `openai` is judged at each connection, several a second: what is as it was is for who
        looks closely."""
        if not decision.is_allowed:
            return logging.WARNING
        if decision.purpose != "engine" or decision.target is None:
            return logging.INFO
        origin, found = decision.target.origin, (decision.rule, decision.addresses)
        is_known, self._seen[origin] = self._seen.get(origin) == found, found
        return logging.DEBUG if is_known else logging.INFO
