"""Of the tasks that are told a chance of 0.8 at their admission, 70 to 90 % are on time; and so for other chances."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import calibration
import pytest
from calibration import HOSTS, LENGTHS, SHARES, Load, Told, around, told

TASKS = 110
CHANCES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


@pytest.fixture(scope="module")
def seen() -> Iterator[list[Told]]:
    """One load of each kind. They are in virtual time, so that they are the same at every run."""
    logging.disable(logging.CRITICAL)
    kinds = [(lengths, cards, share) for lengths in LENGTHS for cards in HOSTS for share in SHARES.values()]
    try:
        yield [one for seed, kind in enumerate(kinds) for one in told(Load(*kind, seed, TASKS))]
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.spec("HP-STR-3")
def test_a_chance_of_0_8_means_70_to_90_percent(seen: list[Told]) -> None:
    """Told and unknown lengths, one card and two unequal ones, strict and best-effort tasks together."""
    part, count = around(seen, 0.8)
    assert count >= 40
    assert 0.7 <= part <= 0.9


@pytest.mark.spec("HP-STR-3")
def test_every_chance_means_about_what_it_says(seen: list[Told]) -> None:
    """The more likely, the more often; nowhere further off than a sixth, where enough tasks were told it."""
    found = {chance: around(seen, chance) for chance in CHANCES}
    known = {chance: part for chance, (part, count) in found.items() if count >= 25}
    assert len(known) >= 7
    assert known == pytest.approx({chance: chance for chance in known}, abs=1 / 6)


def test_the_table_counts_what_it_is_given() -> None:
    """Bins from 0 to 1, both ends included; a bin that nobody fell into says nothing."""
    some = [Told(0.0, False), Told(0.05, True), Told(0.95, True), Told(1.0, True), Told(0.78, False)]
    row = calibration.table("x", some)
    assert row == ["x", "50% of 2", *["-"] * 6, "0% of 1", "-", "100% of 2"]
    assert around(some, 0.8) == (0.0, 1)
    assert around([], 0.8) == (0.0, 0)
