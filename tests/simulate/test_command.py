"""`llama-orch simulate`, through the program's own entry; and the chart behind it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from llama_orch.cli.main import app
from llama_orch.simulate import chart
from llama_orch.simulate.chart import pack
from llama_orch.simulate.recorder import Span, busy_s

LOAD = """
models: [{name: big, parameters_b: 32}, {name: small, parameters_b: 8}]
agents:
  - {name: thinker, model: big, tasks: 3, prompt_tokens: 500, answer_tokens: 100}
  - {name: doer, model: small, count: 2, tasks: 4, think_s: 1, prompt_tokens: 300, answer_tokens: 80}
"""
Simulate = Callable[..., Result]


@pytest.fixture
def simulate(tmp_path: Path) -> Simulate:
    """Run the command on the load above, or on another text."""

    def run(*arguments: str, load: str = LOAD) -> Result:
        (tmp_path / "load.yaml").write_text(load)
        return CliRunner().invoke(app, ["simulate", "--load", str(tmp_path / "load.yaml"), *arguments])

    return run


def test_a_host_is_a_table_of_cards_and_one_of_agents(simulate: Simulate) -> None:
    """All tasks are done, the large model on the card that holds it, and the bound is below the makespan."""
    done = simulate("--devices", "3090,3060", "--json")
    assert done.exit_code == 0, done.output
    (host,) = json.loads(done.stdout)["hosts"]
    assert [agent["tasks_done"] for agent in host["agents"]] == [3, 8]
    assert sum(card["tasks"] for card in host["cards"]) == 11
    assert host["cards"][0]["loads"] >= 1
    assert 0 < host["lower_bound_s"] <= host["makespan_s"]
    assert all(0 <= card["busy"] <= 1 for card in host["cards"])
    assert all(agent["wait_p50_s"] <= agent["first_token_p95_s"] for agent in host["agents"])
    text = simulate("--devices", "3090,3060").stdout
    assert "thinker" in text
    assert "3060" in text


def test_two_hosts_are_compared_on_the_same_work(simulate: Simulate) -> None:
    """The same seed draws the same lengths, so a host beside itself is the same; another seed is another run."""
    same = json.loads(simulate("--devices", "3090", "--devices", "3090", "--json").stdout)["hosts"]
    assert same[0] == same[1]
    other = json.loads(simulate("--devices", "3090", "--seed", "1", "--json").stdout)["hosts"]
    assert other[0] != same[0]
    assert (
        "of the first" in simulate("--devices", "3060", "--devices", "3060,3060", load=LOAD.replace("32}", "3}")).stdout
    )


def test_a_model_that_fits_no_card_is_said_to(simulate: Simulate) -> None:
    """With the figures; the other agents go on."""
    done = simulate("--devices", "3060", "--json")
    (host,) = json.loads(done.stdout)["hosts"]
    thinker, doer = host["agents"]
    assert (thinker["tasks_done"], doer["tasks_done"]) == (0, 8)
    assert "MiB on device 3060" in thinker["problems"][0]


def test_pools_may_be_given(simulate: Simulate) -> None:
    """As in the configuration: a pool that stays loaded on one card keeps the other model off it."""
    pools = "pools: [{id: p, model: small, devices: ['3060'], slots: 2}]\n"
    done = simulate("--devices", "3090,3060", "--json", load=LOAD + pools)
    assert done.exit_code == 0, done.output
    (host,) = json.loads(done.stdout)["hosts"]
    assert [card["tasks"] for card in host["cards"]] == [3, 8]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--devices", "gtx"], "there is no card 'gtx'"), (["--devices", "3090,"], "there is no card ''")],
)
def test_what_cannot_be_is_one_message(simulate: Simulate, arguments: list[str], words: str) -> None:
    """No traceback; exit code 1."""
    done = simulate(*arguments)
    assert done.exit_code == 1
    assert words in done.stderr


def test_without_matplotlib_a_chart_says_what_to_install(
    simulate: Simulate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is computed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = simulate("--devices", "3090", "--png", str(tmp_path / "c.png"))
    assert done.exit_code == 1
    assert "pip install 'llama-orch[plot]'" in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="the extra plot is not installed")
def test_the_chart_is_a_png(simulate: Simulate, tmp_path: Path) -> None:
    """Of one host and of two."""
    for hosts in (["3090,3060"], ["3090", "3090,3060"]):
        arguments = [part for host in hosts for part in ("--devices", host)]
        done = simulate(*arguments, "--png", str(tmp_path / "c.png"))
        assert done.exit_code == 0, done.output
        assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG\r\n")


def span(start: float, end: float, slots: int = 1, model: str = "m") -> Span:
    return Span("task" if slots else "load", ("c",), model, "", start, end, slots)


def test_lanes_hold_no_two_spans_at_a_time() -> None:
    """The lowest free lane of the model's own band; a strict task takes as many lanes as it has slots."""
    spans = [span(0, 5, 0), span(5, 9), span(5, 7), span(9, 12, 2), span(6, 8, model="n")]
    placed = {(one.start_s, one.end_s, one.model): (lane, width) for one, lane, width in pack(spans, "c", ["m", "n"])}
    assert placed == {
        (0, 5, "m"): (0, 1),
        (5, 9, "m"): (0, 1),
        (5, 7, "m"): (1, 1),
        (9, 12, "m"): (0, 2),
        (6, 8, "n"): (2, 1),
    }
    assert pack(spans, "another", ["m"]) == []


def test_busy_time_counts_once() -> None:
    """Spans that overlap are one time; loads are not work."""
    assert busy_s([span(0, 5), span(3, 8), span(10, 11), span(0, 50, 0)], "c") == 9


def test_the_message_names_the_extra() -> None:
    """What pyproject.toml calls it."""
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    assert 'plot = ["matplotlib' in text
    assert "[plot]" in chart.MISSING
