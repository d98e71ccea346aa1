"""Reads GBNF grammars, as far as it takes to refuse those that could hurt an engine or that nothing can match.

llama.cpp answers some grammars by growing without end (left recursion behind something that may be empty), by running
out of its stack (deep nesting), or by an answer that follows no grammar. What is found here costs no process and has a
clear reason; what only shows while text is made is left to the trial (engines/trials.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

GRAMMAR_BYTES_MAX = 1 << 16  # the contract's limit counts characters
RULES_MAX = 4096
ELEMENTS_MAX = 16384
DEPTH_MAX = 64  # of parentheses
REPEATS_MAX = 2000  # llama.cpp refuses more
# Ways to go on that have to be kept apart after one character. Each is a stack in llama.cpp, and it compares them pair
# by pair: with 200 it spent a quarter of a second on a token, with 1,500 it did not come back.
WAYS_MAX = 512

_NAME = re.compile(r"[A-Za-z0-9-]+")
_BLANK = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_BLANK_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_ESCAPE = re.compile(r'\\(?:x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|[trn\\"\[\]])')
_COUNT = re.compile(r"\{[ \t]*(\d{1,9})[ \t]*(?:(,)[ \t]*(\d{1,9})?[ \t]*)?\}")


class GrammarError(ValueError):
    """Why the grammar is refused, as a sentence for who sent it."""


@dataclass(frozen=True, slots=True)
class Element:
    """One item of a sequence, a rule's name or else characters, with how often it may come."""

    least: int = 1
    most: int | None = 1  # None: without a bound
    name: str | None = None
    is_void: bool = False  # a set of no characters


Items = tuple[Element, ...]
Rules = Mapping[str, tuple[Items, ...]]


def check_grammar(text: str) -> None:
    """Raises GrammarError for what must not reach an engine."""
    if len(text.encode(errors="surrogatepass")) > GRAMMAR_BYTES_MAX:
        raise GrammarError(f"it has more than {GRAMMAR_BYTES_MAX} bytes; shorten it")
    if text.lstrip().startswith("%"):
        raise GrammarError("it is not GBNF; other kinds of grammars are not taken")
    rules = _Reader(text).rules()
    if "root" not in rules:
        raise GrammarError("it has no rule `root`, which is where an answer begins")
    for element in (one for alternatives in rules.values() for sequence in alternatives for one in sequence):
        if element.name is not None and element.name not in rules:
            raise GrammarError(f"it has no rule {element.name!r}")
    nullable = _derivable(rules, are_characters_fine=False)
    order = _check_recursion(rules, nullable)
    if "root" not in _derivable(rules, are_characters_fine=True):
        raise GrammarError("no answer that comes to an end can match it")
    _check_ways(rules, nullable, order)


# -- reading -----------------------------------------------------------------------------------------------------------


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._elements = 0
        self._name = ""  # of the rule that is being read
        self._rules: dict[str, tuple[Items, ...]] = {}

    def rules(self) -> dict[str, tuple[Items, ...]]:
        named = 0
        self._skip(_BLANK_LINES)
        while self._at < len(self._text):
            name = self._take(_NAME, "the name of a rule")
            self._skip(_BLANK)
            self._expect("::=")
            self._skip(_BLANK_LINES)
            if name in self._rules:
                raise GrammarError(f"the rule {name!r} is there twice")
            named += 1
            if named > RULES_MAX:
                raise GrammarError(f"it has more than {RULES_MAX} rules")
            self._name = name
            self._rules[name] = self._alternatives(0)
            if self._at < len(self._text) and self._text[self._at] not in "\r\n":
                raise self._wrong("the end of the rule")
            self._skip(_BLANK_LINES)
        return self._rules

    def _alternatives(self, depth: int) -> tuple[Items, ...]:
        if depth > DEPTH_MAX:
            raise GrammarError(f"it is nested more than {DEPTH_MAX} deep")
        found = [self._sequence(depth)]
        while self._text.startswith("|", self._at):
            self._at += 1
            self._skip(_BLANK_LINES)
            found.append(self._sequence(depth))
        return tuple(found)

    def _sequence(self, depth: int) -> Items:
        found: list[Element] = []
        blank = _BLANK_LINES if depth else _BLANK
        while (element := self._element(depth)) is not None:
            self._skip(blank)
            element = self._repeated(element, blank)
            self._elements += 1
            if self._elements > ELEMENTS_MAX:
                raise GrammarError(f"it has more than {ELEMENTS_MAX} parts")
            found.append(element)
        return tuple(found)

    def _element(self, depth: int) -> Element | None:
        first = self._text[self._at : self._at + 1]
        if first == '"':
            return self._literal()
        if first == "[":
            return self._set()
        if first == ".":
            self._at += 1
            return Element()
        if first == "(":
            self._at += 1
            self._skip(_BLANK_LINES)
            group = self._alternatives(depth + 1)
            self._expect(")")
            return self._grouped(group)
        if first and (name := _NAME.match(self._text, self._at)):
            self._at = name.end()
            return Element(name=name[0])
        if first and first not in "|)\r\n":
            raise self._wrong("a rule, a text, a set or a group")
        return None

    def _literal(self) -> Element:
        self._at += 1
        count = 0
        while not self._text.startswith('"', self._at):
            self._character()
            count += 1
        self._at += 1
        return Element() if count else self._grouped(((),))

    def _grouped(self, alternatives: tuple[Items, ...]) -> Element:
        """A group is a rule without a name of its own. Rules' names have no parentheses."""
        name = f"{self._name} ({len(self._rules)})"
        self._rules[name] = alternatives
        return Element(name=name)

    def _set(self) -> Element:
        self._at += 1
        is_negated = self._text.startswith("^", self._at)
        self._at += is_negated
        ranges: list[tuple[int, int]] = []
        while not self._text.startswith("]", self._at):
            low = high = self._character()
            if self._text.startswith("-", self._at) and not self._text.startswith("]", self._at + 1):
                self._at += 1
                high = self._character()
            ranges.append((low, high))
        self._at += 1
        is_void = _covers_all(ranges) if is_negated else all(low > high for low, high in ranges)
        return Element(is_void=is_void)

    def _character(self) -> int:
        if self._at >= len(self._text) or self._text[self._at] in "\r\n\0":
            raise self._wrong("a character")
        if self._text[self._at] != "\\":
            self._at += 1
            return ord(self._text[self._at - 1])
        escape = self._take(_ESCAPE, "an escape that GBNF knows")
        return int(escape[2:], 16) if escape[1] in "xuU" else ord(escape[1].translate(_ESCAPED))

    def _repeated(self, element: Element, blank: re.Pattern[str]) -> Element:
        while self._at < len(self._text) and self._text[self._at] in "*+?{":
            sign = self._text[self._at]
            if sign == "{":
                counts = _COUNT.match(self._text, self._at)
                if counts is None:
                    raise self._wrong("a count such as {1,3}")
                self._at = counts.end()
                least = int(counts[1])
                most = least if counts[2] is None else None if counts[3] is None else int(counts[3])
            else:
                self._at += 1
                least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign]
            if max(least, most or 0) > REPEATS_MAX:
                raise GrammarError(f"something is repeated more than {REPEATS_MAX} times")
            if most is not None and least > most:
                raise GrammarError(f"a count ends below its beginning ({least} and {most})")
            again = element if (element.least, element.most) == (1, 1) else self._grouped(((element,),))
            element = Element(least, most, again.name, again.is_void)
            self._skip(blank)
        return element

    def _skip(self, blank: re.Pattern[str]) -> None:
        found = blank.match(self._text, self._at)
        self._at = found.end() if found else self._at

    def _take(self, pattern: re.Pattern[str], what: str) -> str:
        found = pattern.match(self._text, self._at)
        if found is None:
            raise self._wrong(what)
        self._at = found.end()
        return found[0]

    def _expect(self, sign: str) -> None:
        if not self._text.startswith(sign, self._at):
            raise self._wrong(repr(sign))
        self._at += len(sign)

    def _wrong(self, expected: str) -> GrammarError:
        line = self._text.count("\n", 0, self._at) + 1
        column = self._at - self._text.rfind("\n", 0, self._at)
        return GrammarError(f"in line {line}, column {column}, {expected} is expected")


_ESCAPED = str.maketrans({"t": "\t", "r": "\r", "n": "\n"})


def _covers_all(ranges: list[tuple[int, int]]) -> bool:
    """Whether nothing is left beside them; a NUL does not count."""
    reached = 1
    for low, high in sorted(ranges):
        if low > reached:
            return False
        reached = max(reached, high + 1)
    return reached > 0x10FFFF


# -- judging -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Waiting:
    """An alternative of this rule, and how many of its parts are not known to come to an end."""

    name: str
    left: int


def _derivable(rules: Rules, *, are_characters_fine: bool) -> set[str]:
    """The rules that can come to an end: with characters where those are fine, else without any. Each alternative
    waits for the rules that it needs, so the time grows with the text and no faster."""
    waits: dict[str, list[_Waiting]] = {}
    found: set[str] = set()
    ready: list[str] = []
    for name, alternatives in rules.items():
        for sequence in alternatives:
            needed = [one for one in sequence if one.least > 0]
            if any(one.name is None and (one.is_void or not are_characters_fine) for one in needed):
                continue
            names = [one.name for one in needed if one.name is not None]
            if not names:
                ready.append(name)
            waiting = _Waiting(name, len(names))
            for one in names:
                waits.setdefault(one, []).append(waiting)
    while ready:
        name = ready.pop()
        if name in found:
            continue
        found.add(name)
        for waiting in waits.get(name, ()):
            waiting.left -= 1
            if waiting.left == 0:
                ready.append(waiting.name)
    return found


def _may_be_empty(element: Element, nullable: set[str]) -> bool:
    return element.least == 0 or element.name in nullable


def _first_names(alternatives: tuple[Items, ...], nullable: set[str]) -> Iterator[str]:
    """Rules that may begin at the same place."""
    for sequence in alternatives:
        for element in sequence:
            if element.name is not None:
                yield element.name
            if not _may_be_empty(element, nullable):
                break


def _check_recursion(rules: Rules, nullable: set[str]) -> Sequence[str]:
    """Left recursion, also where what stands before may be empty: llama.cpp finds only some, and grows at the rest.
    Returns the names in an order in which what may begin a rule comes before it."""
    begins = {name: set(_first_names(alternatives, nullable)) for name, alternatives in rules.items()}
    done: dict[str, None] = {}
    for start in rules:
        path: list[tuple[str, Iterator[str]]] = [(start, iter(begins[start]))] if start not in done else []
        on_path = {start}
        while path:
            name, rest = path[-1]
            following = next(rest, None)
            if following is None:
                path.pop()
                on_path.discard(name)
                done[name] = None
            elif following in on_path:
                raise GrammarError(f"the rule {_shown(following)} begins with itself")
            elif following not in done:
                path.append((following, iter(begins[following])))
                on_path.add(following)
    return list(done)


def _check_ways(rules: Rules, nullable: set[str], order: Sequence[str]) -> None:
    """Bounds how many places of the grammar the next character may be at, wherever an answer stands."""
    ways: dict[str, int] = {}

    def of(element: Element) -> int:
        if element.name is None:
            return 1
        return ways[element.name] * (element.most or 1) if element.name in nullable else ways[element.name]

    for name in order:  # what may begin a rule comes before that rule
        total = 0
        for sequence in rules[name]:
            for element in sequence:
                total += of(element)
                if not _may_be_empty(element, nullable):
                    break
        ways[name] = min(WAYS_MAX + 1, total)
    for name, alternatives in rules.items():
        most = ways[name]
        for sequence in alternatives:
            here = 0
            for element in reversed(sequence):
                here = of(element) + (here if _may_be_empty(element, nullable) else 0)
                most = max(most, here)
        if most > WAYS_MAX:
            raise GrammarError(
                f"the rule {_shown(name)} leaves more than {WAYS_MAX} ways open at one place; use fewer alternatives "
                "and optional parts there"
            )


def _shown(name: str) -> str:
    return repr(name.partition(" ")[0])
