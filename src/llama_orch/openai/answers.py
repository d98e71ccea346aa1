"""A task's frames as OpenAI's answers (HP-OAI-3): whole, or chunk by chunk."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec
from msgspec import UNSET, Struct

from llama_orch.contract.models import (
    FRAMES,
    EndFrame,
    Error,
    FinishReason,
    MetricsFrame,
    OpenAiAnswerMessage,
    OpenAiChatChoice,
    OpenAiChatChunk,
    OpenAiChatChunkChoice,
    OpenAiChatCompletion,
    OpenAiCompletion,
    OpenAiDelta,
    OpenAiEmbedding,
    OpenAiEmbeddingList,
    OpenAiEmbeddingUsage,
    OpenAiFinish,
    OpenAiLogprobs,
    OpenAiTextChoice,
    OpenAiUsage,
    StartedFrame,
    TokenFrame,
)
from llama_orch.openai.errors import openai_error
from llama_orch.openai.likelihoods import TextLogprobs, chat_logprobs
from llama_orch.openai.tools import Calls

Frame = StartedFrame | TokenFrame | MetricsFrame | EndFrame | Error

DONE = b"data: [DONE]\n\n"
DIGEST_CHARS = 12

_decoders: dict[bytes, msgspec.json.Decoder[Any]] = {
    name.encode(): msgspec.json.Decoder(kind) for name, kind in FRAMES.items()
}
_encode = msgspec.json.Encoder().encode


def frames_of(batch: bytes) -> Iterator[Frame]:
    """The frames of a reader's batch, which is whole messages of our own making."""
    for message in batch.split(b"\n\n"):
        fields = dict(line.split(b": ", 1) for line in message.split(b"\n") if line)
        if fields:
            frame: Frame = _decoders[fields[b"event"]].decode(fields[b"data"])
            yield frame


class Subject(NamedTuple):
    """What each piece of an answer repeats. `created`: seconds since 1970."""

    task_id: str
    created: int
    model: str


def usage_of(end: EndFrame) -> OpenAiUsage:
    return OpenAiUsage(
        prompt_tokens=end.tokens_in, completion_tokens=end.tokens_out, total_tokens=end.tokens_in + end.tokens_out
    )


def fingerprint_of(end: EndFrame) -> str:
    """With the same one, a seed repeats the answer."""
    digest = end.model_digest.removeprefix("sha256:")[:DIGEST_CHARS]
    return f"{end.engine}-{end.engine_version}-{digest}"


class Wording(Protocol):
    """How one answer is put. `begin` and `piece` may be nothing; `whole` is instead of all others."""

    def begin(self) -> Iterable[Struct]: ...

    def piece(self, frame: TokenFrame) -> Struct | None: ...

    def finish(self, end: EndFrame) -> Struct: ...

    def usage(self, end: EndFrame) -> Struct: ...

    def whole(self, frames: Sequence[TokenFrame], end: EndFrame) -> Struct: ...


class ChatWording:
    """`POST /v1/chat/completions`."""

    def __init__(self, subject: Subject) -> None:
        self._created, self._model = subject.created, subject.model
        self._id = f"chatcmpl-{subject.task_id}"
        self._calls = Calls()

    def begin(self) -> Iterable[Struct]:
        return [self._chunk(OpenAiDelta(role="assistant", content=""))]

    def piece(self, frame: TokenFrame) -> Struct | None:
        """Nothing for what only stands around calls."""
        if frame.tool_calls is UNSET:
            return self._chunk(OpenAiDelta(content=frame.t), logprobs=chat_logprobs([frame]))
        calls = self._calls.add(frame.tool_calls)
        return self._chunk(OpenAiDelta(tool_calls=calls)) if calls else None

    def finish(self, end: EndFrame) -> Struct:
        return self._chunk(OpenAiDelta(), end)

    def _finish_reason(self, end: EndFrame) -> OpenAiFinish:
        if end.finish_reason is FinishReason.STOP and self._calls.are_whole:
            return OpenAiFinish.TOOL_CALLS
        return OpenAiFinish(end.finish_reason.value)

    def usage(self, end: EndFrame) -> Struct:
        return OpenAiChatChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._model,
            choices=[],
            usage=usage_of(end),
        )

    def whole(self, frames: Sequence[TokenFrame], end: EndFrame) -> Struct:
        said = [frame for frame in frames if frame.tool_calls is UNSET]
        for frame in frames:
            if frame.tool_calls is not UNSET:
                self._calls.add(frame.tool_calls)
        calls, text = self._calls.whole(), "".join(frame.t for frame in said)
        content = None if calls and not text else text
        message = OpenAiAnswerMessage(role="assistant", content=content, refusal=None, tool_calls=calls)
        logprobs, finish = chat_logprobs(said), self._finish_reason(end)
        return OpenAiChatCompletion(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self._model,
            choices=[OpenAiChatChoice(index=0, message=message, logprobs=logprobs, finish_reason=finish)],
            usage=usage_of(end),
            system_fingerprint=fingerprint_of(end),
        )

    def _chunk(
        self, delta: OpenAiDelta, end: EndFrame | None = None, logprobs: OpenAiLogprobs | None = None
    ) -> OpenAiChatChunk:
        finish = None if end is None else self._finish_reason(end)
        return OpenAiChatChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._model,
            choices=[OpenAiChatChunkChoice(index=0, delta=delta, logprobs=logprobs, finish_reason=finish)],
            system_fingerprint=UNSET if end is None else fingerprint_of(end),
        )


class TextWording:
    """`POST /v1/completions`."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._logprobs = TextLogprobs()

    def begin(self) -> Iterable[Struct]:
        return []

    def piece(self, frame: TokenFrame) -> Struct | None:
        return self._completion([self._choice([frame])])

    def finish(self, end: EndFrame) -> Struct:
        return self._completion([self._choice([], end)], end)

    def usage(self, end: EndFrame) -> Struct:
        return msgspec.structs.replace(self._completion([]), usage=usage_of(end))

    def whole(self, frames: Sequence[TokenFrame], end: EndFrame) -> Struct:
        return msgspec.structs.replace(self._completion([self._choice(frames, end)], end), usage=usage_of(end))

    def _choice(self, frames: Sequence[TokenFrame], end: EndFrame | None = None) -> OpenAiTextChoice:
        text, logprobs = "".join(frame.t for frame in frames), self._logprobs.of(frames)
        finish = None if end is None else OpenAiFinish(end.finish_reason.value)
        return OpenAiTextChoice(index=0, text=text, logprobs=logprobs, finish_reason=finish)

    def _completion(self, choices: list[OpenAiTextChoice], end: EndFrame | None = None) -> OpenAiCompletion:
        return OpenAiCompletion(
            id=f"cmpl-{self._subject.task_id}",
            object="text_completion",
            created=self._subject.created,
            model=self._subject.model,
            choices=choices,
            system_fingerprint=UNSET if end is None else fingerprint_of(end),
        )


def embeddings_answer(subject: Subject, end: EndFrame, *, is_base64: bool) -> OpenAiEmbeddingList:
    vectors = [] if end.embeddings is UNSET else end.embeddings
    return OpenAiEmbeddingList(
        object="list",
        model=subject.model,
        data=[
            OpenAiEmbedding(object="embedding", index=index, embedding=_base64(vector) if is_base64 else vector)
            for index, vector in enumerate(vectors)
        ],
        usage=OpenAiEmbeddingUsage(prompt_tokens=end.tokens_in, total_tokens=end.tokens_in),
    )


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def data_line(piece: Struct) -> bytes:
    return b"data: %b\n\n" % _encode(piece)


class Chunks:
    """Turns frames into the bytes of a stream. A frame may come to nothing; `[DONE]` says that the answer is whole, so
    that one which failed has none."""

    def __init__(self, wording: Wording, *, tells_usage: bool) -> None:
        self._wording = wording
        self._tells_usage = tells_usage
        self._has_begun = False

    def of(self, frame: Frame) -> bytes:
        match frame:
            case TokenFrame():
                piece = self._wording.piece(frame)
                return self._begin() + (b"" if piece is None else data_line(piece))
            case EndFrame():
                usage = data_line(self._wording.usage(frame)) if self._tells_usage else b""
                return self._begin() + data_line(self._wording.finish(frame)) + usage + DONE
            case Error():
                return data_line(openai_error(frame))
            case _:
                return b"" if self._has_begun else waiting(frame)

    def _begin(self) -> bytes:
        if self._has_begun:
            return b""
        self._has_begun = True
        return b"".join(map(data_line, self._wording.begin()))


def waiting(frame: StartedFrame | MetricsFrame) -> bytes:
    """A comment, so that the client's time does not run out: how the task waits, or that its prompt is read."""
    if frame.queue_position is None:
        return b": reading the prompt\n\n"
    start = "" if frame.predicted_start_ms is None else f", start in {frame.predicted_start_ms} ms"
    return f": waiting, {frame.queue_position} ahead{start}\n\n".encode()
