"""Tools in a request: what can be refused before a model is asked, the grammar of the answers, and what a chat template
gets to see."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from msgspec import UNSET

from llama_orch.contract.models import ChatMessage, ChatRole, TaskRequest, ToolChoice, ToolFunction, Tools
from llama_orch.core.gbnf import GrammarError, check_grammar
from llama_orch.core.tool_syntax import Tool, ToolSyntax, tool_grammar
from llama_orch.errors import InvalidParams

# Of each object that a template gets to see. To write one out takes the square of its names: with 60,000 it was 20 s.
DEPTH_MAX = 64
PARTS_MAX = 4096


def fields_about_tools(request: TaskRequest) -> Iterator[str]:
    """Those that need a template which knows tools."""
    if request.tools is not UNSET:
        yield "tools"
    for index, message in enumerate(request.messages or ()):
        if message.tool_calls is not None:
            yield f"messages[{index}].tool_calls"
        if message.role is ChatRole.TOOL:
            yield f"messages[{index}].role"


def check_tools(request: TaskRequest) -> None:
    """Raises InvalidParams for what contradicts itself, or is nested too deeply for anybody to read."""
    for index, message in enumerate(request.messages or ()):
        _check_message(f"messages[{index}]", message)
    tools = request.tools
    if tools is UNSET:
        return
    if request.messages is None:
        raise InvalidParams(
            "`tools` go with `messages`, since the chat template shows them; leave one out", param="tools"
        )
    if request.sampling is not UNSET and request.sampling.grammar is not None:
        raise InvalidParams("give one of `tools` and `sampling.grammar`, not both", param="tools")
    names = [function.name for function in tools.functions]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidParams(f"two functions of `tools` have the name {twice!r}; give each its own", param="tools")
    if tools.only is not None and tools.only not in names:
        raise InvalidParams(f"`tools.only` is {tools.only!r}, which none of the functions is called", param="tools")
    for function in tools.functions:
        if function.parameters is not None:
            _check_size(function.parameters, f"the parameters of function {function.name!r}", "tools")


def _check_message(place: str, message: ChatMessage) -> None:
    if message.tool_calls is not None and message.role is not ChatRole.ASSISTANT:
        raise InvalidParams(f"`{place}.tool_calls` is for role 'assistant'; leave it out", param=f"{place}.tool_calls")
    if (message.role is ChatRole.TOOL) != (message.tool_call_id is not None):
        raise InvalidParams(
            f"`{place}.tool_call_id` is for role 'tool', which has to have one", param=f"{place}.tool_call_id"
        )
    for number, call in enumerate(message.tool_calls or ()):
        _check_size(call.arguments, f"`{place}.tool_calls[{number}].arguments`", f"{place}.tool_calls")


def _check_size(value: object, what: str, param: str) -> None:
    level, parts = [value], 0
    for _ in range(DEPTH_MAX):
        level = [part for one in level for part in _parts(one)]
        parts += len(level)
        if parts > PARTS_MAX:
            raise InvalidParams(f"{what}: more than {PARTS_MAX} values in it; make it smaller", param=param)
    if level:
        raise InvalidParams(f"{what}: nested more than {DEPTH_MAX} deep; make it flatter", param=param)


def _parts(value: object) -> Iterable[object]:
    return value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()


def grammar_of_tools(request: TaskRequest, tools: Tools, syntax: ToolSyntax) -> str:
    """The GBNF of the answers; a refusal of what cannot be kept. May take a tenth of a second."""
    form = None if request.sampling is UNSET else request.sampling.json_schema
    is_required = tools.choice is ToolChoice.REQUIRED
    if form is not None and not is_required and syntax.opens_answers_only:
        raise InvalidParams(
            "this model writes calls as JSON, so that an answer in the form of a schema could be taken for one; leave "
            "`tools` or `sampling.json_schema` out",
            param="tools",
        )
    functions = [Tool(one.name, one.parameters) for one in tools.functions if tools.only in (None, one.name)]
    try:
        grammar = tool_grammar(
            syntax, functions, is_required=is_required, is_parallel=tools.parallel, answer_schema=form
        )
        check_grammar(grammar)
    except GrammarError as error:
        raise InvalidParams(f"`tools` are refused: {error}", param="tools") from error
    return grammar


def has_free_text(request: TaskRequest) -> bool:
    """Whether calls may follow on text; else they begin where the answer does."""
    return request.sampling is UNSET or request.sampling.json_schema is None


# -- what a template gets to see ---------------------------------------------------------------------------------------


def message_in_full(message: ChatMessage) -> dict[str, Any]:
    """In OpenAI's form."""
    said: dict[str, Any] = {"role": message.role.value, "content": message.content}
    if message.tool_call_id is not None:
        said["tool_call_id"] = message.tool_call_id
    if message.tool_calls is not None:
        said["tool_calls"] = [
            {"id": one.id, "type": "function", "function": {"name": one.name, "arguments": json.dumps(one.arguments)}}
            for one in message.tool_calls
        ]
    return said


def tool_in_full(function: ToolFunction) -> dict[str, Any]:
    """Likewise."""
    parameters = {"type": "object", "properties": {}} if function.parameters is None else function.parameters
    described = {"name": function.name, "description": function.description or "", "parameters": parameters}
    return {"type": "function", "function": described}
