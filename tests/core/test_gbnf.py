"""Grammars: what is refused before anything is tried, and that it costs next to nothing to find out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_orch.core.gbnf import DEPTH_MAX, ELEMENTS_MAX, REPEATS_MAX, RULES_MAX, WAYS_MAX, GrammarError, check_grammar
from llama_orch.core.json_schema import json_schema_to_gbnf
from tests.hostile import GRAMMARS, KEPT

pytestmark = pytest.mark.spec("HP-ADM-7")

# They only show while text is made, in a trial.
NEED_A_TRIAL = {"300 stars", "100 stars", "ambiguous"}

JSON = r"""
root   ::= object   # any of it
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= "yes" | "no"',
        JSON,
        'root ::= (\n  [a-z]+ # a word\n  | "-"\n)*',
        'root ::= "\\u00e9\\U0001F98A\\x41\\\\\\"\\t" .{1,3} [^\\]a-]',
        'root ::= list\nlist ::= item list | ""\nitem ::= "- " [^\\n]{1,80} "\\n"',
        "root ::= [a-]* ([-a])?\r\n",
        f"root ::= {' | '.join(['[a-z]'] * WAYS_MAX)}",
        f'root ::= {"(" * DEPTH_MAX}"a"{")" * DEPTH_MAX}',
        f'root ::= "a"{{0,{REPEATS_MAX}}}',
        'root ::= a?\na ::= b*\nb ::= "c"{2,}',
        *(json_schema_to_gbnf(schema) for schema in KEPT.values()),
    ],
)
def test_a_harmless_one_passes(grammar: str) -> None:
    """llama.cpp's own grammar of JSON, characters of all kinds, and the largest ones that may be."""
    check_grammar(grammar)


@pytest.mark.parametrize("name", sorted(GRAMMARS.keys() - NEED_A_TRIAL))
def test_a_hostile_one_is_refused(name: str) -> None:
    """With a sentence, and without an engine."""
    with pytest.raises(GrammarError, match=r"\w+ \w+"):
        check_grammar(GRAMMARS[name])


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        ('start ::= "a"', "it has no rule `root`"),
        ('root ::= "a" x', "it has no rule 'x'"),
        ('root ::= "a"\nroot ::= "b"', "the rule 'root' is there twice"),
        ('root ::= "a"\nx ::= "b', "in line 2, column 9, a character"),
        ('root ::= "\\q"', "an escape that GBNF knows"),
        ("root ::= [a", "in line 1, column 12, a character"),
        ('root ::= "a" ) "b"', "the end of the rule"),
        ('root ::= "a"{x}', r"a count such as \{1,3\}"),
        ('root ::= "a"{3,1}', r"a count ends below its beginning \(3 and 1\)"),
        (f'root ::= "a"{{{REPEATS_MAX + 1}}}', f"more than {REPEATS_MAX} times"),
        ('root ::= ("b" root)? root "a"', "the rule 'root' begins with itself"),
        ('root ::= ([z-a] | x) "a"\nx ::= "b" x', "no answer that comes to an end"),
        (f"root ::= {' | '.join(['[a-z]'] * (WAYS_MAX + 1))}", f"more than {WAYS_MAX} ways"),
        (f'root ::= "x" "y" {" ".join(["[a-z]?"] * (WAYS_MAX + 1))}', f"more than {WAYS_MAX} ways"),
        (f'root ::= {"(" * (DEPTH_MAX + 1)}"a"{")" * (DEPTH_MAX + 1)}', f"nested more than {DEPTH_MAX} deep"),
        ("\n".join(["root ::= .", *(f"r{i} ::= ." for i in range(RULES_MAX))]), f"more than {RULES_MAX} rules"),
        (f"root ::= {'. ' * (ELEMENTS_MAX + 1)}", f"more than {ELEMENTS_MAX} parts"),
        ('root ::= "a"\n<|think|>', "in line 2, column 1, the name of a rule"),
    ],
)
def test_the_reason_says_what_and_where(grammar: str, says: str) -> None:
    """A person can mend it."""
    with pytest.raises(GrammarError, match=says):
        check_grammar(grammar)


def _chain(n: int) -> str:
    return "\n".join(["root ::= r0", *(f'r{i} ::= "a" r{i + 1} |' for i in range(n)), f'r{n} ::= "b"']).replace(
        "|", "| ."
    )


@pytest.mark.parametrize(
    "of_size",
    [
        _chain,
        lambda n: "\n".join([f'r{i} ::= "a" r{i + 1}?' for i in reversed(range(n))] + [f'r{n} ::= "b"', "root ::= r0"]),
        lambda n: f"root ::= {'x ' * n}\nx ::= . | {' '.join(['y'] * 5)}\ny ::= .",
        lambda n: "root ::= x\nx ::= " + "(. " * 60 + "a " * n + ")" * 60 + "\na ::= .",
    ],
)
def test_the_work_grows_with_the_text_and_no_faster(of_size: Callable[[int], str]) -> None:
    """Counted in calls of Python functions, for a machine has other things to do: five times as long a grammar takes
    about five times as many, and not twenty-five."""
    small, large = (_calls(check_grammar, of_size(n)) for n in (500, 2500))
    assert large < 8 * small


def _calls(function: Callable[[str], None], text: str) -> int:
    count = 0

    def see(frame: Any, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(see)
    try:
        function(text)
    finally:
        sys.setprofile(None)
    return count


@given(st.text(alphabet='root:= "ab[]()|*+?{,}0123\\^-.\n#x', max_size=60))
def test_nothing_but_a_grammar_error_is_raised(text: str) -> None:
    """Whatever is sent is judged."""
    with suppress(GrammarError):
        check_grammar(f"root ::= {text}")
