"""Reads a stream's bytes as a client would."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec


class Seen(NamedTuple):
    number: int
    event: str
    data: dict[str, Any]


def parse(raw: bytes) -> list[Seen]:
    """Frames in order; fails on anything that is not exactly `id`, `event`, `data`."""
    found = []
    for block in raw.decode().split("\n\n")[:-1]:
        number, event, data = block.split("\n")
        assert number.startswith("id: ")
        assert event.startswith("event: ")
        assert data.startswith("data: ")
        found.append(Seen(int(number[4:]), event[7:], msgspec.json.decode(data[6:])))
    return found


def events(frames: list[Seen]) -> list[str]:
    return [frame.event for frame in frames]


def text(frames: list[Seen]) -> str:
    return "".join(frame.data["t"] for frame in frames if frame.event == "token")


def check_order(frames: list[Seen]) -> None:
    """What HP-STR-1 says of every stream."""
    names = events(frames)
    assert names[0] == "started"
    assert names.count("started") == 1
    assert names[-1] in ("end", "error")
    assert sum(name in ("end", "error") for name in names) == 1
    indices = [frame.data["i"] for frame in frames if frame.event == "token"]
    assert indices == list(range(len(indices)))
    numbers = [frame.number for frame in frames]
    assert numbers == sorted(set(numbers))
