"""The small model with chat templates that know tools, as they are published with others: real files for llama.cpp.

It was trained on stories, so that it calls nothing by itself. With `says` its word for a story's beginning is a control
token of that name instead: then it says that where it would begin a story, as a model says `<tool_call>`.
"""

from __future__ import annotations

import struct
from pathlib import Path

from tests.live.models import TINY

_TEMPLATE, _TOKENS, _TYPES = "tokenizer.chat_template", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by its type
_ALIGNMENT = 32
_CONTROL = 3
FIRST_WORD = "On"  # of "Once": what the model begins with

# As Qwen 2.5 has it, with the small model's own words for who speaks.
HERMES = """{%- if tools %}
    {%- if messages[0]['role'] == 'system' %}{{- 'System: ' + messages[0]['content'] + '\\n' }}{%- endif %}
    {{- "# Tools\\n\\nYou are provided with function signatures within <tools></tools> XML tags:\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within " }}
    {{- "<tool_call></tool_call> XML tags:\\n<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": " }}
    {{- "<args-json-object>}\\n</tool_call>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" %}{{- 'User: ' + message.content + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- 'Storyteller:\\n' + (message.content or '') }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '\\n' }}
    {%- elif message.role == "tool" %}{{- 'User: <tool_response>\\n' + message.content + '\\n</tool_response>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Storyteller:\\n' }}{%- endif %}"""

# The same with the marks of Llama 3, and of Mistral's two forms.
LLAMA3 = """{#- <|start_header_id|> -#}
{%- if tools %}
    {{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.\\n' }}
    {%- for tool in tools %}{{- tool | tojson }}{{- "\\n" }}{%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- "}\\n" }}
    {%- else %}{{- message.role + ': ' + message.content + '\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Storyteller:\\n' }}{%- endif %}"""
MISTRAL = """{%- if tools %}{{- '[AVAILABLE_TOOLS][' }}
    {%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{{- '][/AVAILABLE_TOOLS]' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls %}{{- '[TOOL_CALLS][' }}
        {%- for call in message.tool_calls %}
            {%- if call.id | length != 9 %}{{- raise_exception("Tool call IDs are nine characters!") }}{%- endif %}
            {{- '{"name": "' + call.function.name + '", "arguments": ' }}{{- call.function.arguments | tojson }}
            {{- ', "id": "' + call.id + '"}' }}
        {%- endfor %}{{- ']' }}
    {%- else %}{{- message.role + ': ' + message.content + '\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Storyteller:\\n' }}{%- endif %}"""
MISTRAL_ARGS = MISTRAL.replace("{%- if tools", "{#- [TOOL_CALLS]name[ARGS]{} -#}{%- if tools", 1)
TEMPLATES = {"hermes": HERMES, "llama3": LLAMA3, "mistral": MISTRAL, "mistral-args": MISTRAL_ARGS}


def a_tool_model(path: Path, template: str = HERMES, says: str | None = None) -> Path:
    """The small model with this template."""
    path.write_bytes(_rewritten(TINY, template, says))
    return path


def _rewritten(content: bytes, template: str, says: str | None) -> bytes:
    tensors, pairs = struct.unpack_from("<QQ", content, 8)
    at, head = 24, content[:24]
    place = 0  # of the word in the vocabulary
    for _ in range(pairs):
        end_of_key = _end(content, at, _STRING)
        key = content[at + 8 : end_of_key].decode()
        kind = struct.unpack_from("<I", content, end_of_key)[0]
        end = _end(content, end_of_key + 4, kind)
        value = content[end_of_key + 4 : end]
        if key == _TEMPLATE:
            value = _text(template)
        elif key == _TOKENS and says is not None:
            words = _words(value)
            place = words.index(FIRST_WORD)
            value = value[:12] + b"".join(map(_text, [*words[:place], says, *words[place + 1 :]]))
        elif key == _TYPES and says is not None:
            value = value[: 12 + 4 * place] + struct.pack("<i", _CONTROL) + value[16 + 4 * place :]
        head += content[at : end_of_key + 4] + value
        at = end
    infos = at
    for _ in range(tensors):
        at = _end(content, at, _STRING)
        at += 4 + 8 * struct.unpack_from("<I", content, at)[0] + 4 + 8
    head += content[infos:at]
    return head + bytes(-len(head) % _ALIGNMENT) + content[at + -at % _ALIGNMENT :]


def _end(content: bytes, at: int, kind: int) -> int:
    """Behind the value that begins there."""
    if kind == _STRING:
        return at + 8 + int(struct.unpack_from("<Q", content, at)[0])
    if kind != _ARRAY:
        return at + _SIZES[kind]
    kind, count = struct.unpack_from("<IQ", content, at)
    at += 12
    if kind in _SIZES:
        return at + _SIZES[kind] * count
    for _ in range(count):
        at = _end(content, at, kind)
    return at


def _words(value: bytes) -> list[str]:
    count = struct.unpack_from("<Q", value, 4)[0]
    at, words = 12, []
    for _ in range(count):
        end = _end(value, at, _STRING)
        words.append(value[at + 8 : end].decode())
        at = end
    return words


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()
