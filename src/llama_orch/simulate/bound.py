"""A time that no scheduler can beat: what the cards could do at best, whoever decides.

Each task is a fraction of a card's time, at the speed that the card reaches with all slots of its model busy. Spread
over the cards in any parts, and with every used card loading one model first, the whole takes at least as long as the
best such spread: the fractional relaxation of scheduling on unrelated machines, whose dual is evaluated here. For
weights y >= 0 that add up to 1 the bound is the sum over the tasks of min over the cards of y x share, plus the sum of
y x load. Every y gives a valid bound; the best of a search is taken. What one task and one agent's own chain take is a
bound too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

ROUNDS = 200
STEP = 0.15


@dataclass(frozen=True, slots=True)
class Work:
    """One task on each card, in the cards' order; infinite where its model does not fit. Seconds. `share_s`: of the
    card at its best; `alone_s`: from start to end with nothing beside it; `load_s`: of its model."""

    share_s: tuple[float, ...]
    alone_s: tuple[float, ...]
    load_s: tuple[float, ...]

    @property
    def fits(self) -> bool:
        return any(math.isfinite(one) for one in self.share_s)

    @property
    def fastest_s(self) -> float:
        return min(self.alone_s)


def lower_bound(works: Sequence[Work], chains: Iterable[float] = ()) -> float:
    """Seconds from the first load to the last task's end, at least. `chains`: what must happen one after the other."""
    works = [work for work in works if work.fits]
    if not works:
        return 0.0
    single = max(min(map(sum, zip(work.load_s, work.alone_s, strict=True))) for work in works)
    return max(single, _spread_s(works), *chains, 0.0)


def _spread_s(works: Sequence[Work]) -> float:
    """The best spread, over every set of cards that might be used."""
    cards = range(len(works[0].share_s))
    first_load = [min(work.load_s[card] for work in works) for card in cards]
    usable = [card for card in cards if math.isfinite(first_load[card])]
    found = []
    for count in range(1, len(usable) + 1):
        for used in combinations(usable, count):
            shares = [[work.share_s[card] for card in used] for work in works]
            if all(min(one) < math.inf for one in shares):
                found.append(_dual(shares, [first_load[card] for card in used]))
    return min(found, default=0.0)


def _only_on(card: int, shares: list[list[float]]) -> float:
    return sum(s[card] for s in shares if all(one == math.inf for c, one in enumerate(s) if c != card))


def _dual(shares: list[list[float]], loads: list[float]) -> float:
    """The largest value that was found; multiplicative weights, which follow the card with the most work."""
    weights = [1 / len(loads)] * len(loads)
    # All weight on one card: what fits nowhere else is its own work. The search only comes near to that.
    best = max(load + _only_on(card, shares) for card, load in enumerate(loads))
    for round_number in range(ROUNDS if len(loads) > 1 else 1):
        work = list(loads)
        value = sum(y * load for y, load in zip(weights, loads, strict=True))
        for share in shares:
            card = min(range(len(share)), key=lambda c: weights[c] * share[c] if weights[c] else math.inf)
            value += weights[card] * share[card]
            work[card] += share[card]
        best = max(best, value)
        top = max(work) or 1.0
        step = STEP / (1 + round_number / 20)
        weights = [y * math.exp(step * w / top) for y, w in zip(weights, work, strict=True)]
        total = sum(weights)
        weights = [y / total for y in weights]
    return best
