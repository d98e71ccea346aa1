"""The line against a plain list, under long mixes of puts and removals."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_orch.core.line import Line


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(seed=st.integers(0, 2**32), chance=st.sampled_from([0.1, 0.4, 0.6, 0.9]), length=st.integers(1, 500))
def test_places_are_those_of_a_list(seed: int, chance: float, length: int) -> None:
    """Place, who is at a place, first, order and length agree after every step; spots that are empty are given up."""
    dice, line, model = random.Random(seed), Line(), list[str]()
    for number in range(length):
        if model and dice.random() < chance:
            gone = model.pop(dice.choice([0, len(model) - 1, dice.randrange(len(model))]))
            line.remove(gone)
            assert gone not in line
        else:
            model.append(f"t{number}")
            line.put(f"t{number}")
        assert len(line) == len(model)
        assert line.first() == (model[0] if model else None)
        if model:
            place = dice.randrange(len(model))
            assert line.place(model[place]) == place
            assert line.at(place) == model[place]
    assert list(line) == model


def test_who_is_not_here_has_no_place() -> None:
    """A KeyError, and nothing changed."""
    line = Line()
    line.put("here")
    with pytest.raises(KeyError):
        line.remove("gone")
    with pytest.raises(KeyError):
        line.place("gone")
    assert list(line) == ["here"]
    assert line.removals == 0
