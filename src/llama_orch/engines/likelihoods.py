"""How likely each piece of an answer was, from what llama-server tells of single tokens.

It gives out no text that ends inside a character or may be the beginning of a stop text, and what it tells of a token
that it holds back has no text: the first kind it leaves out altogether, the second kind comes with an empty event.
"""

from __future__ import annotations

from llama_orch.engines.base import Likelihood, TextLikelihood
from llama_orch.engines.client import CompletionEvent, TokenChance

IMPOSSIBLE = -9999.0  # what OpenAI says for it; the engine has the lowest number of 32 bits


class Likelihoods:
    """Of one answer. `top`: of how many others each piece tells; None: nobody asked."""

    def __init__(self, top: int | None) -> None:
        self._top = top
        self._held = 0.0  # of tokens whose text is still to come; a stop text's, or the end's, never comes

    def of(self, event: CompletionEvent) -> tuple[TextLikelihood, ...]:
        if self._top is None or not event.completion_probabilities:
            return ()
        for taken in event.completion_probabilities:
            self._held += max(IMPOSSIBLE, taken.logprob)
        if not event.content:
            return ()
        logprob, self._held = max(IMPOSSIBLE, self._held), 0.0
        others = event.completion_probabilities[-1].top_logprobs[: self._top]
        return (TextLikelihood(event.content, logprob, tuple(map(_likelihood, others))),)


def _likelihood(chance: TokenChance) -> Likelihood:
    return Likelihood(bytes(chance.bytes), max(IMPOSSIBLE, chance.logprob))
