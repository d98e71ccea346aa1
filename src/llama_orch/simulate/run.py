"""The composition root of `llama-orch simulate`: reads the load, runs it on each host, draws the chart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from llama_orch.settings import SettingsError
from llama_orch.simulate.chart import NoPlot, check_plot, draw
from llama_orch.simulate.host import simulate_host
from llama_orch.simulate.load import LoadError, read_load


def run_simulation(devices: Sequence[str], path: Path, *, seed: int, png: Path | None) -> dict[str, Any]:
    """The figures of each host as plain values. What a user can mend is a SettingsError."""
    try:
        load = read_load(path)
        for one in devices:
            load.host(one)  # before the first run, which may take a while
        if png is not None:
            check_plot()
        runs = [simulate_host(load, one, seed) for one in devices]
        if png is not None:
            draw(runs, png)
    except (LoadError, NoPlot) as error:
        raise SettingsError(getattr(error, "problems", [str(error)])) from error
    hosts: list[Any] = [msgspec.to_builtins(one.figures) for one in runs]
    return {"seed": seed, "hosts": hosts}
