"""OpenAI's requests become the tasks that they mean, or are refused with the name of what is not offered."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET, Struct

from llama_orch.contract.models import (
    ChatMessage,
    ChatRole,
    Determinism,
    OpenAiChatRequest,
    OpenAiCompletionRequest,
    OpenAiEmbeddingRequest,
    Priority,
    Sampling,
    TaskRequest,
    ToolCall,
    ToolChoice,
    ToolFunction,
    Tools,
    Workload,
)
from llama_orch.errors import InvalidParams
from llama_orch.openai.requests import Extras, Served, chat_task, completion_task, embedding_task
from tests.api.test_schema_equality import SCHEMAS

pytestmark = pytest.mark.spec("HP-OAI-2")

TASK_ID = "3f2b8c1e-9d5a-4c57-8a43-0c7d5b1f2e90"
SESSION_ID = "7a1d0f3c-5b2e-4f6a-8c9d-1e2f3a4b5c6d"
SERVED = Served("builtin:tiny")
PLAIN = Extras()
USER = {"role": "user", "content": "hi"}
CHAT = {"model": "default", "messages": [USER]}
COMPLETION = {"model": "default", "prompt": "Once"}
EMBEDDING = {"model": "default", "input": "Once"}


def task(type_: type[Struct], body: dict[str, Any], extras: Extras = PLAIN, served: Served = SERVED) -> TaskRequest:
    decoded: Any = msgspec.json.decode(json.dumps(body).encode(), type=type_)
    translate: Any = {OpenAiChatRequest: chat_task, OpenAiCompletionRequest: completion_task}.get(type_, embedding_task)
    made: TaskRequest = translate(decoded, extras, served, TASK_ID)
    return made


def chat(extras: Extras = PLAIN, served: Served = SERVED, **changes: Any) -> TaskRequest:
    return task(OpenAiChatRequest, CHAT | changes, extras, served)


def refusal(type_: type[Struct], body: dict[str, Any]) -> InvalidParams:
    with pytest.raises(InvalidParams) as caught:
        task(type_, body)
    return caught.value


# -- what is not offered ---------------------------------------------------------------------------------------------

# Some value of each type that is not among those that change nothing.
WRONG = {
    "integer": 2,
    "number": 0.5,
    "boolean": True,
    "string": "other",
    "object": {"other": "x"},
    "array": [{"other": "x"}],
}


class Field(NamedTuple):
    """One that the document describes as refused, in a body that lacks it."""

    type: type[Struct]
    path: str
    body: dict[str, Any]
    schema: dict[str, Any]

    def given(self, value: Any) -> dict[str, Any]:
        body = json.loads(json.dumps(self.body))
        node = body
        *steps, last = re.findall(r"\w+", self.path)
        for step in steps:
            node = node[int(step) if step.isdigit() else step]
        node[last] = value
        return dict(body)

    def taken(self) -> list[Any]:
        """The values that the description names as changing nothing."""
        words = self.schema["description"].partition("Refused unless it is ")[2].partition(":")[0].rstrip(".")
        if words == "empty":
            return [{"object": {}, "array": [], "string": ""}[self.schema["type"]]]
        return [json.loads(word) if word[0] in "[0123456789tf" else word for word in _values(words)]

    def wrong(self) -> list[Any]:
        kinds = [self.schema["type"]] if "type" in self.schema else [one["type"] for one in self.schema["oneOf"]]
        of_texts = self.schema.get("items", {}).get("type") == "string"
        of_numbers = self.schema.get("additionalProperties") == {"type": "number"}
        return [["other"] if of_texts else {"1": 0.5} if of_numbers else WRONG[kind] for kind in kinds]


def _values(words: str) -> list[str]:
    return [word.strip("` ") for word in words.split(" or ")] if words else []


def refused_fields() -> Iterator[Field]:
    for type_, body in (
        (OpenAiChatRequest, CHAT),
        (OpenAiCompletionRequest, COMPLETION),
        (OpenAiEmbeddingRequest, EMBEDDING),
    ):
        streamed = {**body, "stream": True, "stream_options": {}}
        for name, where, whole in (
            (type_.__name__, "", body),
            *([("OpenAiStreamOptions", "stream_options.", streamed)] if type_ is not OpenAiEmbeddingRequest else []),
            *([("OpenAiMessage", "messages[0].", body)] if type_ is OpenAiChatRequest else []),
        ):
            for field, schema in SCHEMAS[name]["properties"].items():
                if schema.get("description", "").startswith("Refused"):
                    yield Field(type_, where + field, whole, schema)


FIELDS = list(refused_fields())
named = pytest.mark.parametrize("field", FIELDS, ids=lambda field: f"{field.type.__name__}.{field.path}")


def test_the_document_names_what_is_refused() -> None:
    """The descriptions are found, so that the tests below have something to look at."""
    assert len(FIELDS) > 25


@named
def test_what_is_not_offered_is_refused_by_name(field: Field) -> None:
    """Each value that could change the answer, with the field's place as `param`."""
    for value in field.wrong():
        error = refusal(field.type, field.given(value))
        assert error.param == field.path
        assert f"`{field.path}`" in error.message


@named
def test_what_changes_nothing_is_taken(field: Field) -> None:
    """Null, and the values that the description names: the task is the one without the field."""
    without = task(field.type, field.body)
    for value in (None, *field.taken()):
        assert task(field.type, field.given(value)) == without


EFFECTLESS = {
    "user": ["me", None],
    "safety_identifier": ["me"],
    "prompt_cache_key": ["x"],
    "parallel_tool_calls": [True, False],
}


@pytest.mark.parametrize("name", EFFECTLESS)
def test_what_has_no_effect_by_its_nature_is_taken(name: str) -> None:
    """The task is the one without it."""
    assert all(chat(**{name: value}) == chat() for value in EFFECTLESS[name])


def test_stream_options_need_a_stream() -> None:
    """They are about nothing else."""
    error = refusal(OpenAiChatRequest, CHAT | {"stream_options": {"include_usage": True}})
    assert error.param == "stream_options"
    assert chat(stream_options=None) == chat(stream=True, stream_options={"include_usage": True}) == chat()


def test_the_role_of_former_functions_is_refused() -> None:
    """With its place."""
    error = refusal(OpenAiChatRequest, CHAT | {"messages": [USER, {"role": "function", "content": "4"}, USER]})
    assert error.param == "messages[1].role"
    assert "`messages[1].role`" in error.message


# -- what is honoured ------------------------------------------------------------------------------------------------

texts = st.text(max_size=20)
roles = st.sampled_from(["system", "developer", "user", "assistant"])
parts = st.lists(texts, min_size=1, max_size=3)
optional = {
    "temperature": st.none() | st.floats(0, 2),
    "top_p": st.none() | st.floats(0, 1),
    "seed": st.none() | st.integers(0, 2**63 - 1),
    "max_tokens": st.none() | st.integers(1, 2**31 - 1),
    "stop": st.none() | st.text(min_size=1, max_size=5) | st.lists(st.text(min_size=1, max_size=5), max_size=3),
}


@given(
    messages=st.lists(st.tuples(roles, st.one_of(texts, parts)), min_size=1, max_size=4),
    fields=st.fixed_dictionaries({}, optional=optional),
)
def test_a_chat_becomes_the_task_that_it_means(
    messages: list[tuple[str, str | list[str]]], fields: dict[str, Any]
) -> None:
    """Every message with its role and all of its text; every parameter under our name for it; nothing else."""
    contents = [
        text if isinstance(text, str) else [{"type": "text", "text": part} for part in text] for _, text in messages
    ]
    made = chat(
        messages=[{"role": role, "content": c} for (role, _), c in zip(messages, contents, strict=True)], **fields
    )
    assert made.messages is not None
    assert [(one.role, one.content) for one in made.messages] == [
        (
            ChatRole.SYSTEM if role == "developer" else ChatRole(role),
            text if isinstance(text, str) else "\n".join(text),
        )
        for role, text in messages
    ]
    assert made == msgspec.structs.replace(chat(), messages=made.messages, **parameters(fields))


@given(
    prompt=st.text(min_size=1, max_size=20), is_list=st.booleans(), fields=st.fixed_dictionaries({}, optional=optional)
)
def test_a_completion_becomes_the_task_that_it_means(prompt: str, is_list: bool, fields: dict[str, Any]) -> None:
    """The prompt as it is, alone or as the one of a list."""
    made = task(OpenAiCompletionRequest, COMPLETION | {"prompt": [prompt] if is_list else prompt} | fields)
    plain = TaskRequest(task_id=TASK_ID, model_ref="builtin:tiny", prompt=prompt)
    assert made == msgspec.structs.replace(plain, **parameters(fields))


def parameters(fields: dict[str, Any]) -> dict[str, Any]:
    stop = fields.get("stop")
    sampling = Sampling(
        temperature=fields.get("temperature"),
        top_p=fields.get("top_p"),
        stop=[stop] if isinstance(stop, str) else stop or None,
    )
    return {
        "seed": fields.get("seed"),
        "max_tokens": fields.get("max_tokens"),
        "sampling": UNSET if sampling == Sampling() else sampling,
    }


@given(st.text(min_size=1, max_size=5) | st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=4))
def test_an_embedding_becomes_the_task_that_it_means(texts: str | list[str]) -> None:
    """One text or several: the inputs of one task, in their order."""
    made = task(OpenAiEmbeddingRequest, EMBEDDING | {"input": texts})
    inputs = [texts] if isinstance(texts, str) else texts
    assert made == TaskRequest(task_id=TASK_ID, model_ref="builtin:tiny", workload=Workload.EMBEDDING, inputs=inputs)


@pytest.mark.spec("HP-OAI-5")
def test_our_headers_are_fields_of_the_task() -> None:
    """Priority, session, deadline and determinism; the defaults are those of any task."""
    made = chat(Extras(Priority.BATCH, SESSION_ID, 1500, Determinism.BEST_EFFORT))
    assert (made.priority, made.session_id, made.deadline_ms, made.determinism) == (
        Priority.BATCH,
        SESSION_ID,
        1500,
        Determinism.BEST_EFFORT,
    )
    plain = TaskRequest(task_id=TASK_ID, model_ref="builtin:tiny", messages=chat().messages)
    assert chat() == plain


def test_a_user_that_is_a_uuid_is_the_session() -> None:
    """Unless the header names another one; any other user is only a name."""
    assert chat(user=SESSION_ID).session_id == SESSION_ID
    assert chat(Extras(session_id=TASK_ID), user=SESSION_ID).session_id == TASK_ID
    assert chat(user=SESSION_ID + "\n").session_id is None


@pytest.mark.spec("HP-OAI-1")
def test_a_pools_name_stands_for_its_model_on_its_engine() -> None:
    """A reference leaves the engine open."""
    assert (chat().model_ref, chat().engine) == ("builtin:tiny", None)
    made = chat(served=Served("file:/x.gguf", "ctransformers"))
    assert (made.model_ref, made.engine) == ("file:/x.gguf", "ctransformers")


def test_the_two_names_of_the_limit_are_one() -> None:
    """Either, or both where they agree."""
    assert chat(max_tokens=5) == chat(max_completion_tokens=5) == chat(max_tokens=5, max_completion_tokens=5)
    assert chat(max_tokens=5).max_tokens == 5
    error = refusal(OpenAiChatRequest, CHAT | {"max_tokens": 5, "max_completion_tokens": 6})
    assert error.param == "max_completion_tokens"


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def test_the_form_of_an_answer_is_a_schema_of_the_task() -> None:
    """Text has none, `json_object` takes any object, `json_schema` is what it says."""
    assert chat(response_format={"type": "text"}) == chat(response_format=None) == chat()
    assert chat(response_format={"type": "json_object"}).sampling == Sampling(json_schema={"type": "object"})
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": False}}
    assert chat(response_format=form).sampling == Sampling(json_schema=SCHEMA)


@pytest.mark.parametrize(
    "form",
    [{"type": "json_schema"}, {"type": "text", "json_schema": {"name": "x", "schema": {}}}],
    ids=["no schema", "a schema for text"],
)
def test_a_form_that_contradicts_itself_is_refused(form: dict[str, Any]) -> None:
    """By the name of the schema that is missing or too many."""
    error = refusal(OpenAiChatRequest, CHAT | {"response_format": form})
    assert error.param == "response_format.json_schema"


# -- tools and likelihoods -------------------------------------------------------------------------------------------

LOOK = {"name": "look", "description": "Looks", "parameters": SCHEMA, "strict": True}
TOOLS = [{"type": "function", "function": LOOK}, {"type": "function", "function": {"name": "wait"}}]
FUNCTIONS = [ToolFunction(name="look", description="Looks", parameters=SCHEMA), ToolFunction(name="wait")]
CALL = {"id": "a1", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}, "index": 0}


@pytest.mark.parametrize(
    ("choice", "meant"),
    [
        (None, {}),
        ("auto", {}),
        ("required", {"choice": ToolChoice.REQUIRED}),
        ({"type": "function", "function": {"name": "wait"}}, {"choice": ToolChoice.REQUIRED, "only": "wait"}),
    ],
)
@pytest.mark.parametrize("is_parallel", [None, True, False])
def test_tools_are_what_the_task_may_call(choice: Any, meant: dict[str, Any], is_parallel: bool | None) -> None:
    """All are shown; which of them is called, and how many at once, is for the choice to say."""
    made = chat(tools=TOOLS, tool_choice=choice, parallel_tool_calls=is_parallel)
    assert made.tools == Tools(functions=FUNCTIONS, parallel=is_parallel is not False, **meant)


def test_tools_that_are_not_to_be_called_are_not_shown() -> None:
    """Nor are none."""
    assert chat(tools=TOOLS, tool_choice="none") == chat(tools=[], tool_choice="auto") == chat(tools=None) == chat()


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "fly"}}}, "tool_choice"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type"),
        ({"tools": [*TOOLS, {"type": "function"}]}, "tools[2].function"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "4"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "a1"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages[0].name"),
    ],
)
def test_what_contradicts_itself_about_tools_is_refused(changes: dict[str, Any], param: str) -> None:
    """With its place."""
    error = refusal(OpenAiChatRequest, CHAT | changes)
    assert error.param == param
    assert f"`{param}`" in error.message


@pytest.mark.parametrize("arguments", ["[1]", "{", "x", "{}{}", "1" * 5000, '{"a":' * 5000, '"\\ud800"', '{"a": NaN}'])
def test_arguments_that_are_no_object_are_refused(arguments: str) -> None:
    """Whatever they are instead, and however deep."""
    call = {**CALL, "function": {"name": "look", "arguments": arguments}}
    error = refusal(OpenAiChatRequest, CHAT | {"messages": [{"role": "assistant", "tool_calls": [call]}]})
    assert error.param == "messages[0].tool_calls[0].function.arguments"


def test_calls_and_what_came_of_them_are_messages() -> None:
    """An answer of ours may go back as it came, and an empty text is no arguments."""
    answer = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [CALL]}
    bare = {"role": "assistant", "tool_calls": [{"id": "a2", "function": {"name": "wait", "arguments": ""}}]}
    result = {"role": "tool", "tool_call_id": "a1", "name": "look", "content": [{"type": "text", "text": "a fox"}]}
    made = chat(messages=[USER, answer, result, bare])
    assert made.messages is not None
    assert made.messages[1:] == [
        ChatMessage(
            role=ChatRole.ASSISTANT, content="", tool_calls=[ToolCall(id="a1", name="look", arguments={"a": 1})]
        ),
        ChatMessage(role=ChatRole.TOOL, content="a fox", tool_call_id="a1"),
        ChatMessage(role=ChatRole.ASSISTANT, content="", tool_calls=[ToolCall(id="a2", name="wait", arguments={})]),
    ]


def test_likelihoods_are_asked_for() -> None:
    """Of a chat by two fields, of a completion by one."""
    assert [chat(logprobs=True).logprobs, chat(logprobs=True, top_logprobs=5).logprobs] == [0, 5]
    assert chat(logprobs=False, top_logprobs=0) == chat()
    assert [task(OpenAiCompletionRequest, COMPLETION | {"logprobs": n}).logprobs for n in (None, 0, 20)] == [
        None,
        0,
        20,
    ]
