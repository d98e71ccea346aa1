"""Cards as the simulations have them: how much they hold and how fast they read and compute.

Capacity and bandwidth are the data sheets'. What llama.cpp makes of them is measured where `measured` says so
(docs/simulate.md has the figures and their source), and assumed for the others.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

GIB = 2**30
GIGA = 10**9
DECODE_EFFICIENCY = 0.65  # part of the bandwidth that decoding reaches, where nobody has measured
PROMPT_FLOPS_PER_BANDWIDTH = 70.0  # operations on a prompt in the time of reading one byte, likewise


class UnknownCard(Exception):
    """The text names no card; it says what would."""


@dataclass(frozen=True, slots=True)
class Card:
    """One kind of card. `device_id` is what a host calls this one of them."""

    device_id: str
    vram_bytes: int
    bandwidth: float  # bytes per second
    decode_efficiency: float = DECODE_EFFICIENCY
    prompt_flops: float = 0.0  # operations per second while a prompt is read; 0: by bandwidth

    @property
    def decode_bytes_per_s(self) -> float:
        return self.bandwidth * self.decode_efficiency

    @property
    def prompt_flops_per_s(self) -> float:
        return self.prompt_flops or self.bandwidth * PROMPT_FLOPS_PER_BANDWIDTH


def _card(name: str, gib: float, gb_s: float, efficiency: float = DECODE_EFFICIENCY, tflops: float = 0.0) -> Card:
    return Card(name, round(gib * GIB), gb_s * GIGA, efficiency, tflops * 1e12)


# Name, GiB, GB/s; then, where llama.cpp was measured on it: part of the bandwidth, useful TFLOP/s on prompts.
KNOWN = {
    card.device_id: card
    for card in (
        _card("1080ti", 11, 484),
        _card("2060", 6, 336),
        _card("2080ti", 11, 616),
        _card("3060", 12, 360),
        _card("3060ti", 8, 448),
        _card("3070", 8, 448, 0.78, 37),
        _card("3080", 10, 760, 0.69, 57),
        _card("3080ti", 12, 912, 0.58, 57),
        _card("3090", 24, 936, 0.59, 62),
        _card("3090ti", 24, 1008),
        _card("4060", 8, 272),
        _card("4060ti-16", 16, 288),
        _card("4070", 12, 504),
        _card("4070ti", 12, 504, 0.80, 59),
        _card("4070tis", 16, 672),
        _card("4080", 16, 717, 0.73, 81),
        _card("4090", 24, 1008, 0.62, 111),
        _card("5060ti-16", 16, 448),
        _card("5070", 12, 672),
        _card("5070ti", 16, 896),
        _card("5080", 16, 960),
        _card("5090", 32, 1792),
        _card("a4000", 16, 448),
        _card("a6000", 48, 768),
        _card("p40", 24, 347),
    )
}

_own = re.compile(r"([A-Za-z0-9._-]{1,32}):(\d+(?:\.\d+)?)\s*(?:GB|GiB)?:(\d+(?:\.\d+)?)", re.IGNORECASE)


def parse_card(text: str) -> Card:
    """`3090`, or `name:24GB:936`: capacity in GiB, as cards are sold, and bandwidth in GB/s."""
    text = text.strip()
    if (known := KNOWN.get(text.lower())) is not None:
        return known
    if (own := _own.fullmatch(text)) is not None and float(own[2]) > 0 and float(own[3]) > 0:
        return _card(own[1], float(own[2]), float(own[3]))
    raise UnknownCard(
        f"there is no card {text!r}; known: {', '.join(KNOWN)}; describe another as name:24GB:936 (memory, GB/s)"
    )


def parse_cards(text: str) -> list[Card]:
    """A host: cards in their order, separated by commas. Equal ones are told apart as 3060 and 3060-2."""
    cards: list[Card] = []
    for part in text.split(","):
        card = parse_card(part)
        names = {one.device_id for one in cards}
        name, count = card.device_id, 1
        while name in names:
            count += 1
            name = f"{card.device_id}-{count}"
        cards.append(replace(card, device_id=name))
    return cards
