"""`llama-orch simulate`: what would these cards make of this load?"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

from llama_orch.cli.options import Json
from llama_orch.cli.output import command, note, print_json, print_table

Devices = Annotated[
    list[str],
    typer.Option(
        "--devices",
        metavar="CARDS",
        help="A host: cards separated by commas, such as 3090,3060, or name:24GB:936 (memory, GB/s) for one that is "
        "not known. Give it twice to compare two hosts.",
    ),
]
LoadFile = Annotated[Path, typer.Option("--load", metavar="FILE", help="Models and agents, see below.")]
Png = Annotated[
    Path | None, typer.Option("--png", metavar="FILE", help="Draw the runs; needs the extra: llama-orch[plot].")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of lengths and pauses; the same for every host.")]

_CARD_COLUMNS = ("card", "memory", "busy", "tasks", "tokens/s", "loads", "loading", "evictions")
_AGENT_COLUMNS = ("agent", "model", "done", "failed", "told to wait", "wait p50", "p95", "first token p50", "p95")


@command
def simulate(devices: Devices, load: LoadFile, png: Png = None, as_json: Json = False, seed: Seed = 0) -> None:
    """Play a load on imaginary cards: the real scheduler, in virtual time.

    The file is YAML:

    \b
    models:
      - {name: coder, parameters_b: 14, quantization: Q4_K_M, ctx: 16384}
      - {name: small, size_gb: 4.9, ctx: 8192}
    agents:
      - {name: writer, model: coder, count: 2, tasks: 10, think_s: 5,
         prompt_tokens: 4000, answer_tokens: 600,
         priority: interactive, determinism: strict}
    pools: []            # as in the configuration; without: on demand
    assume: {disk_gb_s: 2, slots: 4, batch_slowdown: 0.1}
    cards: []            # {name, memory_gb, bandwidth_gb_s, ...}

    Lengths and pauses are means. docs/simulate.md has every key, the
    known cards, and what is assumed of them.
    """
    # A composition root of its own beside the command line, as the server is: see cli/serve.py.
    root = importlib.import_module("llama_orch.simulate.run")
    result: dict[str, Any] = root.run_simulation(devices, load, seed=seed, png=png)
    if as_json:
        return print_json(result)
    for host in result["hosts"]:
        _print_host(host)
    if len(result["hosts"]) > 1:
        _compare(result["hosts"])
    if png is not None:
        note(f"drawn: {png}")


def _print_host(host: dict[str, Any]) -> None:
    typer.echo(f"{host['devices']}: done after {_s(host['makespan_s'])}, lower bound {_s(host['lower_bound_s'])}")
    typer.echo("")
    print_table(_CARD_COLUMNS, (_card_row(card) for card in host["cards"]))
    typer.echo("")
    print_table(_AGENT_COLUMNS, (_agent_row(agent) for agent in host["agents"]))
    for agent in host["agents"]:
        for problem in agent["problems"]:
            typer.echo(f"{agent['agent']}: {problem}")
    typer.echo("")


def _card_row(card: dict[str, Any]) -> tuple[object, ...]:
    return (
        card["card"],
        f"{card['memory_gib']:g} GiB",
        f"{card['busy']:.0%}",
        card["tasks"],
        f"{card['tokens_per_s']:.0f}",
        card["loads"],
        _s(card["loading_s"]),
        card["evictions"],
    )


def _agent_row(agent: dict[str, Any]) -> tuple[object, ...]:
    return (
        agent["agent"],
        agent["model"],
        agent["tasks_done"],
        agent["tasks_failed"],
        agent["refusals"],
        _s(agent["wait_p50_s"]),
        _s(agent["wait_p95_s"]),
        _s(agent["first_token_p50_s"]),
        _s(agent["first_token_p95_s"]),
    )


def _compare(hosts: list[dict[str, Any]]) -> None:
    """The hosts side by side, each against the first."""
    first = hosts[0]["makespan_s"] or 1.0
    rows = []
    for host in hosts:
        waits = [agent["wait_p95_s"] for agent in host["agents"] if agent["wait_p95_s"] is not None]
        tokens = sum(card["tokens_per_s"] for card in host["cards"])
        done = sum(agent["tasks_done"] for agent in host["agents"])
        share = f"{host['makespan_s'] / first:.0%}"
        rows.append(
            (host["devices"], _s(host["makespan_s"]), share, done, f"{tokens:.0f}", _s(max(waits, default=None)))
        )
    print_table(("host", "done after", "of the first", "tasks", "tokens/s", "worst wait p95"), rows)


def _s(seconds: float | None) -> str | None:
    """Seconds as people read them."""
    if seconds is None:
        return None
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
