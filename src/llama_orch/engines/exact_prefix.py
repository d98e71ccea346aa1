"""What a slot's KV may be taken over for, so that an answer has the same bytes as without it (HP-DET-1, HP-SES-3).

Logits depend on how a prompt is cut into batches, and the KV of a decoded token is not that of the same token read in a
batch. So a warm prefix changes the numbers, unless it was evaluated in the very batches that a run from the first token
would make: the whole batches at the beginning of a prompt. They are remembered here, and a later run goes on behind the
last of them that both prompts share. (llama.cpp b11549, 24 prompts: the logits of all tokens equal those of a cold run,
where its own reuse changes them in all 24; benchmarks/sessions.py repeats that.)
"""

from __future__ import annotations

from collections.abc import Sequence


class ExactPrefixes:
    """Of one worker. `batch`: tokens of a prompt that the engine evaluates at once."""

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._held: dict[int, Sequence[int]] = {}  # slot -> tokens in whole batches

    def reusable(self, slot: int, tokens: Sequence[int]) -> int:
        """How many of the prompt's tokens the slot holds as a cold run would: whole batches, and never all of the
        prompt, whose last token is read in any case."""
        held = self._held.get(slot, ())
        shared = min(len(held), len(tokens) - 1)
        same = next((i for i in range(shared) if held[i] != tokens[i]), shared)
        return same - same % self._batch

    def keep(self, slot: int, tokens: Sequence[int]) -> None:
        """The prompt was evaluated from its first token, or behind what was `reusable`."""
        self._held[slot] = tokens[: len(tokens) - len(tokens) % self._batch]

    def forget(self, slot: int) -> None:
        """Something else happens to the slot."""
        self._held.pop(slot, None)


def other_than(token: int, tokens: Sequence[int]) -> int:
    """A token of the vocabulary that is not this one; `tokens` are in it."""
    return next(one for one in (*tokens, 0, 1) if one != token)
