"""Seeds of 63 bits on engines of 32."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_orch.engines.seeds import RANDOM_SEED, map_seed
from llama_orch.workers.ctransformers import token_seed

_SEEDS = st.integers(0, 2**63 - 1)


@pytest.mark.spec("HP-DET-1")
@given(_SEEDS)
def test_a_mapped_seed_fits_and_never_means_random(seed: int) -> None:
    """llama.cpp takes 0xFFFFFFFF for "random": no seed may become it."""
    assert 0 <= map_seed(seed) < RANDOM_SEED


@given(st.integers(0, RANDOM_SEED - 1))
def test_a_seed_that_fits_stays_as_it_is(seed: int) -> None:
    """A person who compares with llama.cpp by hand sees the same number."""
    assert map_seed(seed) == seed


def test_the_mapping_is_what_it_always_was() -> None:
    """Folding is part of what a strict run reproduces, so its values are pinned."""
    assert [map_seed(seed) for seed in (RANDOM_SEED, 2**32, 2**63 - 1)] == [597867875, 1739479891, 1483437564]


def test_a_negative_seed_is_a_mistake() -> None:
    """-1 means "random" to every engine and must not get this far."""
    with pytest.raises(ValueError, match="negative"):
        map_seed(-1)


@pytest.mark.spec("HP-DET-1")
@given(_SEEDS, st.integers(0, 2**24))
def test_a_token_seed_is_never_random(seed: int, index: int) -> None:
    """ctransformers takes -1 for "random" and has 32 signed bits."""
    assert 0 <= token_seed(seed, index) < 2**31


def test_token_seeds_differ_from_token_to_token() -> None:
    """The sampler reseeds for every token: one seed for all would repeat its dice."""
    assert len({token_seed(7, index) for index in range(1000)}) == 1000
