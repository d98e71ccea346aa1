"""litellm and langchain-openai, as anybody would use them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import litellm
import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from tests.live.client import until
from tests.live_service import LiveService

from .conftest import LIMIT_S

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


def test_litellm_is_told_what_is_not_offered(service: LiveService) -> None:
    """As its own kind of error, with the field's name."""
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    with pytest.raises(litellm.BadRequestError, match="`tools` is not offered"):
        lite(service, tools=[tool])


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
