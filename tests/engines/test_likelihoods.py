"""What llama-server tells of tokens becomes what is told of texts, whatever it holds back."""

from __future__ import annotations

import pytest

from llama_orch.engines.base import Likelihood, TextLikelihood
from llama_orch.engines.client import CompletionEvent, TokenChance, TokenChances
from llama_orch.engines.likelihoods import IMPOSSIBLE, Likelihoods

pytestmark = pytest.mark.spec("HP-OAI-9")


def event(text: str, *logprobs: float, top: tuple[TokenChance, ...] = ()) -> CompletionEvent:
    return CompletionEvent(
        content=text, completion_probabilities=[TokenChances(logprob=one, top_logprobs=list(top)) for one in logprobs]
    )


def test_nobody_asked() -> None:
    """Then nothing is told."""
    assert Likelihoods(None).of(event("a", -1.0)) == ()


def test_a_token_that_is_given_out_tells_of_itself() -> None:
    """With as many others as were asked for; the engine has one at least. Their bytes may be part of a character."""
    top = (TokenChance(bytes=[0xC3], logprob=-0.5), TokenChance(bytes=[97], logprob=-1.0))
    assert Likelihoods(1).of(event("a", -1.0, top=top)) == (TextLikelihood("a", -1.0, (Likelihood(b"\xc3", -0.5),)),)
    assert Likelihoods(0).of(event("a", -1.0, top=top)) == (TextLikelihood("a", -1.0),)


def test_tokens_that_are_held_back_come_with_their_text() -> None:
    """As one, as likely as all of them together."""
    told = Likelihoods(0)
    assert [told.of(event(*one)) for one in (("", -1.0), ("", -0.5), ("the", -0.25))] == [
        (),
        (),
        (TextLikelihood("the", -1.75),),
    ]
    assert told.of(event("x", -1.0)) == (TextLikelihood("x", -1.0),)


def test_a_text_that_never_comes_tells_nothing() -> None:
    """A stop text's, or the end's."""
    told = Likelihoods(0)
    assert told.of(event("", -1.0)) == told.of(event("")) == ()


def test_what_is_impossible_is_a_number_that_json_has() -> None:
    """The engine has the lowest one of 32 bits, once for each token."""
    lowest = -3.4028234663852886e38
    told = Likelihoods(1)
    told.of(event("", lowest))
    (one,) = told.of(event("a", lowest, top=(TokenChance(bytes=[98], logprob=lowest),)))
    assert (one.logprob, one.top[0].logprob) == (IMPOSSIBLE, IMPOSSIBLE)
