"""A task's frames become the answers and chunks that OpenAI's clients read; nothing of the text is lost or changed."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import jsonschema_rs
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lint_contract import validator
from llama_orch.api.documents import document_bytes
from llama_orch.contract.codes import CODES
from llama_orch.contract.models import (
    EndFrame,
    Error,
    ErrorCode,
    FinishReason,
    StartedFrame,
    TokenChance,
    TokenFrame,
    TokenLogprob,
    ToolCallPiece,
)
from llama_orch.errors import WorkerReset
from llama_orch.openai.answers import (
    DONE,
    ChatWording,
    Chunks,
    Frame,
    Subject,
    TextWording,
    Wording,
    embeddings_answer,
    frames_of,
    waiting,
)
from llama_orch.openai.errors import openai_error
from llama_orch.runtime.streams import TaskStream
from tests.api.service_fake import end_frame, metrics

TASK_ID = "3f2b8c1e-9d5a-4c57-8a43-0c7d5b1f2e90"
SUBJECT = Subject(TASK_ID, 1767268800, "default")
STARTED = StartedFrame(task_id=TASK_ID, queue_position=2, predicted_start_ms=420)
DOCUMENT = json.loads(document_bytes("openai.json"))

words = st.lists(st.text(min_size=1, max_size=12), max_size=6)
kinds = st.sampled_from([ChatWording, TextWording])
ends = st.builds(
    lambda reason, tokens_in, tokens_out: end_frame(finish_reason=reason, tokens_in=tokens_in, tokens_out=tokens_out),
    st.sampled_from(FinishReason),
    st.integers(0, 2**31),
    st.integers(0, 2**31),
)


def judge(name: str) -> jsonschema_rs.Draft4Validator:
    """What the document says of this schema."""
    return validator(DOCUMENT, {"$ref": f"#/components/schemas/{name}"})


JUDGES = {
    ChatWording: (judge("OpenAiChatChunk"), judge("OpenAiChatCompletion")),
    TextWording: (judge("OpenAiCompletion"), judge("OpenAiCompletion")),
}


def frames_said(texts: list[str], end: EndFrame | Error) -> list[Frame]:
    """As a reader of the task's stream gets them."""
    stream = TaskStream(STARTED)
    stream.metrics(metrics(1))
    for text in texts:
        stream.token(text)
        stream.metrics(metrics(None))
    stream.end(end)
    return list(frames_of(b"".join(frame.data for frame in stream.after(-1))))


def token_frame(text: str) -> TokenFrame:
    return TokenFrame(t=text, i=0)


def lines(content: bytes) -> list[str]:
    """The data of each message; comments are none."""
    messages = [one for one in content.decode().split("\n\n") if one and not one.startswith(":")]
    assert all(one.startswith("data: ") and "\n" not in one for one in messages)
    return [one.removeprefix("data: ") for one in messages]


def said(choice: dict[str, Any]) -> str:
    text: str = choice["delta"].get("content", "") if "delta" in choice else choice["text"]
    return text


@pytest.mark.spec("HP-OAI-3")
@given(texts=words, end=ends, kind=kinds, tells_usage=st.booleans())
def test_chunks_say_what_the_frames_said(texts: list[str], end: EndFrame, kind: Any, tells_usage: bool) -> None:
    """The text piece by piece, one reason at the end, the usage where it was asked for, then [DONE]; each chunk is as
    the document says."""
    chunks = Chunks(kind(SUBJECT), tells_usage=tells_usage)
    content = b"".join(map(chunks.of, frames_said(texts, end)))
    assert content.endswith(DONE)
    *data, last = lines(content)
    assert last == "[DONE]"
    pieces = [json.loads(one) for one in data]
    assert all(JUDGES[kind][0].is_valid(piece) for piece in pieces)
    assert {(piece["created"], piece["model"]) for piece in pieces} == {(SUBJECT.created, SUBJECT.model)}
    usages = [piece["usage"] for piece in pieces if not piece["choices"]]
    total = end.tokens_in + end.tokens_out
    usage = {"prompt_tokens": end.tokens_in, "completion_tokens": end.tokens_out, "total_tokens": total}
    assert usages == ([usage] if tells_usage else [])
    assert tells_usage == (not pieces[-1]["choices"])
    choices = [piece["choices"][0] for piece in pieces if piece["choices"]]
    assert "".join(map(said, choices)) == "".join(texts)
    assert [one["finish_reason"] for one in choices] == [None] * (len(choices) - 1) + [end.finish_reason.value]
    if kind is ChatWording:
        assert [one["delta"].get("role") for one in choices] == ["assistant"] + [None] * (len(choices) - 1)


@pytest.mark.spec("HP-OAI-2")
@given(texts=words, end=ends, kind=kinds)
def test_the_whole_answer_is_all_of_it(texts: list[str], end: EndFrame, kind: Any) -> None:
    """Text, reason and usage, as the document says."""
    whole = json.loads(msgspec.json.encode(kind(SUBJECT).whole(list(map(token_frame, texts)), end)))
    assert JUDGES[kind][1].is_valid(whole)
    (choice,) = whole["choices"]
    text = choice["message"]["content"] if kind is ChatWording else choice["text"]
    assert (text, choice["finish_reason"]) == ("".join(texts), end.finish_reason.value)
    assert whole["usage"]["total_tokens"] == end.tokens_in + end.tokens_out
    assert whole["id"].endswith(TASK_ID)


@pytest.mark.spec("HP-OAI-3")
@pytest.mark.parametrize("wording", [ChatWording(SUBJECT), TextWording(SUBJECT)])
@pytest.mark.parametrize("texts", [[], ["Once", " upon"]])
def test_an_answer_that_fails_is_never_done(wording: Wording, texts: list[str]) -> None:
    """The error in its own shape comes last, behind what was said."""
    error = WorkerReset("the worker was lost", retry_after_ms=1200).body("cid")
    chunks = Chunks(wording, tells_usage=True)
    *pieces, last = lines(b"".join(map(chunks.of, frames_said(texts, error))))
    assert "".join(said(json.loads(one)["choices"][0]) for one in pieces) == "".join(texts)
    assert json.loads(last) == {
        "error": {
            "message": "the worker was lost",
            "type": "server_error",
            "code": "WORKER_RESET",
            "param": None,
        }
    }


@pytest.mark.spec("HP-OAI-7")
def test_a_task_that_waits_says_how() -> None:
    """By comments, which end with the first token: its place, when it starts, and that its prompt is read."""
    chunks = Chunks(TextWording(SUBJECT), tells_usage=False)
    assert chunks.of(STARTED) == b": waiting, 2 ahead, start in 420 ms\n\n"
    assert chunks.of(metrics(1)) == b": waiting, 1 ahead\n\n"
    assert chunks.of(metrics(None)) == waiting(metrics(None)) == b": reading the prompt\n\n"
    token = next(frame for frame in frames_said(["Once"], end_frame()) if hasattr(frame, "t"))
    assert b"Once" in chunks.of(token)
    assert chunks.of(metrics(None)) == b""


@pytest.mark.spec("HP-OAI-4")
@pytest.mark.parametrize("code", ErrorCode)
def test_every_error_has_its_shape(code: ErrorCode) -> None:
    """Our code and message, and a kind by the status."""
    error = Error(code=code, message="what happened", engine=None, correlation_id="cid")
    body = json.loads(msgspec.json.encode(openai_error(error, "model")))
    assert judge("OpenAiError").is_valid(body)
    status = CODES[code].http_status
    assert (body["error"]["code"], body["error"]["param"]) == (code.value, "model")
    assert (body["error"]["type"] == "server_error") == (status >= 500)
    assert (body["error"]["type"] == "rate_limit_error") == (status == 429)
    assert (body["error"]["type"] == "authentication_error") == (status == 401)


@pytest.mark.spec("HP-OAI-2")
@given(st.lists(st.lists(st.floats(-1, 1, width=32), max_size=4), max_size=3))
def test_vectors_are_the_same_in_either_encoding(vectors: list[list[float]]) -> None:
    """Numbers as they are; base64 as 32-bit floats, the lowest byte first."""
    end = end_frame(embeddings=vectors, tokens_out=0)
    plain = embeddings_answer(SUBJECT, end, is_base64=False)
    packed = embeddings_answer(SUBJECT, end, is_base64=True)
    assert [one.embedding for one in plain.data] == vectors
    assert [one.index for one in packed.data] == list(range(len(vectors)))
    raw = [base64.b64decode(str(one.embedding)) for one in packed.data]
    assert [list(struct.unpack(f"<{len(one) // 4}f", one)) for one in raw] == vectors
    assert judge("OpenAiEmbeddingList").is_valid(json.loads(msgspec.json.encode(packed)))
    assert plain.usage == packed.usage


# -- calls and likelihoods -------------------------------------------------------------------------------------------


def a_call_said(reason: FinishReason, *, is_cut: bool) -> list[Frame]:
    """Text, then a call, whose arguments may be cut off."""
    stream = TaskStream(STARTED)
    stream.token("Let me look.")
    stream.token("<tool_call>", [])
    stream.token('{"name": "look", ', [ToolCallPiece(index=0, id="a1b2c3d4e", name="look")])
    stream.token('{"at": ', [ToolCallPiece(index=0, arguments='{"at": ')])
    if not is_cut:
        stream.token("1}</tool_call>", [ToolCallPiece(index=0, arguments="1}")])
    stream.end(end_frame(finish_reason=reason))
    return list(frames_of(b"".join(frame.data for frame in stream.after(-1))))


@pytest.mark.spec("HP-OAI-3")
@pytest.mark.parametrize(
    ("reason", "is_cut", "told"),
    [
        (FinishReason.STOP, False, "tool_calls"),
        (FinishReason.LENGTH, True, "length"),
        (FinishReason.STOP, True, "stop"),  # a stop text may be anywhere
    ],
)
def test_calls_come_in_openais_framing(reason: FinishReason, is_cut: bool, told: str) -> None:
    """Name and ID once, the arguments in pieces, nothing of what stands around them; a call that is cut off is not told
    as one that can be made."""
    frames = a_call_said(reason, is_cut=is_cut)
    chunks = [
        json.loads(one) for one in lines(b"".join(map(Chunks(ChatWording(SUBJECT), tells_usage=False).of, frames)))[:-1]
    ]
    assert all(JUDGES[ChatWording][0].is_valid(chunk) for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert calls[0] == {
        "index": 0,
        "id": "a1b2c3d4e",
        "type": "function",
        "function": {"name": "look", "arguments": ""},
    }
    assert all(set(call) == {"index", "function"} and set(call["function"]) == {"arguments"} for call in calls[1:])
    assert "".join(call["function"]["arguments"] for call in calls) == ('{"at": ' if is_cut else '{"at": 1}')
    assert "".join(delta.get("content", "") for delta in deltas) == "Let me look."
    assert chunks[-1]["choices"][0]["finish_reason"] == told


@pytest.mark.spec("HP-OAI-3")
def test_a_whole_answer_has_its_calls() -> None:
    """Beside its text, which is null where there is none."""
    *frames, end = [
        frame for frame in a_call_said(FinishReason.STOP, is_cut=False) if isinstance(frame, TokenFrame | EndFrame)
    ]
    assert isinstance(end, EndFrame)
    tokens = [frame for frame in frames if isinstance(frame, TokenFrame)]
    for said_before, content in ((tokens, "Let me look."), (tokens[1:], None)):
        whole = json.loads(msgspec.json.encode(ChatWording(SUBJECT).whole(said_before, end)))
        assert JUDGES[ChatWording][1].is_valid(whole)
        (choice,) = whole["choices"]
        call = {"id": "a1b2c3d4e", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
        assert choice["message"] == {"role": "assistant", "content": content, "refusal": None, "tool_calls": [call]}
        assert choice["finish_reason"] == "tool_calls"


def likely(text: str, logprob: float, *top: tuple[str, float]) -> TokenLogprob:
    chances = [TokenChance(token=one, bytes=list(one.encode()), logprob=value) for one, value in top]
    return TokenLogprob(token=text, bytes=list(text.encode()), logprob=logprob, top=chances)


@pytest.mark.spec("HP-OAI-3")
def test_likelihoods_come_in_openais_two_forms() -> None:
    """With bytes for chats, with places in the text for completions; the same whole and in chunks."""
    stream = TaskStream(STARTED)
    stream.token("Né", None, [likely("N", -0.5, ("N", -0.5), ("O", -1.0)), likely("é", -0.25)])
    stream.token("e", None, [likely("e", -2.0, ("�", -0.125), ("�", -3.0))])
    stream.end(end_frame())
    frames = list(frames_of(b"".join(frame.data for frame in stream.after(-1))))
    tokens = [frame for frame in frames if isinstance(frame, TokenFrame)]
    for kind in (ChatWording, TextWording):
        whole = json.loads(msgspec.json.encode(kind(SUBJECT).whole(tokens, end_frame())))  # type: ignore[abstract]
        content = b"".join(map(Chunks(kind(SUBJECT), tells_usage=False).of, frames))  # type: ignore[abstract]
        chunks = [json.loads(one)["choices"][0]["logprobs"] for one in lines(content)[:-1]]
        told = [one for one in chunks if one]
        (choice,) = whole["choices"]
        assert JUDGES[kind][1].is_valid(whole)
        for key in choice["logprobs"].keys() - {"refusal"}:
            assert choice["logprobs"][key] == [value for one in told for value in one[key]]
        if kind is TextWording:
            assert choice["logprobs"] == {
                "tokens": ["N", "é", "e"],
                "token_logprobs": [-0.5, -0.25, -2.0],
                "top_logprobs": [{"N": -0.5, "O": -1.0}, {}, {"�": -0.125}],
                "text_offset": [0, 1, 2],
            }
        else:
            assert [one["bytes"] for one in choice["logprobs"]["content"]] == [[78], [195, 169], [101]]
