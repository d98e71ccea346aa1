"""What happens to the models of the catalog, as log lines and counters."""

from __future__ import annotations

import logging

from llama_orch.models.catalog import Entry
from llama_orch.models.trust import Judgement
from llama_orch.observe.logs import event
from llama_orch.observe.metrics import Metrics
from llama_orch.policy.urls import without_query

log = logging.getLogger("llama_orch.catalog")


class CatalogJournal:
    """One method for each kind of event; none changes any state."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def entered(self, entry: Entry) -> None:
        source = without_query(entry.source)
        event(log, logging.INFO, f"model {entry.id} is in the catalog", model_id=entry.id, source_url=source)

    def removed(self, entry: Entry) -> None:
        event(log, logging.INFO, f"model {entry.id} is out of the catalog", model_id=entry.id)

    def put_in_state(self, entry: Entry) -> None:
        event(log, logging.INFO, f"model {entry.id} is {entry.state}", model_id=entry.id, state=entry.state.value)

    def verified(self, entry: Entry, judgement: Judgement) -> None:
        """A line for each thing that is missing (HP-OBS-4), and one for the outcome."""
        for warning in judgement.warnings:
            event(log, logging.WARNING, f"model {entry.id}: {warning}", model_id=entry.id)
        outcome = "failed" if judgement.problems else "passed"
        self._metrics.count("catalog_verifications_total", {"outcome": outcome})
        event(
            log,
            logging.WARNING if judgement.problems else logging.INFO,
            f"the verification of model {entry.id} {outcome}" + "".join(f"; {one}" for one in judgement.problems),
            model_id=entry.id,
            digest=None if entry.finding is None else entry.finding.digest,
        )
