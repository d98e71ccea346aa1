"""OpenAI's requests as tasks (HP-OAI-2). What a task cannot be asked for is refused by name; nothing is dropped in
silence."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from msgspec import UNSET, Struct, UnsetType

from llama_orch.contract.models import (
    ChatMessage,
    ChatRole,
    Determinism,
    OpenAiChatRequest,
    OpenAiCompletionRequest,
    OpenAiEmbeddingRequest,
    OpenAiMessage,
    OpenAiResponseFormat,
    OpenAiRole,
    OpenAiStreamOptions,
    Priority,
    Sampling,
    TaskRequest,
    Workload,
)
from llama_orch.errors import InvalidParams
from llama_orch.openai.tools import calls_of, tools_of

# Values that change nothing, of fields that are otherwise refused; null is one for all of them. `user`,
# `safety_identifier` and `prompt_cache_key` are not here: they change nothing whatever they are.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "store": (False,),
    "echo": (False,),
    "suffix": ("",),
    "metadata": ({},),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "service_tier": ("auto", "default"),
    "dimensions": (),
    "include_obfuscation": (False,),
    "name": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
    "annotations": ([],),
}
NEUTRAL_OF_MESSAGES: Mapping[str, tuple[Any, ...]] = {**NEUTRAL, "function_call": ()}
# What a role has that others have not.
OWN_FIELDS: Mapping[OpenAiRole, tuple[str, ...]] = {
    OpenAiRole.ASSISTANT: ("tool_calls",),
    OpenAiRole.TOOL: ("tool_call_id", "name"),  # the call says the name
}
PART_SEPARATOR = "\n"

_ROLES = {
    OpenAiRole.SYSTEM: ChatRole.SYSTEM,
    OpenAiRole.DEVELOPER: ChatRole.SYSTEM,
    OpenAiRole.USER: ChatRole.USER,
    OpenAiRole.ASSISTANT: ChatRole.ASSISTANT,
    OpenAiRole.TOOL: ChatRole.TOOL,
}
_is_uuid = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}").fullmatch


class Extras(NamedTuple):
    """What our headers say; None where there is none."""

    priority: Priority | None = None
    session_id: str | None = None
    deadline_ms: int | None = None
    determinism: Determinism | None = None


class Served(NamedTuple):
    """What a `model` stands for. `engine` where it is a pool's ID."""

    model_ref: str
    engine: str | None = None


def chat_task(body: OpenAiChatRequest, extras: Extras, served: Served, task_id: str) -> TaskRequest:
    """Raises InvalidParams with the field's name."""
    _refuse_unoffered(body)
    _check_stream_options(body.stream, body.stream_options)
    limits = {"max_completion_tokens": body.max_completion_tokens, "max_tokens": body.max_tokens}
    given = {value for value in limits.values() if value is not None}
    if len(given) > 1:
        raise InvalidParams(
            "`max_tokens` and `max_completion_tokens` differ; give one of them", param="max_completion_tokens"
        )
    return TaskRequest(
        **_common(body.user, extras, served, task_id),
        messages=[_message(index, message) for index, message in enumerate(body.messages)],
        max_tokens=next(iter(given), None),
        seed=body.seed,
        sampling=_sampling(body, json_schema_of(body.response_format)),
        tools=tools_of(body),
        logprobs=_logprobs(body),
    )


def completion_task(body: OpenAiCompletionRequest, extras: Extras, served: Served, task_id: str) -> TaskRequest:
    """Raises InvalidParams with the field's name."""
    _refuse_unoffered(body)
    _check_stream_options(body.stream, body.stream_options)
    return TaskRequest(
        **_common(body.user, extras, served, task_id),
        prompt=body.prompt if isinstance(body.prompt, str) else body.prompt[0],
        max_tokens=body.max_tokens,
        seed=body.seed,
        sampling=_sampling(body, None),
        logprobs=body.logprobs,
    )


def embedding_task(body: OpenAiEmbeddingRequest, extras: Extras, served: Served, task_id: str) -> TaskRequest:
    """Raises InvalidParams with the field's name."""
    _refuse_unoffered(body)
    return TaskRequest(
        **_common(body.user, extras, served, task_id),
        workload=Workload.EMBEDDING,
        inputs=[body.input] if isinstance(body.input, str) else body.input,
    )


def _common(user: str | None, extras: Extras, served: Served, task_id: str) -> dict[str, Any]:
    """A `user` that is no UUID only names a person, which is nothing to a task."""
    session_id = extras.session_id or (user if user is not None and _is_uuid(user) else None)
    return {
        "task_id": task_id,
        "session_id": session_id,
        "model_ref": served.model_ref,
        "engine": served.engine,
        "priority": extras.priority or Priority.INTERACTIVE,
        "determinism": UNSET if extras.determinism is None else extras.determinism,
        "deadline_ms": extras.deadline_ms,
    }


def _refuse_unoffered(body: Struct, where: str = "", neutral: Mapping[str, tuple[Any, ...]] = NEUTRAL) -> None:
    for name in body.__struct_fields__:
        value = getattr(body, name)
        if name not in neutral or value is None or value in neutral[name]:
            continue
        taken = " or ".join(json.dumps(one) for one in neutral[name])
        advice = f"leave it out, or give {taken}" if taken else "leave it out"
        raise InvalidParams(f"`{where}{name}` is not offered; {advice}", param=f"{where}{name}")


def _check_stream_options(is_stream: bool | None, options: OpenAiStreamOptions | None) -> None:
    if options is None:
        return
    _refuse_unoffered(options, "stream_options.")
    if not is_stream:
        raise InvalidParams("`stream_options` is about streams; leave it out without `stream`", param="stream_options")


def _message(index: int, message: OpenAiMessage) -> ChatMessage:
    where = f"messages[{index}]."
    if message.role not in _ROLES:
        offered = ", ".join(role.value for role in _ROLES)
        raise InvalidParams(
            f"`{where}role` {message.role.value!r} is not offered; use one of: {offered}",
            param=f"{where}role",
        )
    own = OWN_FIELDS.get(message.role, ())
    others = {name: values for name, values in NEUTRAL_OF_MESSAGES.items() if name not in own}
    _refuse_unoffered(message, where, others)
    calls = calls_of(f"{where}tool_calls", message.tool_calls) if message.tool_calls else None
    content = message.content
    if content is None and calls is None:
        raise InvalidParams(f"`{where}content` is missing; give a text", param=f"{where}content")
    if message.role is OpenAiRole.TOOL and message.tool_call_id is None:
        raise InvalidParams(
            f"`{where}tool_call_id` is missing; say which call this answers", param=f"{where}tool_call_id"
        )
    text = content if isinstance(content, str) else PART_SEPARATOR.join(part.text for part in content or ())
    return ChatMessage(role=_ROLES[message.role], content=text, tool_calls=calls, tool_call_id=message.tool_call_id)


def _logprobs(body: OpenAiChatRequest) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise InvalidParams("`top_logprobs` needs `logprobs`; set that to true", param="top_logprobs")
    return None


def json_schema_of(form: OpenAiResponseFormat | None) -> dict[str, Any] | None:
    """The schema that the answer must match; None for free text."""
    kind = "text" if form is None else form.type
    schema = None if form is None else form.json_schema
    if kind == "json_schema":
        if schema is None:
            raise InvalidParams(
                "`response_format` of type 'json_schema' needs `json_schema`", param="response_format.json_schema"
            )
        return schema.schema
    if schema is not None:
        raise InvalidParams(
            f"`response_format` of type {kind!r} has no `json_schema`; leave it out, or use type 'json_schema'",
            param="response_format.json_schema",
        )
    return {"type": "object"} if kind == "json_object" else None


def _sampling(
    body: OpenAiChatRequest | OpenAiCompletionRequest, json_schema: dict[str, Any] | None
) -> Sampling | UnsetType:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or None
    sampling = Sampling(temperature=body.temperature, top_p=body.top_p, stop=stop, json_schema=json_schema)
    return UNSET if sampling == Sampling() else sampling
