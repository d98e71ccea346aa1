"""Regular expressions of JSON Schema (`pattern`) as GBNF, for the inside of a JSON string.

The answer matches the expression as a whole, also where the expression leaves its ends open: what it matches so is some
of what it may match. Characters that JSON would have to escape (quote, backslash, controls) are left out of every set.
"""

from __future__ import annotations

import re

from llama_orch.core.gbnf import DEPTH_MAX, REPEATS_MAX, GrammarError

PATTERN_CHARS_MAX = 1024

_ANY = r'[^"\\\x00-\x1F\x7F]'
_CLASSES = {"d": "0-9", "w": "A-Za-z0-9_", "s": " "}  # of what \s means, JSON writes only the blank as it is
_CONTROLS = {"t", "n", "r", "f", "v", "0"}
_COUNT = re.compile(r"\{(\d{1,4})(,)?(\d{1,4})?\}")
_PLAIN_IN_SET = re.compile(r"[A-Za-z0-9 _]")


def pattern_to_gbnf(pattern: str) -> str:
    """One GBNF expression. Raises GrammarError for what it cannot say."""
    if len(pattern) > PATTERN_CHARS_MAX:
        raise GrammarError(f"`pattern` has more than {PATTERN_CHARS_MAX} characters")
    text = pattern.removeprefix("^")
    if text.endswith("$") and (len(text) - len(text[:-1].rstrip("\\"))) % 2 == 1:
        text = text[:-1]
    reader = _Reader(pattern, text)
    made = reader.alternatives(0)
    reader.finish()
    return made


class _Reader:
    def __init__(self, pattern: str, text: str) -> None:
        self._pattern = pattern
        self._text = text
        self._at = 0

    def finish(self) -> None:
        if self._at < len(self._text):
            raise self._cannot("a parenthesis that closes nothing")

    def alternatives(self, depth: int) -> str:
        if depth > DEPTH_MAX:
            raise self._cannot("so many nested groups")
        found = [self._sequence(depth)]
        while self._next("|"):
            found.append(self._sequence(depth))
        return f"({' | '.join(found)})"

    def _sequence(self, depth: int) -> str:
        found: list[str] = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            found.append(self._item(depth) + self._count())
        return " ".join(found) or '""'

    def _item(self, depth: int) -> str:
        sign = self._take()
        if sign == "(":
            if self._next("?") and not self._next(":"):
                raise self._cannot("`(?`: look-around, names and flags")
            group = self.alternatives(depth + 1)
            if not self._next(")"):
                raise self._cannot("a group that is not closed")
            return group
        if sign == "[":
            return self._set()
        if sign == ".":
            return _ANY
        if sign == "\\":
            kind = self._take()
            return self._class(kind) or _literal(self._escaped(kind))
        if sign in "^$":
            raise self._cannot("an anchor in the middle")
        if sign in "*+?":
            raise self._cannot(f"`{sign}` behind nothing")
        return _literal(sign)

    def _class(self, kind: str) -> str | None:
        if kind in _CLASSES:
            return f"[{_CLASSES[kind]}]"
        if kind.lower() in _CLASSES:
            return rf'[^{_CLASSES[kind.lower()]}"\\\x00-\x1F\x7F]'
        return None

    def _escaped(self, kind: str) -> str:
        """The character that an escape outside of the classes stands for."""
        if kind in ("u", "x"):
            digits = self._text[self._at : self._at + (4 if kind == "u" else 2)]
            self._at += len(digits)
            if not re.fullmatch(r"[0-9A-Fa-f]{2}|[0-9A-Fa-f]{4}", digits):
                raise self._cannot(f"\\{kind} without its digits")
            return chr(int(digits, 16))
        if kind in _CONTROLS:
            raise self._cannot(f"\\{kind}, which JSON cannot write as it is")
        if kind.isalnum():
            raise self._cannot(f"\\{kind}")
        return kind

    def _set(self) -> str:
        is_negated = self._next("^")
        parts: list[str] = []
        while not self._next("]"):
            sign = self._take()
            if sign == "\\":
                kind = self._take()
                if kind in _CLASSES:
                    parts.append(_CLASSES[kind])
                    continue
                sign = self._escaped(kind)
            low = high = sign
            if self._text.startswith("-", self._at) and not self._text.startswith("-]", self._at):
                self._at += 1
                high = self._take()
                high = self._escaped(self._take()) if high == "\\" else high
            if low > high:
                raise self._cannot("a range that ends before it begins")
            parts.append(_in_set(low) if low == high else f"{_in_set(low)}-{_in_set(high)}")
            if not is_negated and any(low <= bad <= high for bad in '"\\\x1f\x7f'):
                raise self._cannot("a set with a quote, a backslash or a control character, which JSON escapes")
        if not parts and not is_negated:
            raise self._cannot("an empty set")
        return rf'[^{"".join(parts)}"\\\x00-\x1F\x7F]' if is_negated else f"[{''.join(parts)}]"

    def _count(self) -> str:
        found = next((sign for sign in "*+?" if self._next(sign)), "")
        if counts := _COUNT.match(self._text, self._at):
            if found:
                raise self._cannot("a count of a count")
            self._at = counts.end()
            if max(int(counts[1]), int(counts[3] or 0)) > REPEATS_MAX:
                raise self._cannot(f"more than {REPEATS_MAX} repetitions")
            found = counts[0]
        self._next("?")  # as few as possible or as many: the same texts match
        if self._at < len(self._text) and self._text[self._at] in "*+?":
            raise self._cannot("a count of a count")
        return found

    def _next(self, sign: str) -> bool:
        is_next = self._text.startswith(sign, self._at)
        self._at += len(sign) if is_next else 0
        return is_next

    def _take(self) -> str:
        if self._at >= len(self._text):
            raise self._cannot("an end in the middle of something")
        self._at += 1
        return self._text[self._at - 1]

    def _cannot(self, what: str) -> GrammarError:
        return GrammarError(f"`pattern` {self._pattern[:80]!r} has {what}, which is not taken")


def _literal(character: str) -> str:
    """As it stands in a JSON string."""
    if ord(character) < 0x20 or character == "\x7f":
        raise GrammarError("`pattern` has a control character, which JSON cannot write as it is")
    if character in '"\\':
        return rf'"\\\{character}"'
    return f'"{character}"'


def _in_set(character: str) -> str:
    return character if _PLAIN_IN_SET.fullmatch(character) else f"\\U{ord(character):08X}"
