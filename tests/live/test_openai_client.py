"""OpenAI's own client, as it comes from PyPI, against the service on both engines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest

import openai
from openai import AsyncOpenAI, OpenAI
from tests.live.client import LIMIT_S, open_client, until
from tests.live.models import a_model, held_load, long_task, ref, simulated, task
from tests.live_service import LiveService, live_service

pytestmark = pytest.mark.xdist_group("live-openai")

ENGINES = {"default": "llamacpp", "second": "ctransformers"}
both = pytest.mark.parametrize("pool", ENGINES)
STORY: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 24, "seed": 7}
ASKED: dict[str, Any] = {
    "model": "default",
    "messages": [{"role": "user", "content": "Tell me a story about a brave fox."}],
    "max_completion_tokens": 12,
    "seed": 7,
}


def a_client(service: LiveService, **options: Any) -> OpenAI:
    return OpenAI(base_url=f"{service.url}/v1", api_key=service.token, **{"timeout": LIMIT_S, **options})


@pytest.fixture(scope="module")
def client(service: LiveService) -> Iterator[OpenAI]:
    with a_client(service) as client:
        yield client


@pytest.fixture
def ours(service: LiveService) -> Iterator[httpx.Client]:
    """The first door."""
    with open_client(service) as client:
        yield client


@pytest.mark.spec("HP-OAI-1")
def test_models_are_listed(client: OpenAI) -> None:
    """Pools and what they serve; each of them can be read and used."""
    found = {model.id: model.owned_by for model in client.models.list()}
    assert found == {**ENGINES, "builtin:tiny": "llamacpp"}
    assert client.models.retrieve("builtin:tiny").id == "builtin:tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


@pytest.mark.spec("HP-OAI-1", "HP-OAI-2", "HP-OAI-5")
def test_a_chat_is_a_task(client: OpenAI, ours: httpx.Client) -> None:
    """The answer is the text of a task that the other door shows, with its seed and its tokens."""
    raw = client.chat.completions.with_raw_response.create(**ASKED)
    answer = raw.parse()
    seen = task(ours, raw.headers["X-Task-Id"])
    assert answer.choices[0].message.content == seen["text"] != ""
    assert (seen["state"], seen["seed"], seen["priority"]) == ("succeeded", 7, "interactive")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (seen["tokens_in"], seen["tokens_out"])
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.spec("HP-OAI-2")
def test_a_conversation_goes_on_with_our_own_answer(client: OpenAI) -> None:
    """The message comes back as the client's object has it; parts of text are a text."""
    first = client.chat.completions.create(**ASKED).choices[0].message
    parts = [{"type": "text", "text": "And"}, {"type": "text", "text": "then?"}]
    messages: Any = [*ASKED["messages"], first, {"role": "user", "content": parts}]
    answer = client.chat.completions.create(**{**ASKED, "messages": messages})
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 12 + 12


@both
@pytest.mark.spec("HP-OAI-3")
def test_a_stream_is_the_same_text(client: OpenAI, pool: str) -> None:
    """Piece by piece what the whole answer has, one reason, and the usage in the last chunk."""
    whole = client.completions.create(model=pool, **STORY)
    chunks = list(client.completions.create(model=pool, **STORY, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text != ""
    assert len(chunks) > 5
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == whole.choices[0].finish_reason == "length"
    assert set(reasons[:-1]) == {None}
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


@pytest.mark.spec("HP-OAI-3")
def test_a_chats_stream_begins_with_the_role(client: OpenAI) -> None:
    """And says what the whole answer says."""
    whole = client.chat.completions.create(**ASKED)
    chunks = list(client.chat.completions.create(**ASKED, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert [chunk.usage for chunk in chunks] == [None] * len(chunks)


@both
@pytest.mark.spec("HP-OAI-2", "HP-DET-1")
def test_a_seed_repeats_the_answer_and_a_stop_ends_it(client: OpenAI, pool: str) -> None:
    """The same text twice, from the same fingerprint; a stop text ends it and is no part of it."""
    one, other = (client.completions.create(model=pool, **STORY, temperature=0.9, top_p=0.9) for _ in range(2))
    assert (one.choices[0].text, one.system_fingerprint) == (other.choices[0].text, other.system_fingerprint)
    word = one.choices[0].text.split()[3]
    for stop in (word, [word, "\0"]):
        ended = client.completions.create(model=pool, **STORY, temperature=0.9, top_p=0.9, stop=stop)
        assert ended.choices[0].finish_reason == "stop"
        assert ended.choices[0].text == one.choices[0].text.partition(word)[0]


@pytest.mark.spec("HP-OAI-2")
def test_an_answer_in_a_form(client: OpenAI) -> None:
    """`response_format` on the engine that can; the other one refuses it before the queue."""
    schema = {"type": "object", "properties": {"brave": {"type": "boolean"}}, "required": ["brave"]}
    schema["additionalProperties"] = False
    form: Any = {"type": "json_schema", "json_schema": {"name": "fox", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(**{**ASKED, "max_completion_tokens": 64}, response_format=form)
    assert isinstance(json.loads(answer.choices[0].message.content or "")["brave"], bool)
    with pytest.raises(openai.BadRequestError, match="json_schema"):
        client.chat.completions.create(**{**ASKED, "model": "second"}, response_format=form)


@pytest.mark.spec("HP-OAI-1", "HP-OAI-2")
def test_vectors(client: OpenAI) -> None:
    """The client asks for base64 where nothing is said, and has the same numbers either way."""
    texts = ["a red fox", "an old dog"]
    packed = client.embeddings.create(model="second", input=texts)
    plain = client.embeddings.create(model="second", input=texts, encoding_format="float")
    assert [one.embedding for one in packed.data] == [pytest.approx(one.embedding, abs=1e-6) for one in plain.data]
    assert [sum(x * x for x in one.embedding) for one in packed.data] == [pytest.approx(1.0, abs=1e-3)] * 2
    with pytest.raises(openai.BadRequestError, match="second"):
        client.embeddings.create(model="default", input="a red fox")


@pytest.mark.spec("HP-OAI-2", "HP-OAI-4")
def test_what_is_not_offered_is_an_error_with_its_name(client: OpenAI) -> None:
    """Of the client's own kind, and not tried again."""
    tool: Any = {"type": "function", "function": {"name": "look", "parameters": {}}}
    for changes, param in (({"tools": [tool]}, "tools"), ({"extra_body": {"min_pee": 1}}, "min_pee"), ({"n": 2}, "n")):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**ASKED, **changes)
        assert (caught.value.param, caught.value.code) == (param, "INVALID_PARAMS")
    with pytest.raises(openai.NotFoundError, match="builtin:tiny"):
        client.chat.completions.create(**{**ASKED, "model": "gpt-4"})


@pytest.mark.spec("HP-OAI-4")
def test_a_wrong_token_is_an_error_of_its_own(service: LiveService) -> None:
    """As the client has it for that."""
    stranger = OpenAI(base_url=f"{service.url}/v1", api_key="wrong-wrong-wrong-wrong")
    with stranger, pytest.raises(openai.AuthenticationError) as caught:
        stranger.models.list()
    assert caught.value.code == "UNAUTHORIZED"


@pytest.mark.spec("HP-OAI-5")
def test_our_headers_are_honoured(client: OpenAI, ours: httpx.Client) -> None:
    """The task has the priority and the session; `user` names one too."""
    session_id = "7a1d0f3c-5b2e-4f6a-8c9d-1e2f3a4b5c6d"
    headers = {"X-Priority": "batch", "X-Session-Id": session_id, "X-Determinism": "best_effort"}
    raw = client.chat.completions.with_raw_response.create(**ASKED, extra_headers=headers)
    seen = task(ours, raw.headers["X-Task-Id"])
    assert (seen["priority"], seen["session_id"]) == ("batch", session_id)
    client.chat.completions.create(**ASKED, user=session_id)
    assert ours.get(f"/v1/sessions/{session_id}").json()["turns"] == 2


@pytest.mark.spec("HP-OAI-6")
def test_leaving_a_stream_cancels_a_task_that_waits(client: OpenAI, ours: httpx.Client) -> None:
    """Behind one that goes on and on."""
    blocker = long_task(ours)
    raw = client.completions.with_raw_response.create(model="default", prompt="Once", stream=True)
    raw.parse().close()
    until(lambda: task(ours, raw.headers["X-Task-Id"])["state"] == "canceled")
    ours.post(f"/v1/tasks/{blocker}/cancel")


@pytest.mark.spec("HP-OAI-6")
def test_leaving_a_stream_cancels_a_task_that_runs(tmp_path: Path) -> None:
    """After its first token, of some thousand that take half a minute."""
    file = tmp_path / "simulated.gguf"
    file.touch()
    card = {"id": "card", "backend": "simulated", "vram_bytes": 24 << 30}
    pool = {"id": "slow", "engine": "simulated", "model": ref(file), "slots": 1}
    with live_service({"devices": [card], "pools": [pool]}) as service, open_client(service) as ours:
        with a_client(service) as client:
            raw = client.completions.with_raw_response.create(model="slow", prompt="x", max_tokens=1500, stream=True)
            stream = raw.parse()
            next(stream)
            stream.close()
        until(lambda: task(ours, raw.headers["X-Task-Id"])["state"] == "canceled")


@pytest.mark.spec("HP-OAI-6")
def test_a_timeout_cancels_the_task(service: LiveService, ours: httpx.Client) -> None:
    """Of a client that waits for the whole answer, behind a task that goes on and on."""
    blocker = long_task(ours)
    with a_client(service, timeout=0.5, max_retries=0) as hasty, pytest.raises(openai.APITimeoutError):
        hasty.completions.create(model="default", prompt="Once", seed=4321)
    until(lambda: _state_of_seed(ours, 4321) == "canceled")
    ours.post(f"/v1/tasks/{blocker}/cancel")


def _state_of_seed(ours: httpx.Client, seed: int) -> str | None:
    found = [one["state"] for one in ours.get("/v1/tasks").json()["items"] if one["seed"] == seed]
    return found[0] if found else None


def test_the_asynchronous_client(service: LiveService, client: OpenAI) -> None:
    """Streams side by side are what the other client gets; leaving works as well."""

    async def several() -> list[str]:
        async with AsyncOpenAI(base_url=f"{service.url}/v1", api_key=service.token, timeout=LIMIT_S) as waiting:

            async def one(seed: int) -> str:
                stream = await waiting.completions.create(model="default", **{**STORY, "seed": seed}, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return list(await asyncio.gather(*(one(seed) for seed in range(3))))

    texts = [client.completions.create(model="default", **{**STORY, "seed": n}).choices[0].text for n in range(3)]
    assert asyncio.run(several()) == texts
    assert len(set(texts)) == 3


@pytest.mark.spec("HP-OAI-4", "HP-ERR-2")
def test_a_full_queue_is_waited_out(tmp_path: Path) -> None:
    """429 and its Retry-After: the client's own retry comes again, and is served once there is room."""
    file = tmp_path / "simulated.gguf"
    file.touch()
    card = {"id": "card", "backend": "simulated", "vram_bytes": 24 << 30}
    pool = {"id": "full", "engine": "simulated", "model": ref(file), "slots": 1, "queue": {"capacity": 0}}
    with live_service({"devices": [card], "pools": [pool]}) as service, open_client(service) as ours:
        until(lambda: ours.get("/v1/pools/full").json()["ready"])
        blocker = ours.post("/v1/tasks", json={"model_ref": ref(file), "prompt": "x", "max_tokens": 2000}).json()
        with a_client(service, max_retries=0) as hasty, pytest.raises(openai.RateLimitError) as caught:
            hasty.completions.create(model="full", prompt="Once", max_tokens=4)
        assert caught.value.code == "ADMISSION_REJECT"
        assert int(caught.value.response.headers["Retry-After"]) >= 1
        freed = Event()

        def free_after_a_refusal(response: Any) -> None:
            if response.status_code == 429 and not freed.is_set():
                ours.post(f"/v1/tasks/{blocker['task_id']}/cancel")
                freed.set()

        http = openai.DefaultHttpxClient(event_hooks={"response": [free_after_a_refusal]})
        with a_client(service, max_retries=20, http_client=http) as patient:
            answer = patient.completions.create(model="full", prompt="Once", max_tokens=4)
        assert freed.is_set()
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 4


@pytest.mark.spec("HP-OAI-7")
def test_a_stream_outlives_a_load(tmp_path: Path, llama_server: Path) -> None:
    """Loads take longer than the client's patience with silence, and comments keep it: for a prompt, which waits in the
    queue, and for a chat, which cannot be judged before the model is there."""
    engine = {"llamacpp": {"launcher": "binary", "binary": str(llama_server)}}
    models = [a_model(tmp_path, name) for name in ("prompt", "chat")]
    settings = {
        "devices": simulated(card=8 << 30),
        "engines": engine,
        "catalog": {"file_roots": [str(tmp_path)]},
    }
    with live_service(settings) as service, open_client(service) as ours:
        for model, path, body in zip(models, ("completions", "chat/completions"), (STORY, ASKED), strict=True):
            with held_load(model) as let_go:
                patience_s = httpx.Timeout(LIMIT_S, read=3.0)
                asked = {**body, "model": ref(model), "stream": True}
                with ours.stream("POST", f"/v1/{path}", json=asked, timeout=patience_s) as answer:
                    lines = answer.iter_lines()
                    comments = [next(line for line in lines if line.startswith(":")) for _ in range(5)]
                    let_go()
                    rest = list(lines)
            assert all("waiting" in comment for comment in comments)
            assert "data: [DONE]" in rest
            assert any('"finish_reason":"length"' in line for line in rest)
