"""What the simulated engine makes of texts."""

from __future__ import annotations

import math
import random

_VECTOR_LENGTH = 8


def vector_of(text: str) -> tuple[float, ...]:
    """The text's embedding, of length 1."""
    dice = random.Random(f"vector:{text}")
    values = [dice.gauss(0.0, 1.0) for _ in range(_VECTOR_LENGTH)]
    length = math.sqrt(sum(value * value for value in values))
    return tuple(value / length for value in values)


def shared_tokens(tokens: list[str], held: list[str]) -> int:
    """Tokens at the start that the slot holds already; the last one is always evaluated again."""
    pairs = zip(tokens[:-1], held, strict=False)
    return next((index for index, (new, old) in enumerate(pairs) if new != old), min(len(tokens) - 1, len(held)))
