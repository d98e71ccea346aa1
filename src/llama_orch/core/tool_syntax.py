"""How models write calls of tools: the forms that we know, which of them a chat template shows, and the grammar that
holds an answer to it.

With the grammar an answer is text without the marker that opens calls, or calls whose arguments match the schemas of
their functions, or the one and then the other. So nothing has to be guessed of what a model has written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_orch.core.gbnf import GrammarError
from llama_orch.core.gbnf_parts import literal
from llama_orch.core.json_schema import grammar_of_rules, schema_rules

CALLS_MAX = 16  # of one answer: a small model that has begun may find no end


@dataclass(frozen=True, slots=True)
class ToolSyntax:
    """`begin` (`before` NAME `between` ARGUMENTS `after`) and again behind `join`, then `end`. `marker`, with which all
    of it begins, is in no text beside calls."""

    name: str
    marker: str
    before: str
    between: str
    after: str
    begin: str = ""
    join: str | None = None  # None: there is one call only
    end: str = ""
    opens_answers_only: bool = False  # the marker says something at the beginning of an answer alone
    kept: tuple[str, ...] = ()  # may be control tokens, which an engine leaves out of texts unless it is told

    @property
    def opening(self) -> str:
        """What is before the first name."""
        return self.begin + self.before


# The models of Nous Hermes, Qwen 2.5 and 3, Granite 4 and others.
HERMES = ToolSyntax(
    name="hermes",
    marker="<tool_call>",
    before='<tool_call>\n{"name": "',
    between='", "arguments": ',
    after="}\n</tool_call>",
    join="\n",
    kept=("<tool_call>", "</tool_call>"),
)
# Llama 3.1, 3.2, 3.3.
LLAMA3 = ToolSyntax(
    name="llama3",
    marker="{",
    before='{"name": "',
    between='", "parameters": ',
    after="}",
    opens_answers_only=True,
)
# Mistral 7B v0.3, Mixtral, Nemo.
MISTRAL = ToolSyntax(
    name="mistral",
    marker="[TOOL_CALLS]",
    begin="[TOOL_CALLS][",
    before='{"name": "',
    between='", "arguments": ',
    after="}",
    join=", ",
    end="]",
    kept=("[TOOL_CALLS]",),
)
# Mistral Small 3.x, Devstral, Magistral.
MISTRAL_ARGS = ToolSyntax(
    name="mistral-args",
    marker="[TOOL_CALLS]",
    before="[TOOL_CALLS]",
    between="[ARGS]",
    after="",
    join="",
    kept=("[TOOL_CALLS]", "[ARGS]"),
)
SYNTAXES: Mapping[str, ToolSyntax] = {one.name: one for one in (HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS)}

_names_tools = re.compile(r"\btools\b").search
# Marks of forms that look like one of ours and are none: calls as XML.
_OTHERS = ("<function=", "<arg_key>", "<function name=")


def syntax_of(template: str) -> ToolSyntax | None:
    """The form that a chat template shows; None where it knows no tools, or a form that we do not."""
    if _names_tools(template) is None or any(mark in template for mark in _OTHERS):
        return None
    if "[TOOL_CALLS]" in template:
        return MISTRAL_ARGS if "[ARGS]" in template else MISTRAL
    if "<tool_call>" in template and "arguments" in template:
        return HERMES
    if "<|start_header_id|>" in template and '"parameters"' in template:
        return LLAMA3
    return None


@dataclass(frozen=True, slots=True)
class Tool:
    """A function."""

    name: str
    parameters: Mapping[str, Any] | None  # None: it has no arguments


def tool_grammar(
    syntax: ToolSyntax,
    functions: Sequence[Tool],
    *,
    is_required: bool,
    is_parallel: bool,
    answer_schema: Mapping[str, Any] | None = None,
) -> str:
    """GBNF of the answers. `answer_schema`: of those without calls, which are free texts otherwise. Raises GrammarError
    with the function whose schema cannot be kept."""
    rules = {"root": "opened"}
    for number, function in enumerate(functions):
        rules |= _function_rules(number, function)
        rules[f"call{number}"] = f"{literal(function.name + syntax.between)} f{number}-root"
    rules["call"] = f"({' | '.join(f'call{number}' for number in range(len(functions)))}) {_text(syntax.after)}"
    rules["more"] = f"{_text((syntax.join or '') + syntax.before)} call"
    several = f" more{{0,{CALLS_MAX - 1}}}" if is_parallel and syntax.join is not None else ""
    rules["calls"] = f"call{several} {_text(syntax.end)}"
    rest = _text(syntax.opening.removeprefix(syntax.marker))
    rules["opened"] = f"{literal(syntax.marker)} {rest} calls"
    if is_required:
        return grammar_of_rules(rules)
    if answer_schema is not None:
        rules["root"] = "opened | a-root"
        try:
            rules |= schema_rules(answer_schema, "a-")
        except GrammarError as error:
            raise GrammarError(f"of the answer, {error}") from error
    elif syntax.opens_answers_only:
        rules["root"] = f"opened | ([^{_in_set(syntax.marker[0])}] .*)?"
    else:
        rules["root"] = "text0"
        rules |= _texts_without(syntax.marker, f"{rest} calls")
    return grammar_of_rules(rules)


def _function_rules(number: int, function: Tool) -> dict[str, str]:
    schema = {"properties": {}} if function.parameters is None else function.parameters
    if schema.get("type", "object" if "properties" in schema or not schema else None) != "object":
        raise GrammarError(f"the parameters of function {function.name!r} are not of type object; make them one")
    if schema.get("properties") == {}:  # how everybody says that there are no arguments
        schema = {"additionalProperties": False, **schema}
    try:
        return schema_rules({**schema, "type": "object"}, f"f{number}-")
    except GrammarError as error:
        raise GrammarError(f"of the parameters of function {function.name!r}, {error}") from error


def _text(text: str) -> str:
    return literal(text) if text else ""


def _in_set(character: str) -> str:
    return f"\\x{ord(character):02X}"


def _texts_without(marker: str, then: str) -> dict[str, str]:
    """Rules of any text, which is over where the marker ends, and goes on with `then`: `text<n>` is the rest of one
    whose last n characters may be the marker's beginning (as Knuth, Morris and Pratt look for a word)."""
    rules: dict[str, str] = {}
    for state in range(len(marker)):
        reached = {letter: next(_overlaps(marker[:state] + letter, marker)) for letter in sorted(set(marker))}
        onward = {letter: length for letter, length in reached.items() if length > 0}
        ways = ['""', f"[^{''.join(map(_in_set, onward))}] text0"]
        for letter, length in onward.items():
            ways.append(f"[{_in_set(letter)}] " + (then if length == len(marker) else f"text{length}"))
        rules[f"text{state}"] = " | ".join(ways)
    return rules


def _overlaps(text: str, marker: str) -> Iterator[int]:
    """The lengths, the longest first, of the marker's beginnings with which the text ends."""
    return (length for length in range(min(len(text), len(marker)), -1, -1) if text.endswith(marker[:length]))
