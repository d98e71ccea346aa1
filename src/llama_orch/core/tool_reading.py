"""Reads calls of tools out of an answer as it comes, in the form that a grammar holds it to (core/tool_syntax.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from llama_orch.core.tool_syntax import ToolSyntax


@dataclass(frozen=True, slots=True)
class CallPiece:
    """What comes to a call: `call_id` and `name` once, at its beginning; then pieces of its arguments."""

    index: int
    call_id: str | None = None
    name: str | None = None
    arguments: str = ""


class Piece(NamedTuple):
    """A piece of the answer. `calls` None: it is plain text."""

    text: str
    calls: list[CallPiece] | None = None


class _Part(Enum):
    PLAIN = auto()  # there are no calls, or not yet
    HEAD = auto()  # up to a name
    NAME = auto()
    ARGUMENTS = auto()
    TAIL = auto()  # behind the arguments
    OVER = auto()  # behind the last call, or what no grammar of ours lets through


class CallReader:
    """Of one answer. `new_id` makes the ID of the call at an index. `opens_only`: calls begin where the answer does, as
    where texts without calls have a form of their own, which may hold anything."""

    def __init__(self, syntax: ToolSyntax, new_id: Callable[[int], str], *, opens_only: bool = False) -> None:
        self._syntax = syntax
        self._new_id = new_id
        self._opens_only = opens_only or syntax.opens_answers_only
        self._part = _Part.PLAIN
        self._kept = ""  # not understood yet: in PLAIN not yet said either
        self._has_said = False
        self._index = 0
        self._depth = 0
        self._in_string = self._is_escaped = False

    def feed(self, text: str) -> list[Piece]:
        """The pieces that are complete with this text; together they are the answer."""
        if self._part is not _Part.PLAIN:
            return [Piece(text, list(self._read(text)))] if text else []
        self._kept += text
        at = self._marker_at()
        if at is None:
            said = self._kept[: len(self._kept) - self._undecided()]
            self._kept = self._kept[len(said) :]
            self._has_said |= bool(said)
            return [Piece(said)] if said else []
        said, opened = self._kept[:at], self._kept[at:]
        self._part, self._kept = _Part.HEAD, ""
        return [*([Piece(said)] if said else []), Piece(opened, list(self._read(opened)))]

    def flush(self) -> list[Piece]:
        """What was held back, now that the answer is over."""
        rest, self._kept = self._kept if self._part is _Part.PLAIN else "", ""
        return [Piece(rest)] if rest else []

    def _marker_at(self) -> int | None:
        if self._opens_only:
            return 0 if not self._has_said and self._kept.startswith(self._syntax.marker) else None
        at = self._kept.find(self._syntax.marker)
        return None if at < 0 else at

    def _undecided(self) -> int:
        """How many of the last characters may be the marker's beginning."""
        marker, kept = self._syntax.marker, self._kept
        if self._opens_only:
            return len(kept) if not self._has_said and marker.startswith(kept) else 0
        longest = min(len(marker) - 1, len(kept))
        return next((length for length in range(longest, 0, -1) if kept.endswith(marker[:length])), 0)

    def _read(self, text: str) -> Iterator[CallPiece]:
        self._kept += text
        has_moved = True
        while has_moved:
            part, held = self._part, len(self._kept)
            match part:
                case _Part.HEAD:
                    self._expect(self._syntax.opening)
                case _Part.NAME:
                    yield from self._name()
                case _Part.ARGUMENTS:
                    yield from self._arguments()
                case _Part.TAIL:
                    join = self._syntax.join
                    self._expect(self._syntax.after + (join or "") + self._syntax.before if join is not None else None)
                case _:
                    self._kept = ""
            has_moved = bool(self._kept) and (self._part, len(self._kept)) != (part, held)

    def _expect(self, words: str | None) -> None:
        """A name follows behind these words; anything else ends the calls."""
        if words is not None and self._kept.startswith(words):
            self._kept = self._kept[len(words) :]
            self._part = _Part.NAME
        elif words is None or not words.startswith(self._kept):
            self._part = _Part.OVER

    def _name(self) -> Iterator[CallPiece]:
        name, found, rest = self._kept.partition(self._syntax.between)
        if found:
            self._kept = rest
            self._part = _Part.ARGUMENTS
            yield CallPiece(self._index, self._new_id(self._index), name)

    def _arguments(self) -> Iterator[CallPiece]:
        end = self._end_of_object()
        said, self._kept = self._kept[:end], self._kept[end:]
        if said:
            yield CallPiece(self._index, arguments=said)
        if self._depth == 0 and said:
            self._part = _Part.TAIL
            self._index += 1

    def _end_of_object(self) -> int:
        """Behind the brace that closes the arguments, or all that is there."""
        for at, character in enumerate(self._kept):
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._is_escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return at + 1
        return len(self._kept)
