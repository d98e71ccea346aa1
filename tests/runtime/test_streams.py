"""The frame log: replay, bounds, and what a reader is told."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_orch.contract.models import EndFrame, FinishReason, MetricsFrame, StartedFrame
from llama_orch.errors import Canceled
from llama_orch.runtime import streams
from llama_orch.runtime.streams import Reader, TaskStream
from llama_orch.testing.loop import run
from llama_orch.testing.rehearsal import read_all

from .frames import check_order, events, parse, text

STARTED = StartedFrame(task_id="3f2b8c1e-9d5a-4c57-8a43-0c7d5b1f2e90", queue_position=0, predicted_start_ms=None)
END = EndFrame(
    tokens_in=1,
    tokens_out=2,
    decode_time_ms=3,
    finish_reason=FinishReason.STOP,
    seed=4,
    model_digest="sha256:0",
    engine="simulated",
    engine_version="1",
    sampler_profile_version="v1",
    kv_warmth=False,
)


def a_metrics_frame(tokens_out: int = 0) -> MetricsFrame:
    return MetricsFrame(
        queue_depth=0,
        queue_position=None,
        predicted_start_ms=None,
        tokens_in=1,
        tokens_out=tokens_out,
        on_time_probability=None,
        kv_warmth=False,
        tokens_budget_remaining=None,
        time_budget_remaining_ms=None,
        cost_budget_remaining=None,
    )


def open_reader(stream: TaskStream, after: int = -1) -> Reader:
    return stream.open(after, correlation_id="c-1", on_close=lambda: None)


@pytest.mark.spec("HP-STR-7")
def test_late_reader_reads_the_same_bytes_as_the_live_one() -> None:
    """A stream opened late replays exactly what a live reader got."""

    async def scenario() -> tuple[bytes, bytes]:
        stream = TaskStream(STARTED)
        live = asyncio.ensure_future(read_all(open_reader(stream)))
        for word in ("Once", " upon", " a", " time"):
            await asyncio.sleep(1)
            stream.token(word)
        stream.end(END)
        return await live, await read_all(open_reader(stream))

    live, late = run(scenario())
    assert live == late
    check_order(parse(late))


@pytest.mark.spec("HP-STR-7")
def test_last_event_id_continues_behind_it() -> None:
    """A reader that comes back gets every frame behind the one it names, and none before."""

    async def scenario() -> bytes:
        stream = TaskStream(STARTED)
        for word in "abcde":
            stream.token(word)
        stream.end(END)
        return await read_all(open_reader(stream, after=3))

    frames = parse(run(scenario()))
    assert [frame.number for frame in frames] == [4, 5, 6]
    assert text(frames) == "de"


@pytest.mark.spec("HP-STR-1", "HP-STR-6")
def test_nothing_follows_the_last_frame() -> None:
    """Tokens that an engine still says after the end are dropped; a second last frame is a defect."""
    stream = TaskStream(STARTED)
    stream.token("a")
    stream.end(Canceled("canceled").body("c-1"))
    stream.token("b")
    stream.metrics(a_metrics_frame())
    assert stream.text == "a"
    assert stream.last_number == 2
    with pytest.raises(RuntimeError, match="after the last"):
        stream.end(END)


@pytest.mark.spec("HP-STR-7")
def test_a_long_wait_does_not_grow_the_log() -> None:
    """Of metrics frames in a row only the newest is kept, and a live reader still sees each."""

    async def scenario() -> tuple[int, list[str]]:
        stream = TaskStream(STARTED)
        reader = open_reader(stream)
        seen: list[str] = []
        for second in range(1000):
            stream.metrics(a_metrics_frame(second))
            seen += events(parse(await reader.batch() or b""))
        return stream.size_bytes, seen

    size, seen = run(scenario())
    assert size < 1000
    assert seen.count("metrics") == 1000


@pytest.mark.spec("HP-STR-7")
def test_slow_reader_is_cut_off_with_a_typed_error_and_may_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that falls too far behind gets POLICY_DENIED (slow-reader); with Last-Event-ID it misses nothing."""
    monkeypatch.setattr(streams, "LAG_FRAMES_MAX", 10)

    async def scenario() -> tuple[bytes, bytes | None, bytes]:
        stream = TaskStream(STARTED)
        reader = open_reader(stream)
        await reader.batch()
        waiting = asyncio.ensure_future(reader.batch())
        await asyncio.sleep(0)
        for number in range(20):
            stream.token(str(number))
        cut = await waiting
        stream.end(END)
        return cut or b"", await reader.batch(), await read_all(open_reader(stream, after=0))

    cut, after, again = run(scenario())
    (error,) = parse(cut)
    assert (error.event, error.data["code"], error.data["policy_label"]) == ("error", "POLICY_DENIED", "slow-reader")
    assert "Last-Event-ID: 0" in error.data["message"]
    assert after is None
    assert text(parse(again)) == "".join(map(str, range(20)))


@pytest.mark.spec("HP-STR-7")
def test_replay_of_a_long_stream_is_not_slowness(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that starts far behind gets everything, in batches of bounded size."""
    monkeypatch.setattr(streams, "LAG_FRAMES_MAX", 10)

    async def scenario() -> list[int]:
        stream = TaskStream(STARTED)
        for number in range(1000):
            stream.token(str(number))
        stream.end(END)
        reader, sizes = open_reader(stream), []
        while (batch := await reader.batch()) is not None:
            sizes.append(len(parse(batch)))
        return sizes

    sizes = run(scenario())
    assert sum(sizes) == 1002
    assert max(sizes) <= streams.BATCH_FRAMES_MAX


def test_closing_a_waiting_reader_ends_it_and_reports_once() -> None:
    """close() wakes the reader, and tells its owner exactly once."""

    async def scenario() -> tuple[bytes | None, int]:
        closed: list[None] = []
        reader = TaskStream(STARTED).open(0, correlation_id="c-1", on_close=lambda: closed.append(None))
        waiting = asyncio.ensure_future(reader.batch())
        await asyncio.sleep(0)
        reader.close()
        reader.close()
        return await waiting, len(closed)

    assert run(scenario()) == (None, 1)


@pytest.mark.spec("HP-STR-5")
@given(st.lists(st.text(min_size=1), max_size=20))
@settings(derandomize=True, deadline=None, database=None, max_examples=50)
def test_any_text_survives_the_framing(words: list[str]) -> None:
    """Line ends, controls and quotes inside a token never break a frame (HP-STR-5)."""
    stream = TaskStream(STARTED)
    try:
        for word in words:
            stream.token(word)
    except UnicodeEncodeError:  # a lone surrogate is no text; engines decode UTF-8 and cannot make one
        return
    frames = parse(b"".join(frame.data for frame in stream.after(-1)))
    assert [frame.data["t"] for frame in frames[1:]] == words
    assert msgspec.json.decode(msgspec.json.encode(stream.text)) == "".join(words)
