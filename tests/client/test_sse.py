"""The event stream parser against the standard's corners."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_orch.client import sse
from llama_orch.client.sse import SseMessage, SseParser, SseTooLarge

STREAM = (
    "\ufeff: a comment\r\nid: 1\r\nevent: token\r\ndata: one\r\ndata:  two\r\n\r\n"
    "data:wörld\n\nid\ndata\n\nid: 7\n\nid: x\0y\ndata: z\n\nunknown: field\nretry: 250\ndata: cut off"
).encode()
MESSAGES = [
    SseMessage("token", "one\n two", "1"),
    SseMessage("message", "wörld", "1"),
    SseMessage("message", "", ""),
    SseMessage("message", "z", "7"),
]


def _messages(chunks: list[bytes], parser: SseParser) -> list[SseMessage]:
    return [message for chunk in chunks for message in parser.feed(chunk)]


@given(st.lists(st.integers(0, len(STREAM)), max_size=20))
def test_chunks_do_not_matter(cuts: list[int]) -> None:
    """Wherever the network cuts the bytes, the same messages come out; an incomplete one never does."""
    edges = [0, *sorted(cuts), len(STREAM)]
    chunks = [STREAM[a:b] for a, b in itertools.pairwise(edges)]
    parser = SseParser()
    assert _messages(chunks, parser) == MESSAGES
    assert parser.retry_ms == 250
    assert parser.last_id == "7"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends(end: str) -> None:
    """All three line ends of the standard end a line."""
    stream = end.join(["data: a", "", "data: b", "", "", ""]).encode() + b":"
    assert [message.data for message in _messages([stream], SseParser())] == ["a", "b"]


def test_other_separators_are_text() -> None:
    """What Python's splitlines takes for a line end is text in a stream."""
    text = "a\x0b\x0c\x85\u2028b"
    assert _messages([f"data: {text}\n\n".encode()], SseParser())[0].data == text


def test_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message without an end does not fill the memory, neither as one line nor as many."""
    monkeypatch.setattr(sse, "MESSAGE_BYTES_MAX", 1000)
    with pytest.raises(SseTooLarge):
        _messages([b"data: " + b"x" * 100] * 20, SseParser())
    with pytest.raises(SseTooLarge):
        _messages([b"data: " + b"x" * 100 + b"\n"] * 20, SseParser())


def test_a_long_line_is_looked_through_once() -> None:
    """A message of ten megabytes in small pieces takes the time of its length, not of its square: this test ends."""
    text = "x" * 10_000_000
    stream = f"id: 1\ndata: {text}\n\n".encode()
    chunks = [stream[start : start + 4096] for start in range(0, len(stream), 4096)]
    (message,) = _messages(chunks, SseParser())
    assert message.data == text
