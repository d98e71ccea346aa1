"""Pieces of GBNF from values."""

from __future__ import annotations


def literal(text: str) -> str:
    """A GBNF literal."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c >= " " and c != "\x7f" else f"\\x{ord(c):02X}" for c in escaped) + '"'


def count(least: int, most: int | None) -> str:
    return f"{{{least},}}" if most is None else f"{{{least},{most}}}"


def list_of(item: str, least: int, most: int | None) -> str:
    """So many items, with commas between them."""
    more = count(max(0, least - 1), None if most is None else most - 1)
    text = f"{item} (comma {item}){more}" if most != 1 else item
    return text if least else f"({text})?"


def whole_numbers(low: int, high: int) -> list[str]:
    """GBNF alternatives for the whole numbers from low to high, neither negative."""
    found: list[str] = []
    while low <= high:
        # The longest run from here on whose last digits are all free.
        free = 0
        while low % 10 ** (free + 1) == 0 and low + 10 ** (free + 1) - 1 <= high and len(str(low)) > free + 1:
            free += 1
        step = 10**free
        last = low // step % 10
        top = min(9, last + (high - low - step + 1) // step)
        head = str(low // step)[:-1]
        parts = [f'"{head}"'] * bool(head) + [f"[{last}-{top}]"] + [f"[0-9]{{{free}}}"] * bool(free)
        found.append(" ".join(parts))
        low += (top - last + 1) * step
    return found
