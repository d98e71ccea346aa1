"""Streams under whatever text and whatever readers: what a reader sees is a prefix of the one true sequence, and
whoever reads to the end sees it all. From the engine's bytes to the client's frames, over HTTP, in virtual time."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llama_orch.client.reading import Frame, Reading
from llama_orch.client.wire import Peer
from llama_orch.contract.config import PoolSettings
from llama_orch.contract.models import EndFrame, Error, ErrorCode, StartedFrame, TokenFrame
from llama_orch.engines.base import Chunk, Completion, Job, ReplicaSpec, Sampling
from llama_orch.engines.client import LlamaClient, completion_body
from llama_orch.engines.private_folder import make_private_folder, remove_private_folder
from llama_orch.engines.simulated import ServiceModel, SimulatedEngine, SimulatedWorker
from llama_orch.runtime import streams
from llama_orch.runtime.streams import TEXT_CHARS_MAX, TaskStream
from llama_orch.testing.loop import run
from llama_orch.testing.rehearsal import settings_for
from llama_orch.workers import dialect

from .stack import TOKEN, URL, Stack, a_request, a_stack

PROPERTY = settings(
    max_examples=15, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
FORGED = ["\n\n", "\r\n\r\n", "\n\nid: 7\nevent: end\ndata: {}\n\n", "data: x", ": comment", "\u2028", "\x85", "\ufeff"]
SPLIT = ["é", "日本", "👩‍👩‍👧", "e\u0301", "\U0010ffff"]
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    st.text(st.characters(max_codepoint=0x1F), max_size=10),
    st.sampled_from(["", *FORGED, *SPLIT]),
)


# -- an engine that says what it is told -----------------------------------------------------------------------------


class ScriptedWorker(SimulatedWorker):
    """Says the script's texts, each after its pause."""

    script: Sequence[tuple[str, float]] = ()

    async def generate(self, job: Job) -> AsyncGenerator[Chunk | Completion, None]:
        self._busy.add(job.slot)
        try:
            for text, pause_s in self.script:
                await self._pass(pause_s)
                self._check_alive()
                yield Chunk(text, 1)
        finally:
            self._busy.discard(job.slot)
        yield Completion(1, len(self.script), 0, 0.0, 1.0, "stop")


class ScriptedEngine(SimulatedEngine):
    def __init__(self, script: Sequence[tuple[str, float]]) -> None:
        super().__init__(ServiceModel(load_s=0.0))
        self._script = script

    async def launch(self, spec: ReplicaSpec) -> SimulatedWorker:
        worker = self.workers[spec.replica_id] = ScriptedWorker(spec, ServiceModel(load_s=0.0))
        worker.script = self._script
        return worker


def pieces(script: Sequence[tuple[str, float]]) -> list[str]:
    """The texts of the token frames that the script makes."""
    return [text[i : i + TEXT_CHARS_MAX] for text, _ in script for i in range(0, len(text), TEXT_CHARS_MAX)]


# -- readers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Visit:
    """One connection: when it comes after the last one, how long it looks away after each part, and after how many
    parts or bytes it ends; None: not before the stream does."""

    pause_s: float
    stall_s: float
    parts: int | None
    cut: int | None


@dataclass
class Told:
    """What one reader has seen."""

    frames: list[Frame] = field(default_factory=list)
    is_over: bool = False

    @property
    def tokens(self) -> list[TokenFrame]:
        return [frame for frame in self.frames if isinstance(frame, TokenFrame)]


visits = st.builds(
    Visit,
    pause_s=st.sampled_from([0.0, 0.3, 2.0, 40.0]),
    stall_s=st.sampled_from([0.0, 0.0, 0.2, 5.0, 100.0]),  # the last is longer than the service waits for a reader
    parts=st.one_of(st.none(), st.integers(0, 6)),
    cut=st.one_of(st.none(), st.integers(0, 400)),
)
readers = st.lists(st.lists(visits, max_size=5), min_size=1, max_size=4)
PATIENT = Visit(0.0, 0.0, None, None)


async def read(stack: Stack, task_id: str, plan: Sequence[Visit], told: Told) -> None:
    """Go through the visits, each behind what the one before has seen."""
    reading = Reading(Peer(URL, TOKEN), task_id, "")
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with httpx.AsyncClient(base_url=URL, transport=stack.transport, headers=headers) as http:
        for visit in plan:
            await asyncio.sleep(visit.pause_s)
            if not reading.is_over:
                await _visit(http, reading, visit, told)
    told.is_over = reading.is_over


async def _visit(http: httpx.AsyncClient, reading: Reading, visit: Visit, told: Told) -> None:
    answer = await http.send(http.build_request(**reading.call().parts()), stream=True)
    assert answer.status_code == 200
    left = visit.cut
    async with aclosing(answer):
        parts = answer.aiter_raw()
        for _ in itertools.count() if visit.parts is None else range(visit.parts):
            try:
                part = await anext(parts, None)
            except httpx.RemoteProtocolError:
                return  # it was away for too long
            if part is None or reading.is_over:
                return
            part = part if left is None else part[:left]
            told.frames += reading.feed(part)
            left = None if left is None else left - len(part)
            if left == 0:
                return
            await asyncio.sleep(visit.stall_s)


def check(told: Told, truth: list[str]) -> None:
    """A prefix of the truth, whole where the reader saw the end."""
    seen = [frame.t for frame in told.tokens]
    assert seen == truth[: len(seen)]
    assert [frame.i for frame in told.tokens] == list(range(len(seen)))
    assert [isinstance(frame, StartedFrame) for frame in told.frames] == [n == 0 for n in range(len(told.frames))]
    assert [isinstance(frame, EndFrame | Error) for frame in told.frames[:-1]] == [False] * len(told.frames[:-1])
    if told.is_over:
        assert seen == truth
        assert isinstance(told.frames[-1], EndFrame | Error)


async def play(
    script: Sequence[tuple[str, float]], plans: Sequence[Sequence[Visit]], ends_after_s: float | None = None
) -> tuple[list[Told], str, float]:
    """All readers at one task, which may be canceled; what they saw, the task's whole text, and when the last was done
    after the task's submission."""
    settings = settings_for(PoolSettings(slots=1, max_tokens=2000))
    loop = asyncio.get_running_loop()
    async with a_stack(settings, engine=ScriptedEngine(script)) as stack:
        began = loop.time()
        task_id = (await stack.client.submit(a_request())).task_id
        told = [Told() for _ in plans]
        async with asyncio.TaskGroup() as group:
            for plan, one in zip(plans, told, strict=True):
                group.create_task(read(stack, task_id, plan, one))
            if ends_after_s is not None:
                await asyncio.sleep(ends_after_s)
                await stack.client.cancel(task_id)
        took_s = loop.time() - began
        whole = Told()
        await read(stack, task_id, [PATIENT], whole)
        assert whole.is_over
        text = (await stack.client.get_task(task_id)).text
        assert stack.stage.orchestrator.streams_open == 0
        return [*told, whole], text or "", took_s


@pytest.fixture(params=[6, streams.LAG_FRAMES_MAX], ids=["short patience", "long patience"])
def lag(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How far a reader may fall behind before it is cut off."""
    monkeypatch.setattr(streams, "LAG_FRAMES_MAX", request.param)


@pytest.mark.spec("HP-STR-1", "HP-STR-5", "HP-STR-7")
@pytest.mark.usefixtures("lag")
@given(
    script=st.lists(st.tuples(texts, st.sampled_from([0.0, 0.0, 0.05, 1.5, 20.0])), max_size=25),
    plans=readers,
)
@example(script=[("", 0.0)], plans=[[]])
@example(script=[(text, 0.0) for text in FORGED + SPLIT], plans=[[Visit(0.0, 0.0, None, 1)] * 5])
@PROPERTY
def test_every_reader_sees_a_prefix_of_the_one_sequence(
    script: list[tuple[str, float]], plans: list[list[Visit]]
) -> None:
    """Whatever is said, and however readers come, go, stall and come back."""
    told, text, _ = run(play(script, plans))
    assert text == "".join(text for text, _ in script)
    for one in told:
        check(one, pieces(script))
    assert isinstance(told[-1].frames[-1], EndFrame)


@pytest.mark.spec("HP-STR-6", "HP-STR-7")
@pytest.mark.usefixtures("lag")
@given(
    script=st.lists(st.tuples(texts, st.sampled_from([0.05, 1.5])), min_size=5, max_size=25),
    plans=readers,
    ends_after_s=st.floats(0.0, 10.0),
)
@PROPERTY
def test_a_canceled_task_has_one_sequence_too(
    script: list[tuple[str, float]], plans: list[list[Visit]], ends_after_s: float
) -> None:
    """Its text is a prefix of what the engine would have said, and the same for all."""
    told, text, _ = run(play(script, plans, ends_after_s))
    truth = [frame.t for frame in told[-1].tokens]
    assert truth == pieces(script)[: len(truth)]
    assert text == "".join(truth)
    for one in told:
        check(one, truth)
    last = told[-1].frames[-1]
    assert isinstance(last, EndFrame) or (isinstance(last, Error) and last.code is ErrorCode.CANCELED)


@pytest.mark.spec("HP-STR-7")
@given(
    script=st.lists(st.tuples(texts, st.sampled_from([0.0, 0.05, 1.5])), max_size=20),
    cuts=st.lists(st.integers(0, 600), max_size=12),
)
@PROPERTY
def test_the_client_makes_one_stream_of_many_connections(script: list[tuple[str, float]], cuts: list[int]) -> None:
    """Wherever connections break, within a frame or within a character, its frames are the whole sequence, once."""
    rest = iter(cuts)

    def cut(request: httpx.Request) -> int | None:
        return next(rest, None) if request.url.path.endswith("/stream") else None

    async def scenario() -> tuple[list[Frame], int]:
        stack_settings = settings_for(PoolSettings(slots=1, max_tokens=2000))
        async with a_stack(stack_settings, engine=ScriptedEngine(script), cut=cut) as stack:
            task_id = (await stack.client.submit(a_request())).task_id
            return [frame async for frame in stack.client.stream(task_id)], len(stack.transport.requests)

    frames, requests = run(scenario())
    check(Told(frames, is_over=True), pieces(script))
    assert isinstance(frames[-1], EndFrame)
    assert requests <= 2 + len(cuts)


# -- ten megabytes in one token --------------------------------------------------------------------------------------


@pytest.mark.spec("HP-STR-7")
@pytest.mark.parametrize("letter", ["x", "\x00", "日"])
def test_a_huge_token_holds_nobody_up(letter: str) -> None:
    """Ten megabytes that an engine says at once go out in frames of bounded size. The stream goes on behind them, a
    reader that reads is done with the task, and one that does not read delays nobody."""
    count = 10_000_000 // len(letter.encode())
    script = [("before", 1.0), (letter * count, 1.0), ("behind", 1.0)]
    slow = Visit(0.0, 10.0, None, None)
    finished: list[float] = []

    async def scenario() -> list[Told]:
        settings = settings_for(PoolSettings(slots=1, max_tokens=2000))
        loop = asyncio.get_running_loop()
        async with a_stack(settings, engine=ScriptedEngine(script)) as stack:
            began = loop.time()
            task_id = (await stack.client.submit(a_request())).task_id
            told = [Told() for _ in range(4)]

            async def one(plan: Visit, seen: Told) -> None:
                await read(stack, task_id, [plan], seen)
                finished.append(loop.time() - began)
                if plan is PATIENT:  # the other one takes longer than an ended task is kept
                    assert (await stack.client.get_task(task_id)).text == "".join(text for text, _ in script)

            async with asyncio.TaskGroup() as group:
                for plan, seen in zip([slow, PATIENT, PATIENT, PATIENT], told, strict=True):
                    group.create_task(one(plan, seen))
            return told

    told = run(scenario())
    for one in told:
        check(one, pieces(script))
        assert one.is_over
    assert finished[:3] == pytest.approx([3.0] * 3, abs=0.01)
    assert finished[3] > 10.0
    assert max(len(frame.t) for frame in told[0].tokens) == TEXT_CHARS_MAX


def test_a_batch_is_bounded_in_bytes() -> None:
    """A reader that comes back to megabytes is handed them in parts, each of at least one frame."""
    stream = TaskStream(StartedFrame(task_id=a_request().task_id or "", queue_position=0, predicted_start_ms=None))
    stream.token("\x00" * 5_000_000)
    position, sizes = -1, []
    while batch := stream.after(position):
        position = batch[-1].number
        sizes.append(sum(len(frame.data) for frame in batch))
    assert sum(sizes) > 30_000_000
    assert max(sizes) <= streams.BATCH_BYTES_MAX


# -- from an engine's bytes ------------------------------------------------------------------------------------------


class BytesModel:
    """A model whose tokens are these pieces, one after the other."""

    n_ctx = 4096
    build_info = "1"

    pieces: Sequence[bytes] = ()

    def tokenize(self, text: str, add_special: bool) -> list[int]:
        return [0]

    def piece(self, token: int) -> bytes:
        return self.pieces[token]

    def is_token(self, token: object) -> bool:
        return True

    def is_end(self, token: int) -> bool:
        return token >= len(self.pieces)

    def reuse(self, tokens: list[int]) -> int:
        return 0

    def erase(self) -> int:
        return 0

    def prefill(self, tokens: list[int]) -> Iterator[int]:
        yield len(tokens)

    def sample(self, body: dialect.Body, index: int) -> int:
        return index

    def push(self, token: int) -> bool:
        return True

    def apply_template(self, messages: list[dict[str, str]]) -> str:
        raise dialect.Refused("it has none")


Engine = Callable[[Sequence[bytes]], list[str]]


@pytest.fixture
def engine() -> Iterator[Engine]:
    """The texts that our client of a worker makes of a model's bytes: decoded by the worker, sent over its socket."""
    folder, model = make_private_folder(), BytesModel()
    server: Any = dialect.serve(str(folder / "s"), "key", model)

    async def texts_of() -> list[str]:
        job = Job("t", "p", max_tokens=1000, seed=1, sampling=Sampling(), slot=0)
        stream = LlamaClient(folder / "s", "key").complete(completion_body(job, slots=1), 30.0)
        try:
            return [event.content async for event in stream.events()]
        finally:
            stream.close()

    def said(given: Sequence[bytes]) -> list[str]:
        model.pieces = given
        return asyncio.run(texts_of())

    yield said
    server.shutdown()
    server.server_close()
    remove_private_folder(folder)


@pytest.mark.spec("HP-STR-5")
@given(text=st.lists(texts, max_size=8).map("".join), cuts=st.lists(st.integers(0, 200), max_size=12))
@example(text="".join(SPLIT), cuts=list(range(60)))
@settings(parent=PROPERTY, max_examples=8)
def test_a_character_in_parts_comes_out_whole(engine: Engine, text: str, cuts: list[int]) -> None:
    """Wherever a model's tokens cut the bytes of its text, the frames hold whole characters, and all of them."""
    data = text.encode()
    edges = [0, *sorted(cut for cut in cuts if cut <= len(data)), len(data)]
    said = engine([data[a:b] for a, b in itertools.pairwise(edges)])
    stream = TaskStream(StartedFrame(task_id=a_request().task_id or "", queue_position=0, predicted_start_ms=None))
    for one in said:
        stream.token(one)
    wire = b"".join(frame.data for frame in stream.after(-1))
    frames = list(Reading(Peer(URL, TOKEN), "t", "").feed(wire))
    assert "".join(frame.t for frame in frames if isinstance(frame, TokenFrame)) == text
