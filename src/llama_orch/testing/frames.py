"""A stream's bytes as a client reads them, and what is wrong with them (HP-STR-1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

_decode = msgspec.json.Decoder().decode
LAST = ("end", "error")


class Seen(NamedTuple):
    """One frame."""

    number: int
    event: str
    data: dict[str, Any]


class BadStream(Exception):
    """The bytes are no frames."""


def parse(raw: bytes) -> list[Seen]:
    """Frames in order; BadStream on anything that is not exactly `id`, `event`, `data`."""
    *blocks, rest = raw.decode().split("\n\n")
    found = []
    for block in blocks:
        lines = block.split("\n")
        if [line.partition(": ")[0] for line in lines] != ["id", "event", "data"]:
            raise BadStream(f"not a frame: {block[:80]!r}")
        number, event, data = (line.partition(": ")[2] for line in lines)
        found.append(Seen(int(number), event, _decode(data)))
    if rest:
        raise BadStream(f"an unfinished frame: {rest[:80]!r}")
    return found


def tokens(frames: Sequence[Seen]) -> list[str]:
    return [frame.data["t"] for frame in frames if frame.event == "token"]


def problems(frames: Sequence[Seen]) -> Iterator[str]:
    """What breaks the promise of a whole stream: started first, one last frame, no gaps, no step back."""
    names = [frame.event for frame in frames]
    if names[:1] != ["started"] or names.count("started") != 1:
        yield f"does not begin with its only `started`: {names[:5]}"
    if names[-1:] not in ([last] for last in LAST):
        yield f"does not end with `end` or `error`: {names[-5:]}"
    if (count := sum(name in LAST for name in names)) != 1:
        yield f"has {count} last frames"
    indices = [frame.data["i"] for frame in frames if frame.event == "token"]
    if indices != list(range(len(indices))):
        yield f"its tokens are counted {indices}"
    numbers = [frame.number for frame in frames]
    if numbers != sorted(set(numbers)):
        yield f"its frames are numbered {numbers}"
    if names[-2:-1] != ["metrics"]:
        yield f"has no `metrics` before its last frame: {names[-5:]}"
    if names[-1:] == ["end"] and not frames[-1].data["tokens_out"] >= len(indices):
        yield f"ends with {frames[-1].data['tokens_out']} tokens after {len(indices)} token frames"
