"""What a session has left of its budgets, in one form for headers, frames, answers and refusals (HP-SES-4)."""

from __future__ import annotations

from typing import NamedTuple


class BudgetsLeft(NamedTuple):
    """Null where no budget is in force. Never below 0, also where more was used than there was."""

    tokens: int | None = None
    time_ms: int | None = None
    cost: float | None = None

    def headers(self) -> dict[str, str]:
        """`X-Budget-…` headers; none where no budget is in force (HP-STR-4)."""
        figures = {
            "X-Budget-Tokens-Remaining": self.tokens,
            "X-Budget-Time-Remaining-Ms": self.time_ms,
            "X-Budget-Cost-Remaining": self.cost,
        }
        return {name: f"{value:.15g}" for name, value in figures.items() if value is not None}


NO_BUDGETS = BudgetsLeft()
