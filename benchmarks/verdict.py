"""How the programs of this folder tell what they found, so that run.py can gather it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

REACHED, MISSED = "- reached: ", "- missed: "


def three(values: Sequence[float], digits: int = 2) -> str:
    """Minimum, median and maximum, for a table's cell."""
    shown = (min(values), statistics.median(values), max(values))
    return " / ".join(f"{value:.{digits}f}" for value in shown)


def at_most(what: str, found: float, bound: float, unit: str = "") -> str:
    """A line of the report: was the target reached?"""
    return f"{REACHED if found <= bound else MISSED}{what}: {found:.3g}{unit} (at most {bound:g}{unit})"


def at_least(what: str, found: float, bound: float, unit: str = "") -> str:
    return f"{REACHED if found >= bound else MISSED}{what}: {found:.3g}{unit} (at least {bound:g}{unit})"


def against(found: Mapping[str, Sequence[float]], digits: int = 0) -> list[str]:
    """A table of what was measured of two sides, and the ratio of the first one's median to the second one's."""
    lines = ["| | minimum / median / maximum |", "| --- | --- |"]
    lines += [f"| {name} | {three(values, digits)} |" for name, values in found.items()]
    ours, other = (statistics.median(values) for values in found.values())
    return [*lines, f"ratio of the medians: {ours / other:.2f}"]
