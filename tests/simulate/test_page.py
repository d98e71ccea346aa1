"""docs/simulate.md: its example runs and prints what the page shows, and its table of cards is the one that is used."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llama_orch.cli.main import app
from llama_orch.simulate.load import Load, parse_load
from llama_orch.testing.cards import GIB, GIGA, KNOWN, Card

PAGE = Path(__file__).resolve().parents[2] / "docs" / "simulate.md"


def block(language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def card_row(card: Card) -> str:
    star = "*" if card.prompt_flops else ""
    part, flops = f"{card.decode_efficiency:.0%}{star}", f"{card.prompt_flops_per_s / 1e12:.0f}{star}"
    return f"| {card.device_id} | {card.vram_bytes / GIB:g} | {card.bandwidth / GIGA:g} | {part} | {flops} |"


def squeezed(text: str) -> list[str]:
    """Lines without the spaces that only align, and without the times and counts of a run."""
    text = re.sub(r"\d+ (?:min|h) \d+ (?:s|min)|\d[\d.]* s", "TIME", text)
    return [re.sub(r"(?<![\w-])\d+\b", "N", " ".join(line.split())) for line in text.strip().splitlines()]


def makespans_s(text: str) -> list[float]:
    """Of the hosts, as a person reads them."""
    found = re.findall(r"done after (?:(\d+) min )?([\d.]+) s", text)
    return [60 * int(minutes or 0) + float(seconds) for minutes, seconds in found]


def test_the_example_prints_what_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same hosts, cards, agents and columns. A better scheduler moves the figures; the page's are renewed when they
    are a fifth off."""
    monkeypatch.chdir(tmp_path)
    Path("load.yaml").write_text(block("yml"), encoding="utf-8")
    command, _, shown = block("console").partition("\n")
    done = CliRunner().invoke(app, shlex.split(command.removeprefix("$ llama-orch ")))
    assert done.exit_code == 0, done.output
    assert squeezed(done.stdout) == squeezed(shown)
    assert makespans_s(done.stdout) == pytest.approx(makespans_s(shown), rel=0.2)
    assert len(makespans_s(shown)) == 2


def test_the_table_of_cards_is_the_one_that_is_used() -> None:
    """Every known card is on the page with its figures, and no other."""
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if re.match(r"\| [\w-]+ \| \d", line)]
    assert [row for row in rows if row.split("|")[1].strip() in KNOWN] == [card_row(card) for card in KNOWN.values()]


def test_the_keys_of_the_file_are_on_the_page() -> None:
    """What the file may say is described, and defaults are as described."""
    text = PAGE.read_text(encoding="utf-8")
    load: Load = parse_load(block("yml"), "page")
    for part in (*load.agents[:1], load.assume):
        for key in part.__struct_fields__:
            assert re.search(rf"`[\w.\[\]]*{key}`", text), key
