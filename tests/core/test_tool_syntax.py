"""The forms of calls: which template shows which, what their grammars let through, and how answers are read again."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_orch.core.gbnf import GrammarError, check_grammar
from llama_orch.core.tool_reading import CallReader, Piece
from llama_orch.core.tool_syntax import CALLS_MAX, HERMES, LLAMA3, SYNTAXES, Tool, ToolSyntax, syntax_of, tool_grammar
from tests.core.gbnf_regex import matches
from tests.tool_models import TEMPLATES

pytestmark = pytest.mark.spec("HP-OAI-8")

CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 5}}, "required": ["city"]}
TOOLS = [Tool("look", CITY), Tool("wait", None)]
every = pytest.mark.parametrize("syntax", SYNTAXES.values(), ids=SYNTAXES)


def written(syntax: ToolSyntax, calls: Sequence[tuple[str, str]]) -> str:
    """As a model writes them."""
    each = [syntax.before + name + syntax.between + arguments + syntax.after for name, arguments in calls]
    return syntax.begin + (syntax.join or "").join(each) + syntax.end


# -- templates -------------------------------------------------------------------------------------------------------


def test_a_template_shows_its_form() -> None:
    """Each of ours is told from the others."""
    found = {name: syntax_of(template) for name, template in TEMPLATES.items()}
    assert {name: syntax and syntax.name for name, syntax in found.items()} == {name: name for name in SYNTAXES}


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content }}",
        "<tool_call> and arguments, but nothing of what could be called",
        "{% if tools %}<tool_call>\\n<function=name>\\n<parameter=x>{{ arguments }}",  # Qwen 3 Coder
        "{% if tools %}<tool_call>{name}\\n<arg_key>{key}</arg_key>{{ arguments }}",  # GLM 4.5
        "{% for tool in tools %}<\uff5ctool\u2581calls\u2581begin\uff5c>{% endfor %}",  # DeepSeek
    ],
)
def test_other_templates_have_none(template: str) -> None:
    """No tools, or calls in a form that is not known here."""
    assert syntax_of(template) is None


# -- grammars --------------------------------------------------------------------------------------------------------


@every
def test_calls_that_are_required_are_all_that_matches(syntax: ToolSyntax) -> None:
    """Of known functions, with arguments of their schemas; several only where that is meant and known."""
    one = written(syntax, [("look", '{"city": "Oslo"}')])
    both = written(syntax, [("look", '{"city": "Oslo"}'), ("wait", "{}")])
    single = tool_grammar(syntax, TOOLS, is_required=True, is_parallel=False)
    several = tool_grammar(syntax, TOOLS, is_required=True, is_parallel=True)
    check_grammar(single)
    check_grammar(several)
    assert matches(single, one)
    assert matches(single, written(syntax, [("wait", "{}")]))
    assert not matches(single, both)
    assert matches(several, both) == (syntax.join is not None)
    for wrong in (
        "",
        "Oslo",
        f"Well: {one}",
        one + "x",
        one[:-1],
        written(syntax, [("fly", "{}")]),
        written(syntax, [("look", "{}")]),
        written(syntax, [("look", '{"city": "Stavanger"}')]),
        written(syntax, [("wait", '{"a": 1}')]),
        written(syntax, [("wait", "{}")] * (CALLS_MAX + 1)),
    ):
        assert not matches(several, wrong), wrong


class Machine:
    """A grammar of ours of texts, character by character: which of its rules the rest of an answer may be."""

    def __init__(self, grammar: str) -> None:
        self._rules = dict(line.split(" ::= ", 1) for line in grammar.split("\n"))

    def marker_ends(self, text: str) -> int | None:
        """Where calls have to follow; None where the text may end, or go on as any."""
        rule = "text0"
        for place, character in enumerate(text):
            ways = [way.partition("] ") for way in self._rules[rule].split(" | ")[1:]]
            (rule,) = [then for characters, _, then in ways if re.match(characters + "]", character)]
            if rule not in self._rules:
                return place + 1
        assert self._rules[rule].startswith('"" | ')
        return None


@pytest.mark.parametrize(
    "syntax", [one for one in SYNTAXES.values() if not one.opens_answers_only], ids=lambda s: s.name
)
@given(data=st.data())
def test_texts_are_free_up_to_the_marker(syntax: ToolSyntax, data: st.DataObject) -> None:
    """Any text without it, however near it comes, may end anywhere; where it ends, calls follow."""
    parts = [syntax.marker[:n] for n in range(1, len(syntax.marker) + 1)]
    text = "".join(data.draw(st.lists(st.sampled_from([*parts, "x", "\n", "é"]), max_size=8)))
    grammar = tool_grammar(syntax, TOOLS, is_required=False, is_parallel=True)
    check_grammar(grammar)
    at = text.find(syntax.marker)
    assert Machine(grammar).marker_ends(text) == (None if at < 0 else at + len(syntax.marker))


def test_an_answer_that_does_not_begin_as_a_call_is_text() -> None:
    """Where a brace is all that marks calls."""
    grammar = tool_grammar(LLAMA3, TOOLS, is_required=False, is_parallel=True)
    check_grammar(grammar)
    for text in ("", "Hello {", written(LLAMA3, [("wait", "{}")])):
        assert matches(grammar, text)
    assert not matches(grammar, "{}")
    assert not matches(grammar, '{"name": "fly", "parameters": {}}')


def test_an_answer_in_a_form_may_be_a_call_instead() -> None:
    """And nothing else."""
    form = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    grammar = tool_grammar(HERMES, TOOLS, is_required=False, is_parallel=False, answer_schema=form)
    assert matches(grammar, '{"a": 1}')
    assert matches(grammar, written(HERMES, [("wait", "{}")]))
    assert not matches(grammar, "Well")


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "string"}, "function 'look' are not of type object"),
        ({"$ref": "#/$defs/x"}, "function 'look' are not of type object"),
        ({"type": "object", "properties": {"a": {"type": "string", "not": {}}}}, "function 'look', at #/properties/a"),
        ({"type": "object", "properties": {"a": {"enum": list(range(1000))}}}, "more than 512 values"),
    ],
)
def test_what_cannot_be_kept_is_refused(schema: dict[str, Any], reason: str) -> None:
    """With the function and the place."""
    with pytest.raises(GrammarError, match=re.escape(reason)):
        tool_grammar(HERMES, [Tool("look", schema)], is_required=True, is_parallel=False)


# -- reading ---------------------------------------------------------------------------------------------------------


def read(reader: CallReader, text: str, cuts: Sequence[int]) -> list[Piece]:
    pieces: list[Piece] = []
    for begin, end in itertools.pairwise([0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]):
        pieces += reader.feed(text[begin:end])
    return pieces + reader.flush()


def called(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """Names and arguments; each call begins with its name and an ID of its own."""
    found: dict[int, list[str]] = {}
    for piece in pieces:
        for call in piece.calls or ():
            if call.name is not None:
                assert (call.index, call.call_id) == (len(found), f"id{call.index}")
                found[call.index] = [call.name, ""]
            found[call.index][1] += call.arguments
    return [(name, arguments) for name, arguments in found.values()]


cuts = st.lists(st.integers(0, 200), max_size=12)
arguments = st.sampled_from(["{}", '{"a": "}\\"{"}', '{"a": [{"b": 1}, "\\\\"]}', '{"é": "</tool_call>"}'])
calls_made = st.lists(st.tuples(st.sampled_from(["look", "a-1_B"]), arguments), min_size=1, max_size=3)


@every
@given(said=st.sampled_from(["", "Well. ", "<tool_cal[TOOL_CALLS ", "x < y"]), calls=calls_made, cuts=cuts)
def test_calls_are_read_as_they_were_written(
    syntax: ToolSyntax, said: str, calls: list[tuple[str, str]], cuts: list[int]
) -> None:
    """However the answer comes in pieces, which together are all of it; what is said before is text."""
    said = "" if syntax.opens_answers_only else said
    calls = calls if syntax.join is not None else calls[:1]
    text = said + written(syntax, calls)
    pieces = read(CallReader(syntax, lambda index: f"id{index}"), text, cuts)
    assert "".join(piece.text for piece in pieces) == text
    assert "".join(piece.text for piece in pieces if piece.calls is None) == said
    assert called(pieces) == calls


@every
@given(text=st.sampled_from(["", "Hello", "<tool_cal", "[TOOL", "[TOOL_CALL<tool_cal", "well {"]), cuts=cuts)
def test_what_is_no_call_is_text(syntax: ToolSyntax, text: str, cuts: list[int]) -> None:
    """Also what looked like one until the end."""
    pieces = read(CallReader(syntax, str), text, cuts)
    assert all(piece.calls is None for piece in pieces)
    assert "".join(piece.text for piece in pieces) == text


def test_an_answer_in_a_form_may_speak_of_calls() -> None:
    """Only where it begins there is one."""
    text = '{"a": "<tool_call>"}'
    assert called(read(CallReader(HERMES, str, opens_only=True), text, [])) == []


@every
@given(length=st.integers(0, 80), cuts=cuts)
def test_an_answer_that_is_cut_off_has_what_there_is(syntax: ToolSyntax, length: int, cuts: list[int]) -> None:
    """The beginning of the same call; nothing is invented."""
    text = written(syntax, [("look", '{"city": "Oslo"}')])[:length]
    pieces = read(CallReader(syntax, lambda index: f"id{index}"), text, cuts)
    assert "".join(piece.text for piece in pieces) == text
    for name, said in called(pieces):
        assert name == "look"
        assert '{"city": "Oslo"}'.startswith(said)
