"""Tools in OpenAI's requests and answers: functions, choices and calls, in its words and in ours."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from llama_orch.contract.models import (
    OpenAiAnswerToolCall,
    OpenAiCalledFunction,
    OpenAiChatRequest,
    OpenAiChosenTool,
    OpenAiFunctionPiece,
    OpenAiTool,
    OpenAiToolCall,
    OpenAiToolCallPiece,
    ToolCall,
    ToolCallPiece,
    ToolChoice,
    ToolFunction,
    Tools,
)
from llama_orch.errors import InvalidParams

_decode = msgspec.json.Decoder(dict[str, Any]).decode


# -- requests ----------------------------------------------------------------------------------------------------------


def tools_of(body: OpenAiChatRequest) -> Tools | UnsetType:
    """What the model may call. Raises InvalidParams with the field's name."""
    choice = body.tool_choice
    functions = [_function(index, tool) for index, tool in enumerate(body.tools or ())]
    if not functions:
        if choice not in (None, "none", "auto"):
            raise InvalidParams(
                "`tool_choice` asks for a call, but there are no `tools`; give some", param="tool_choice"
            )
        return UNSET
    if choice == "none":  # nothing is to be called, so nothing has to be shown
        return UNSET
    only = choice.function.name if isinstance(choice, OpenAiChosenTool) else None
    if only is not None and all(function.name != only for function in functions):
        raise InvalidParams(f"`tool_choice` is {only!r}, which none of `tools` is called", param="tool_choice")
    is_required = choice == "required" or only is not None
    return Tools(
        functions=functions,
        choice=ToolChoice.REQUIRED if is_required else ToolChoice.AUTO,
        only=only,
        parallel=body.parallel_tool_calls is not False,
    )


def _function(index: int, tool: OpenAiTool) -> ToolFunction:
    place = f"tools[{index}]"
    if tool.type != "function":
        raise InvalidParams(f'`{place}.type` {tool.type[:64]!r} is not offered; give "function"', param=f"{place}.type")
    if tool.function is UNSET:
        raise InvalidParams(f"`{place}.function` is missing; say what may be called", param=f"{place}.function")
    function = tool.function
    return ToolFunction(name=function.name, description=function.description, parameters=function.parameters)


def calls_of(place: str, calls: list[OpenAiToolCall]) -> list[ToolCall]:
    """Calls of an earlier answer. `place` names them. Raises InvalidParams."""
    return [_call(f"{place}[{index}]", call) for index, call in enumerate(calls)]


def _call(place: str, call: OpenAiToolCall) -> ToolCall:
    if call.type not in (None, "function"):
        raise InvalidParams(f'`{place}.type` {call.type[:64]!r} is not offered; give "function"', param=f"{place}.type")
    try:
        arguments = _decode(call.function.arguments or "{}")  # some say nothing for no arguments
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        param = f"{place}.function.arguments"
        raise InvalidParams(f"`{param}` is not the text of a JSON object that can be read", param=param) from error
    return ToolCall(id=call.id, name=call.function.name, arguments=arguments)


# -- answers -----------------------------------------------------------------------------------------------------------


class Calls:
    """The calls of one answer, as they come."""

    def __init__(self) -> None:
        self._calls: list[tuple[str, str, list[str]]] = []  # ID, name, pieces of the arguments

    def add(self, pieces: list[ToolCallPiece]) -> list[OpenAiToolCallPiece]:
        """In OpenAI's words."""
        return [self._add(piece) for piece in pieces]

    def _add(self, piece: ToolCallPiece) -> OpenAiToolCallPiece:
        arguments = "" if piece.arguments is UNSET else piece.arguments
        if piece.id is not UNSET and piece.name is not UNSET:
            self._calls.append((piece.id, piece.name, []))
        self._calls[piece.index][2].append(arguments)
        return OpenAiToolCallPiece(
            index=piece.index,
            id=piece.id,
            type=UNSET if piece.id is UNSET else "function",
            function=OpenAiFunctionPiece(name=piece.name, arguments=arguments),
        )

    @property
    def are_whole(self) -> bool:
        """There are calls, and nothing has cut the last one off."""
        if not self._calls:
            return False
        try:
            _decode("".join(self._calls[-1][2]))
        except msgspec.DecodeError:
            return False
        return True

    def whole(self) -> list[OpenAiAnswerToolCall] | UnsetType:
        return [
            OpenAiAnswerToolCall(
                id=call_id, type="function", function=OpenAiCalledFunction(name=name, arguments="".join(pieces))
            )
            for call_id, name, pieces in self._calls
        ] or UNSET
