"""What `llama_orch.models.memory` predicts, against the buffers that llama.cpp reports once it has loaded the model.

    python benchmarks/memory.py [--only NAME]

Needs the dependency group `bench`. Makes a file of random weights in the shape of each family, one at a time in a
temporary folder (at most 700 MB each), loads it in a real worker at several settings and prints a table. A family is
scaled in layers, vocabulary or number of experts only: weights and KV grow with those in proportion, and the scratch of
a step does not depend on them. Ends with 1 when the median error of the totals is above 5 % or the worst above 10 %.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import statistics
import sys
import tempfile
from pathlib import Path

from shapes import FAMILIES, write

from llama_orch.engines.base import ReplicaSpec
from llama_orch.engines.llamacpp import LlamaCppEngine
from llama_orch.engines.worker_log import WorkerLog
from llama_orch.models.gguf import read_gguf_header
from llama_orch.models.memory import LoadSettings, memory_need

MIB = 1 << 20
MEDIAN_MAX, WORST_MAX = 5.0, 10.0  # percent, of the totals


class Reports(logging.Handler):
    """Reads what a worker says of its buffers; llama.cpp logs from a thread, so some of it comes after READY."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.seen = WorkerLog({})
        self.is_complete = asyncio.Event()
        self._is_feeding = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self._is_feeding:  # the log that is fed logs too
            self._is_feeding = True
            self.seen.feed(record.getMessage().encode() + b"\n")
            self._is_feeding = False
        if any(name.endswith("/compute") for name in self.seen.buffer_bytes):  # the last that it prints
            self.is_complete.set()

    async def complete(self) -> dict[str, int]:
        async with asyncio.timeout(30):
            await self.is_complete.wait()
        return self.seen.buffer_bytes


async def reported(path: Path, ctx: int, slots: int) -> dict[str, int]:
    """Bytes by part, as llama.cpp says it allocated them. The buffer of results counts as scratch."""
    reports, log = Reports(), logging.getLogger("llama_orch.worker")
    log.addHandler(reports)
    worker = await LlamaCppEngine().launch(ReplicaSpec("bench-0", "bench", path, slots=slots, ctx=ctx))
    try:
        await worker.ready()
        buffers = await reports.complete()
    finally:
        await worker.stop(5.0)
        log.removeHandler(reports)
    kinds = {"weights": "weights", "kv": "kv", "state": "kv", "compute": "compute", "output": "compute"}
    parts = dict.fromkeys(("weights", "kv", "compute"), 0)
    for name, size in buffers.items():
        parts[kinds[name.split("/")[1]]] += size
    return parts | {"total": sum(parts.values())}


def predicted(path: Path, ctx: int, slots: int) -> dict[str, int]:
    need = memory_need(read_gguf_header(path), LoadSettings(ctx, slots))
    parts = {"weights": need.weights_bytes, "kv": need.kv_bytes, "compute": need.compute_bytes}
    return parts | {"total": need.total_bytes - need.overhead_bytes}


def error(said: int, was: int) -> float:
    """In percent of what was reported."""
    return 0.0 if said == was else 100.0 * (said - was) / max(was, 1)


def main(only: str) -> int:
    logging.getLogger("llama_orch.worker").setLevel(logging.DEBUG)
    logging.getLogger("llama_orch.worker").propagate = False
    errors: dict[str, list[float]] = {"weights": [], "kv": [], "compute": [], "total": []}
    print("| family, type, scaled | ctx × slots | weights | KV | scratch | total | error |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for family in FAMILIES:
        if only.lower() not in family.name.lower():
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write(family, path)
            for ctx, slots in family.settings:
                said, was = predicted(path, ctx, slots), asyncio.run(reported(path, ctx, slots))
                for part, values in errors.items():
                    values.append(error(said[part], was[part]))
                cells = [f"{said[part] / MIB:.1f} / {was[part] / MIB:.1f}" for part in errors]
                name = f"{family.name}, {family.quant.name}, {family.scaled}"
                print(f"| {name} | {ctx} × {slots} | {' | '.join(cells)} | {errors['total'][-1]:+.2f} % |", flush=True)
    print("\n| part | median error | worst error |\n| --- | --- | --- |")
    summary = {p: (statistics.median(map(abs, v)), max(map(abs, v))) for p, v in errors.items()}
    for part, (median, worst) in summary.items():
        print(f"| {part} | {median:.2f} % | {worst:.2f} % |")
    return int(summary["total"][0] > MEDIAN_MAX or summary["total"][1] > WORST_MAX)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="families whose name has this in it")
    sys.exit(main(parser.parse_args().only))
