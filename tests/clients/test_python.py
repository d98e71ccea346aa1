"""litellm and langchain-openai, as anybody would use them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import litellm
import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from litellm.utils import get_valid_models
from pydantic import BaseModel

from tests.live.client import until
from tests.live_service import LiveService

from .conftest import LIMIT_S, MODELS

pytestmark = pytest.mark.spec("HP-OAI-1", "HP-OAI-3", "HP-OAI-4")

ASKED = [{"role": "user", "content": "Tell me a story about a brave fox."}]


def lite(service: LiveService, model: str = "default", **more: Any) -> Any:
    address = {"api_base": f"{service.url}/v1", "api_key": service.token, "timeout": LIMIT_S}
    fields = {"max_tokens": 8, "seed": 7, **address, **more}
    return litellm.completion(model=f"openai/{model}", messages=ASKED, **fields)


def langchain(service: LiveService, model: str = "default", **more: Any) -> ChatOpenAI:
    address = {"base_url": f"{service.url}/v1", "api_key": service.token, "timeout": LIMIT_S}
    return ChatOpenAI(model=model, **{"max_tokens": 8, "seed": 7, "stream_usage": True, **address, **more})


def test_litellm_chats_and_streams(service: LiveService) -> None:
    """The same text either way, and the usage."""
    whole = lite(service)
    pieces = [chunk.choices[0].delta.content or "" for chunk in lite(service, stream=True)]
    assert "".join(pieces) == whole.choices[0].message.content != ""
    assert whole.usage.completion_tokens == 8


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def test_litellm_lists_the_models(service: LiveService) -> None:
    """As the endpoint has them."""
    address = {"api_base": f"{service.url}/v1", "api_key": service.token}
    found = get_valid_models(check_provider_endpoint=True, custom_llm_provider="openai", **address)
    assert set(MODELS) <= set(found)


def test_litellm_is_told_what_is_not_offered(service: LiveService) -> None:
    """As its own kind of error, with the field's name."""
    with pytest.raises(litellm.BadRequestError, match="does not offer `tools`"):
        lite(service, tools=[TOOL])


@pytest.mark.spec("HP-OAI-8")
def test_litellm_calls_tools(service: LiveService) -> None:
    """Whole and in chunks, which it puts together itself."""
    asked = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 64}
    whole = lite(service, "tools", **asked)
    built = litellm.stream_chunk_builder(list(lite(service, "tools", stream=True, **asked)))
    for answer in (whole, built):
        (call,) = answer.choices[0].message.tool_calls
        assert (call.function.name, call.function.arguments) == ("look", "{}")
        assert answer.choices[0].finish_reason == "tool_calls"


@pytest.mark.spec("HP-OAI-9")
def test_litellm_is_told_how_likely_tokens_were(service: LiveService) -> None:
    """As many as there are tokens."""
    told = lite(service, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [len(one["top_logprobs"]) for one in told] == [2] * 8


def test_litellm_waits_out_a_full_queue(service: LiveService, busy: Callable[[], int]) -> None:
    """429, then its own retries, until there is room."""
    with pytest.raises(litellm.RateLimitError):
        lite(service, "full", max_retries=0)
    assert lite(service, "full", max_retries=10).usage.completion_tokens == 8
    assert busy() >= 2


def test_litellm_gets_vectors(service: LiveService) -> None:
    """One for each text."""
    address = {"api_base": f"{service.url}/v1", "api_key": service.token}
    found = litellm.embedding(model="openai/embedder", input=["a red fox", "an old dog"], **address)
    assert [len(one["embedding"]) for one in found.data] == [8, 8]


def test_langchain_chats_and_streams(service: LiveService) -> None:
    """The same text either way, and the usage of both."""
    client = langchain(service)
    whole = client.invoke("Tell me a story about a brave fox.")
    pieces = list(client.stream("Tell me a story about a brave fox."))
    assert "".join(str(piece.content) for piece in pieces) == whole.content != ""
    usages = [piece.usage_metadata for piece in pieces if piece.usage_metadata]
    assert whole.usage_metadata is not None
    assert [one["output_tokens"] for one in usages] == [whole.usage_metadata["output_tokens"]] == [8]


class Fox(BaseModel):
    brave: bool
    age: int


def test_langchain_gets_an_answer_in_a_form(service: LiveService) -> None:
    """Its structured output, which the service keeps."""
    model = langchain(service, max_tokens=64).with_structured_output(Fox, method="json_schema")
    assert isinstance(model.invoke("How old is the fox?"), Fox)


@tool
def look(place: str) -> str:
    """Look at a place."""
    return f"there is fog in {place}"


@pytest.mark.spec("HP-OAI-8")
def test_langchain_calls_tools(service: LiveService) -> None:
    """A call of a function, whose result goes back with the conversation; the same in chunks."""
    model = langchain(service, "tools", max_tokens=200).bind_tools(
        [look], tool_choice="look", parallel_tool_calls=False
    )
    question = HumanMessage("What is to be seen?")
    answer = model.invoke([question])
    assert isinstance(answer, AIMessage)
    (call,) = answer.tool_calls
    result = look.invoke(call)
    after = langchain(service, "tools").bind_tools([look]).invoke([question, answer, result])
    assert after.content
    pieces = list(model.stream([question]))
    whole = sum(pieces[1:], pieces[0])
    assert [(one["name"], one["args"]) for one in whole.tool_calls] == [("look", call["args"])]


def test_langchain_leaves(service: LiveService, states: Callable[[], list[str]]) -> None:
    """A stream that is closed early cancels its task."""
    stream = langchain(service, "full", max_tokens=1500).stream("Tell me a story about a brave fox.")
    next(stream)
    assert states()[0] == "running"
    stream.close()  # type: ignore[attr-defined]
    until(lambda: states()[0] == "canceled")


def test_langchain_waits_out_a_full_queue(service: LiveService, busy: Callable[[], int]) -> None:
    """Likewise by its own retries."""
    answer = langchain(service, "full", max_retries=10).invoke("Once")
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 8
    assert busy() >= 1
