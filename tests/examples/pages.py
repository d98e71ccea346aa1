"""The commands, snippets and samples of README.md and docs/, as the pages have them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
ELISION = "[…]"

_fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_inline = re.compile(r"`(llama-orch [^`]+)`")


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Fenced blocks in their order."""
    text = page.read_text(encoding="utf-8")
    return [Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2]) for match in _fence.finditer(text)]


def inline_commands(page: Path) -> list[str]:
    """Commands of ours that the text between the blocks names."""
    return sorted(set(_inline.findall(_fence.sub("", page.read_text(encoding="utf-8")))))


class Exchange(NamedTuple):
    """What a terminal shows of a submission and of its stream."""

    admission: dict[str, Any]
    frames: list[tuple[str, dict[str, Any]]]


def exchange(text: str) -> Exchange:
    """From a sample or from real output. An elision in an object becomes the key of its name."""
    text = text.replace(f",{ELISION}}}", f',"{ELISION}":null}}')
    first, _ = json.JSONDecoder().raw_decode(text, text.index("{"))
    frames = re.findall(r"^event: (\w+)\ndata: (\{.*\})$", text, re.MULTILINE)
    return Exchange(first, [(event, json.loads(data)) for event, data in frames])


def agrees(shown: dict[str, Any], real: dict[str, Any]) -> bool:
    """Whether the keys are the same, in the same order; some of them, where the sample says that it leaves some out."""
    if ELISION not in shown:
        return list(shown) == list(real)
    rest = iter(real)
    return all(key in rest for key in shown if key != ELISION)
