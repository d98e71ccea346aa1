"""Grammars without recursion as Python's regular expressions, so that tests can ask what they let through."""

from __future__ import annotations

import re

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]|[A-Za-z0-9-]+|\{[^}]*\}|[()|*+?.]|\s+')
_ESCAPE = re.compile(r"\\(?:x(..)|u(....)|U(.{8})|(.))", re.DOTALL)
_PLAIN = {"n": "\n", "r": "\r", "t": "\t"}


def matches(grammar: str, text: str) -> bool:
    """Whether the grammar lets this text through as a whole."""
    return re.fullmatch(as_regex(grammar), text) is not None


def as_regex(grammar: str) -> str:
    rules = dict(line.split(" ::= ", 1) for line in grammar.split("\n"))
    return _expression(rules, "root", ())


def _expression(rules: dict[str, str], name: str, above: tuple[str, ...]) -> str:
    assert name not in above, f"{name} is recursive"
    parts = []
    for token in _TOKEN.findall(rules[name]):
        if token[0] == '"':
            parts.append(f"(?:{re.escape(_characters(token[1:-1]))})")
        elif token[0] == "[":
            parts.append(_set(token))
        elif token[0].isalnum():
            parts.append(_expression(rules, token, (*above, name)))
        elif not token.isspace():
            parts.append("(?:" if token == "(" else "[\\s\\S]" if token == "." else token)
    return f"(?:{''.join(parts)})"


def _set(token: str) -> str:
    body = _ESCAPE.sub(lambda found: re.escape(_character(found)), token[1:-1])
    return f"[{body}]"


def _characters(text: str) -> str:
    return _ESCAPE.sub(_character, text)


def _character(found: re.Match[str]) -> str:
    code = found[1] or found[2] or found[3]
    return chr(int(code, 16)) if code else _PLAIN.get(found[4], found[4])
