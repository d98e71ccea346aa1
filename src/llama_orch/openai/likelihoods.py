"""How likely the tokens of an answer were, in OpenAI's two forms."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import UNSET

from llama_orch.contract.models import (
    OpenAiLogprob,
    OpenAiLogprobs,
    OpenAiTextLogprobs,
    OpenAiTopLogprob,
    TokenFrame,
    TokenLogprob,
)


def chat_logprobs(frames: Iterable[TokenFrame]) -> OpenAiLogprobs | None:
    """Of these frames of a chat; None where they tell nothing."""
    tokens = [one for frame in frames if frame.logprobs is not UNSET for one in frame.logprobs]
    return OpenAiLogprobs(content=list(map(_chat_token, tokens)), refusal=None) if tokens else None


def _chat_token(one: TokenLogprob) -> OpenAiLogprob:
    top = [OpenAiTopLogprob(token=other.token, logprob=other.logprob, bytes=other.bytes) for other in one.top]
    return OpenAiLogprob(token=one.token, logprob=one.logprob, bytes=one.bytes, top_logprobs=top)


class TextLogprobs:
    """Of a completion, whose tokens have their place in its text."""

    def __init__(self) -> None:
        self._offset = 0

    def of(self, frames: Iterable[TokenFrame]) -> OpenAiTextLogprobs | None:
        """Of the frames that come next; None where they tell nothing."""
        tokens = [one for frame in frames if frame.logprobs is not UNSET for one in frame.logprobs]
        if not tokens:
            return None
        offsets: list[int] = []
        for one in tokens:
            offsets.append(self._offset)
            self._offset += len(one.token)
        return OpenAiTextLogprobs(
            tokens=[one.token for one in tokens],
            token_logprobs=[one.logprob for one in tokens],
            top_logprobs=[_by_text(one) for one in tokens],
            text_offset=offsets,
        )


def _by_text(one: TokenLogprob) -> dict[str, float]:
    """The likeliest first, also of those that share a text."""
    found: dict[str, float] = {}
    for other in one.top:
        found.setdefault(other.token, other.logprob)
    return found
