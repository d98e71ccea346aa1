"""Tools and likelihoods through OpenAI's own client, with real llama.cpp behind templates as they are published."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema_rs
import pytest

import openai
from openai import OpenAI
from tests.live.client import LIMIT_S, finish, open_client, until
from tests.live.models import ref
from tests.live_service import live_service
from tests.tool_models import HERMES, TEMPLATES, a_tool_model

pytestmark = [pytest.mark.xdist_group("live-tools"), pytest.mark.spec("HP-OAI-8")]

CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "How it will be", "parameters": CITY}},
    {"type": "function", "function": {"name": "wait"}},
]
ASKED: list[Any] = [{"role": "user", "content": "Tell me a story."}]
NAMED: Any = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("models")
    files = {name: a_tool_model(folder / f"{name}.gguf", template) for name, template in TEMPLATES.items()}
    files["calling"] = a_tool_model(folder / "calling.gguf", HERMES, says="<tool_call>")
    pools: list[dict[str, Any]] = [{"id": name, "model": ref(file), "slots": 1} for name, file in files.items()]
    pools += [{"id": "default", "slots": 1}, {"id": "second", "engine": "ctransformers", "slots": 1}]
    with live_service({"pools": pools}) as running, open_client(running) as client:
        until(lambda: all(pool["ready"] for pool in client.get("/v1/pools").json()["items"]))
        yield client


@pytest.fixture(scope="module")
def client(service: httpx.Client) -> Iterator[OpenAI]:
    key = service.headers["Authorization"].removeprefix("Bearer ")
    with OpenAI(base_url=f"{service.base_url}/v1", api_key=key, timeout=LIMIT_S, max_retries=0) as client:
        yield client


def chat(client: OpenAI, model: str, **changes: Any) -> Any:
    fields = {"model": model, "messages": ASKED, "tools": TOOLS, "seed": 7, "max_tokens": 200, **changes}
    return client.chat.completions.create(**fields)


def in_pieces(client: OpenAI, model: str, **changes: Any) -> tuple[str, list[list[str]], str]:
    """Of a stream: the text, ID, name and arguments of each call, and how it ended."""
    text, calls, end = "", [], ""
    for chunk in chat(client, model, stream=True, **changes):
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        for piece in choice.delta.tool_calls or ():
            if piece.id:
                calls.append([piece.id, piece.function.name, ""])
            calls[piece.index][2] += piece.function.arguments
        end = choice.finish_reason or end
    return text, calls, end


@pytest.mark.parametrize("model", TEMPLATES)
def test_a_call_that_is_asked_for_is_made(client: OpenAI, model: str) -> None:
    """Of the named function, with arguments of its schema, in each form that is known; the same in pieces."""
    for seed in range(2):
        asked = {"tool_choice": NAMED, "parallel_tool_calls": False, "seed": seed}
        whole = chat(client, model, **asked).choices[0]
        (call,) = whole.message.tool_calls
        assert (whole.finish_reason, whole.message.content, call.function.name) == ("tool_calls", None, "weather")
        jsonschema_rs.validate(CITY, json.loads(call.function.arguments))
        text, ((call_id, name, arguments),), end = in_pieces(client, model, **asked)
        assert (text, name, arguments, end) == ("", "weather", call.function.arguments, "tool_calls")
        assert len(call_id) == 9


def test_a_model_that_calls_by_itself_is_heard(client: OpenAI) -> None:
    """Its mark is a control token, which llama.cpp leaves out of texts by default. Where none is to be called, the same
    model has an answer."""
    text, calls, end = in_pieces(client, "calling")
    assert (text, end, {name for _, name, _ in calls} <= {"weather", "wait"}) == ("", "tool_calls", True)
    assert chat(client, "calling", tool_choice="none").choices[0].message.tool_calls is None


@pytest.mark.parametrize("model", TEMPLATES)
def test_a_model_that_does_not_call_has_its_answer(client: OpenAI, model: str) -> None:
    """A story, in all its length, as a task of the first door has it."""
    whole = chat(client, model, max_tokens=24).choices[0]
    assert (whole.finish_reason, whole.message.tool_calls) == ("length", None)
    assert whole.message.content
    assert in_pieces(client, model, max_tokens=24) == (whole.message.content, [], "length")


@pytest.mark.parametrize("model", TEMPLATES)
def test_what_came_of_a_call_goes_back(client: OpenAI, model: str) -> None:
    """The answer as it was, with the tool's message behind it: the template shows both."""
    message = chat(client, model, tool_choice=NAMED, parallel_tool_calls=False).choices[0].message
    alone = chat(client, model, max_tokens=8)
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain and fog"}
    after = chat(client, model, max_tokens=8, messages=[*ASKED, message, result])
    assert after.choices[0].message.content
    assert after.usage.prompt_tokens > alone.usage.prompt_tokens + 10


def test_an_answer_in_a_form_may_be_a_call(client: OpenAI) -> None:
    """The form is kept where there is none."""
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    messages = [chat(client, "hermes", response_format=form, seed=seed).choices[0].message for seed in range(4)]
    assert all(message.tool_calls or set(json.loads(message.content)) == {"a"} for message in messages)
    assert in_pieces(client, "calling", response_format=form)[2] == "tool_calls"


@pytest.mark.parametrize(
    ("model", "changes", "param"),
    [
        ("default", {}, "tools"),
        ("second", {}, "tools"),
        ("default", {"tools": None, "messages": [*ASKED, {"role": "tool", "tool_call_id": "a", "content": "x"}]},
         "messages[1].role"),
        ("hermes", {"tools": [TOOLS[1], TOOLS[1]]}, "tools"),
        ("hermes", {"tools": [{"type": "function", "function": {"name": "x", "parameters": {"not": {}}}}]}, "tools"),
        ("second", {"tools": None, "logprobs": True}, "logprobs"),
        ("hermes", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(client: OpenAI, model: str, changes: Any, param: str) -> None:
    """By the model's template, by its engine, or by what is asked."""
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, model, **changes)
    assert caught.value.param == param


def test_a_task_has_the_calls_beside_its_text(service: httpx.Client) -> None:
    """The first door: the answer as the model wrote it, and what each piece of it adds to which call."""
    model = service.get("/v1/pools/hermes").json()["model"]
    tools = {"functions": [{"name": "wait"}], "choice": "required", "parallel": False}
    frames = [
        frame.data for frame in finish(service, model_ref=model, messages=ASKED, tools=tools) if frame.event == "token"
    ]
    assert "".join(frame["t"] for frame in frames) == '<tool_call>\n{"name": "wait", "arguments": {}}\n</tool_call>'
    pieces = [piece for frame in frames for piece in frame["tool_calls"]]
    assert pieces[0]["name"] == "wait"
    assert "".join(piece.get("arguments", "") for piece in pieces) == "{}"


@pytest.mark.parametrize("model", TEMPLATES)
def test_the_template_shows_the_tools(client: OpenAI, model: str) -> None:
    """The model reads all that they say, also what grammars of llama.cpp cannot do, such as a schema that is part
    of itself."""
    tree = {"type": "object", "properties": {"left": {"$ref": "#"}, "word": {"type": "string", "maxLength": 3}}}
    tool = {"type": "function", "function": {"name": "grow", "description": "many words " * 40, "parameters": tree}}
    without = chat(client, model, max_tokens=1, tools=None).usage.prompt_tokens
    assert chat(client, model, max_tokens=1, tools=[tool]).usage.prompt_tokens > without + 80


# -- likelihoods -----------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-OAI-9")
def test_tokens_tell_how_likely_they_were(client: OpenAI) -> None:
    """The likeliest is taken at temperature 0; the bytes are the text; whole and in chunks they are the same."""
    asked: Any = {"tools": None, "logprobs": True, "top_logprobs": 3, "temperature": 0, "max_tokens": 12}
    whole = chat(client, "default", **asked).choices[0]
    tokens = whole.logprobs.content
    assert len(tokens) == 12
    assert bytes(byte for one in tokens for byte in one.bytes).decode() == whole.message.content
    for one in tokens:
        assert (one.token, one.logprob) == (one.top_logprobs[0].token, one.top_logprobs[0].logprob)
        assert [other.logprob for other in one.top_logprobs] == sorted(
            (o.logprob for o in one.top_logprobs), reverse=True
        )
        assert len(one.top_logprobs) == 3
    chunks = chat(client, "default", stream=True, **asked)
    assert [one for chunk in chunks if (told := chunk.choices[0].logprobs) for one in told.content] == tokens


@pytest.mark.spec("HP-OAI-9")
def test_the_bytes_of_tokens_are_the_text(client: OpenAI) -> None:
    """Where a character is several tokens, and where a stop text is held back or cut off."""
    words: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["né €5 日本"]}}}
    asked: Any = {"tools": None, "logprobs": True, "max_tokens": 60}
    for changes in ({"response_format": words}, {"stop": ["the"]}, {"stop": [" a time", "Once upon a tims"]}):
        whole = chat(client, "default", **asked, **changes).choices[0]
        assert bytes(byte for one in whole.logprobs.content for byte in one.bytes).decode() == whole.message.content
        assert whole.message.content
        assert all(one.token and one.logprob <= 0 and one.top_logprobs == [] for one in whole.logprobs.content)


@pytest.mark.spec("HP-OAI-9")
def test_a_completion_tells_places(client: OpenAI) -> None:
    """Each token where it begins in the text, whole and in chunks."""
    asked: Any = {"model": "default", "prompt": "Once upon", "logprobs": 2, "max_tokens": 10, "seed": 7}
    whole = client.completions.create(**asked).choices[0]
    told = whole.logprobs
    assert told is not None
    assert told.tokens
    assert told.text_offset
    assert "".join(told.tokens) == whole.text
    assert [
        whole.text[at:][: len(token)] for at, token in zip(told.text_offset, told.tokens, strict=True)
    ] == told.tokens
    chunks = [one for chunk in client.completions.create(stream=True, **asked) if (one := chunk.choices[0].logprobs)]
    assert [at for one in chunks for at in one.text_offset or ()] == told.text_offset


@pytest.mark.spec("HP-OAI-9")
def test_more_likelihoods_than_a_stream_keeps_are_refused(service: httpx.Client) -> None:
    """By their number, before anything runs."""
    body = {"model_ref": "builtin:tiny", "inputs": ["x"] * 256, "max_tokens": 1000, "logprobs": 20}
    answer = service.post("/v1/tasks", json=body)
    assert (answer.status_code, answer.json()["code"]) == (400, "INVALID_PARAMS")
    assert "`logprobs`" in answer.json()["message"]
