"""Stop strings over a text that arrives in pieces: what can be shown, what must be held back, where it ends."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Feed pieces, show what comes back. Text that could be the start of a stop string is held back until it is
    certain; the stop string itself is never shown. Of several matches the one that begins first counts."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.has_matched = False
        self._strings = tuple(string for string in strings if string)
        self._held = ""

    def feed(self, piece: str) -> str:
        """The text that can be shown now. Nothing may be fed once `has_matched` is true."""
        if not self._strings:
            return piece
        text = self._held + piece
        starts = [start for start in (text.find(string) for string in self._strings) if start >= 0]
        if starts:
            self.has_matched = True
            self._held = ""
            return text[: min(starts)]
        keep = max(_overlap(text, string) for string in self._strings)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, once no more can come."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `string`."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)
