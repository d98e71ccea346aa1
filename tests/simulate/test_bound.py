"""The lower bound: never above what can be done, and close to it where that is known."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_orch.simulate.bound import Work, lower_bound

NO = math.inf
SECONDS = st.floats(0.1, 100)


def work(*shares: float, load: tuple[float, ...] | None = None, alone: tuple[float, ...] | None = None) -> Work:
    return Work(shares, shares if alone is None else alone, (0.0,) * len(shares) if load is None else load)


def best_makespan(works: list[Work]) -> float:
    """By trying every way of binding whole tasks to cards, one at a time on each, loads included."""
    cards = range(len(works[0].share_s))

    def makespan(binding: tuple[int, ...]) -> float:
        times = [0.0 for _ in cards]
        for one, card in zip(works, binding, strict=True):
            times[card] = (times[card] or one.load_s[card]) + one.share_s[card]
        return max(times)

    return min(makespan(binding) for binding in product(cards, repeat=len(works)))


def test_equal_cards_share_the_work() -> None:
    """Ten tasks of a second on two cards take five seconds."""
    assert lower_bound([work(1.0, 1.0)] * 10) == pytest.approx(5.0, rel=0.01)


def test_unequal_cards_share_by_speed() -> None:
    """One card is three times as fast: of 12 s of its work it does nine."""
    assert lower_bound([work(1.0, 3.0)] * 12) == pytest.approx(9.0, rel=0.01)


def test_a_model_that_fits_one_card_is_that_cards_work() -> None:
    """Four tasks fit the first card only; the others go to the second."""
    assert lower_bound([work(2.0, NO)] * 4 + [work(1.0, 1.0)] * 4) == pytest.approx(8.0, rel=0.01)


def test_loads_and_the_longest_task_and_chains_count() -> None:
    """A lone task waits for its load; a chain of pauses may be longer than all work."""
    assert lower_bound([work(1.0, 2.0, load=(5.0, 1.0))]) == pytest.approx(3.0)
    assert lower_bound([work(0.1, 0.1, alone=(9.0, 7.0))] * 3) == pytest.approx(7.0)
    assert lower_bound([work(1.0, 1.0)], [50.0]) == 50.0


def test_what_fits_nowhere_is_nobodys_work() -> None:
    """Nothing to do takes no time."""
    assert lower_bound([work(NO, NO)]) == lower_bound([]) == 0.0


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=7), st.tuples(st.floats(0, 20), st.floats(0, 20)))
def test_it_is_never_above_the_best_that_can_be_done(
    shares: list[tuple[float, float]], load: tuple[float, float]
) -> None:
    """Against every binding of a few tasks to two cards."""
    works = [work(*one, load=load) for one in shares]
    assert lower_bound(works) <= best_makespan(works) * (1 + 1e-9)
