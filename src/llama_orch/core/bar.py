"""Why a model gets no new tasks, whatever its pool could do: what the catalog has decided, in the core's words."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

WAIT_MS = 1_000


class BarKind(StrEnum):
    """What is wrong with the model."""

    RETIRED = "retired"  # running tasks may end, then it is unloaded (HP-CTL-3)
    UNTRUSTED = "untrusted"  # it is not what was declared, or not what the policy takes: its tasks end (HP-CTL-4)
    UNVERIFIED = "unverified"  # that is not known yet, and will be soon


@dataclass(frozen=True, slots=True)
class Bar:
    """A closed door. `reason` is a sentence for whoever is refused; `wait_ms` is when an unverified model may be
    known."""

    kind: BarKind
    reason: str
    wait_ms: int = WAIT_MS

    @property
    def is_lasting(self) -> bool:
        """Whether the model is to be unloaded."""
        return self.kind is not BarKind.UNVERIFIED
