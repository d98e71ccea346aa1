"""The contract's seeds (0 to 2**63 - 1) on an engine whose seeds are 32 bits wide.

llama.cpp takes the highest 32-bit value to mean "random", so it must never be sent. Seeds below it stay as they are, so
that a person who compares with llama.cpp by hand sees the same number; higher ones are folded by splitmix64, whose
every output bit depends on every input bit. Folding is part of what a strict run reproduces: do not change it.
"""

from __future__ import annotations

RANDOM_SEED = 0xFFFF_FFFF
_MASK = (1 << 64) - 1


def map_seed(seed: int) -> int:
    """A 32-bit seed, never RANDOM_SEED: `seed` itself when it fits, otherwise splitmix64 of it modulo 2**32 - 1."""
    if seed < 0:
        raise ValueError("a seed is not negative")
    if seed < RANDOM_SEED:
        return seed
    return _splitmix64(seed) % RANDOM_SEED


def _splitmix64(state: int) -> int:
    """One output of splitmix64 (Steele, Lea, Flood 2014) for this state."""
    z = (state + 0x9E37_79B9_7F4A_7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58_476D_1CE4_E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D0_49BB_1331_11EB) & _MASK
    return z ^ (z >> 31)
