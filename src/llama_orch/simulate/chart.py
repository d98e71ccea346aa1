"""A run as a picture: one lane for each slot in use on each card, loads hatched, tasks coloured by model."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_orch.simulate.host import HostRun
from llama_orch.simulate.recorder import Span

MISSING = "a chart needs matplotlib: pip install 'llama-orch[plot]'"
LANE_INCHES, CARD_GAP, QUEUE_INCHES = 0.2, 0.8, 1.0
# Okabe and Ito's colours, which remain apart for the colour-blind.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C00", "#7F7F7F")


class NoPlot(Exception):
    """matplotlib is not there; the text says what to do."""


def check_plot() -> None:
    """Raises NoPlot where nothing can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise NoPlot(MISSING)


def draw(runs: Sequence[HostRun], path: Path) -> None:
    """Write a PNG, the hosts below each other on one time scale."""
    check_plot()
    from matplotlib.figure import Figure

    heights = [height for one in runs for height in (_lanes_inches(one), QUEUE_INCHES)]
    figure = Figure(figsize=(13, sum(heights) + 0.9 * len(runs) + 0.9), dpi=110, layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, gridspec_kw={"height_ratios": heights}, squeeze=False)
    models = list(dict.fromkeys(model for one in runs for model in one.models))
    colours = {model: COLOURS[number % len(COLOURS)] for number, model in enumerate(models)}
    end_s = max(one.figures.makespan_s for one in runs)
    for number, one in enumerate(runs):
        _draw_lanes(axes[2 * number][0], one, colours)
        _draw_queue(axes[2 * number + 1][0], one)
    last = axes[-1][0]
    last.set_xlabel("seconds")
    last.set_xlim(0, end_s * 1.01)
    _legend(figure, colours)
    figure.savefig(path, format="png")


def pack(spans: Sequence[Span], device_id: str, models: Sequence[str]) -> list[tuple[Span, int, int]]:
    """Each span of the device with its first lane and the number of lanes that it takes: the lowest that are free in
    its model's own band. A load is as thin as a slot."""
    placed: list[tuple[Span, int, int]] = []
    floor = 0
    for model in models:
        here = [span for span in spans if device_id in span.devices and span.model == model]
        free_at: list[float] = []
        for span in sorted(here, key=lambda s: (s.start_s, s.kind)):
            width = max(1, span.slots)
            lane = 0
            while any(at > span.start_s + 1e-9 for at in free_at[lane : lane + width]):
                lane += 1
            free_at += [0.0] * (lane + width - len(free_at))
            free_at[lane : lane + width] = [span.end_s or span.start_s] * width
            placed.append((span, floor + lane, width))
        floor += len(free_at)
    return placed


def _packed(one: HostRun) -> list[tuple[str, list[tuple[Span, int, int]], int]]:
    cards = []
    for figures in one.figures.cards:
        placed = pack(one.spans, figures.card, one.models)
        cards.append((figures.card, placed, max([lane + width for _, lane, width in placed], default=1)))
    return cards


def _lanes_inches(one: HostRun) -> float:
    return sum(max(4, lanes) * LANE_INCHES + CARD_GAP * LANE_INCHES for _, _, lanes in _packed(one))


def _draw_lanes(axes: Any, one: HostRun, colours: dict[str, str]) -> None:
    figures = one.figures
    top, marks, labels = 0.0, [], []
    for card, (name, placed, lanes) in zip(figures.cards, _packed(one), strict=True):
        lanes = max(4, lanes)
        axes.axhspan(top, top + lanes, color="#F4F4F4", zorder=0)
        for span, lane, width in placed:
            _draw_span(axes, span, top + lane, width, colours[span.model])
        marks.append(top + lanes / 2)
        labels.append(f"{name}\n{card.memory_gib:g} GiB\nbusy {card.busy:.0%}")
        top += lanes + CARD_GAP
    axes.set_ylim(top - CARD_GAP, 0)
    axes.set_yticks(marks, labels)
    axes.tick_params(axis="y", length=0)
    axes.axvline(figures.makespan_s, color="#333333", linewidth=1)
    axes.axvline(figures.lower_bound_s, color="#333333", linewidth=1, linestyle=":")
    ratio = "" if figures.ratio is None else f", {figures.ratio:.2f} × the bound"
    axes.set_title(
        f"{figures.devices}: done after {figures.makespan_s:,.0f} s (solid); lower bound "
        f"{figures.lower_bound_s:,.0f} s (dotted){ratio}",
        loc="left",
        fontsize=11,
    )
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="x", labelbottom=False)


def _draw_span(axes: Any, span: Span, lane: float, width: int, colour: str) -> None:
    length = max((span.end_s or span.start_s) - span.start_s, 0.0)
    box = [(span.start_s, length)]
    if span.kind == "load":
        axes.broken_barh(box, (lane + 0.12, 0.76), facecolors="white", edgecolors=colour, hatch="////", linewidth=0.8)
    else:
        axes.broken_barh(box, (lane + 0.06, width - 0.12), facecolors=colour, edgecolors="white", linewidth=0.4)


def _draw_queue(axes: Any, one: HostRun) -> None:
    times = [at for at, _ in one.depth] + [one.figures.makespan_s]
    depths = [depth for _, depth in one.depth]
    depths.append(depths[-1] if depths else 0)
    axes.fill_between(times, depths, step="post", color="#9A9A9A", linewidth=0)
    axes.set_ylabel("waiting", fontsize=9)
    axes.set_ylim(0, max([*depths, 1]) * 1.1)
    axes.yaxis.get_major_locator().set_params(integer=True, nbins=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _legend(figure: Any, colours: dict[str, str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=colour, label=model) for model, colour in colours.items()]
    handles.append(Patch(facecolor="white", edgecolor="#555555", hatch="////", label="loading"))
    handles.append(Patch(facecolor="none", edgecolor="none", label="a bar over several lanes: a strict task, alone"))
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False, fontsize=10)
