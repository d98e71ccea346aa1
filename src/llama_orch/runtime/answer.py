"""What an engine says of an answer as its stream's frames: texts, calls of tools, and how likely they were."""

from __future__ import annotations

import hashlib

from msgspec import UNSET

from llama_orch.contract.models import TokenChance, TokenLogprob, ToolCallPiece
from llama_orch.core.task import Task
from llama_orch.core.tool_reading import CallPiece, CallReader, Piece
from llama_orch.core.tool_syntax import SYNTAXES, ToolSyntax
from llama_orch.core.tooling import has_free_text
from llama_orch.engines.base import Chunk, Likelihood, TextLikelihood
from llama_orch.runtime.streams import TaskStream

ID_CHARS = 9  # as Mistral's templates ask of the IDs of calls
_ID_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"


def syntax_of(task: Task) -> ToolSyntax | None:
    """How the task's answer writes calls; None where it may have none."""
    name = task.pool.spec.tool_syntax
    return None if name is None or task.request.tools is UNSET else SYNTAXES[name]


def call_id(task_id: str, index: int) -> str:
    """The ID of a call: the same whenever the task's answer is read."""
    number = int.from_bytes(hashlib.sha256(f"{task_id}:{index}".encode()).digest()[:8])
    letters = [_ID_ALPHABET[number // 36**place % 36] for place in range(ID_CHARS)]
    return "".join(letters)


class AnswerWriter:
    """Of one prompt's answer. What is likely of a text that is held back comes with the next frame."""

    def __init__(self, task: Task, stream: TaskStream) -> None:
        self._stream = stream
        self._likelihoods: list[TokenLogprob] = []
        self._reader: CallReader | None = None
        if (syntax := syntax_of(task)) is not None:
            opens_only = not has_free_text(task.request)
            self._reader = CallReader(syntax, lambda index: call_id(task.task_id, index), opens_only=opens_only)

    def write(self, chunk: Chunk) -> None:
        if chunk.likelihoods:
            self._likelihoods += map(_told, chunk.likelihoods)
        if self._reader is None:
            if chunk.text:
                self._stream.token(chunk.text, None, self._likelihoods)
                self._likelihoods = []
            return
        for piece in self._reader.feed(chunk.text):
            self._say(piece)

    def end(self) -> None:
        """The engine has said all."""
        for piece in [] if self._reader is None else self._reader.flush():
            self._say(piece)

    def _say(self, piece: Piece) -> None:
        if piece.text:
            calls = None if piece.calls is None else list(map(_called, piece.calls))
            self._stream.token(piece.text, calls, self._likelihoods)
            self._likelihoods = []


def _called(piece: CallPiece) -> ToolCallPiece:
    return ToolCallPiece(
        index=piece.index,
        id=UNSET if piece.call_id is None else piece.call_id,
        name=piece.name or UNSET,
        arguments=piece.arguments or UNSET,
    )


def _told(one: TextLikelihood) -> TokenLogprob:
    content = list(one.text.encode())
    return TokenLogprob(token=one.text, bytes=content, logprob=one.logprob, top=list(map(_chance, one.top)))


def _chance(one: Likelihood) -> TokenChance:
    return TokenChance(token=_whole(one.content), bytes=list(one.content), logprob=one.logprob)


def _whole(content: bytes) -> str:
    """With U+FFFD for parts of characters."""
    return content.decode(errors="replace")
