"""The service on one NVIDIA card that is declared as two devices of 24 and 12 GB, with models of real shapes.

    python benchmarks/cuda_split.py [--source-dir DIR | --binary PATH] [--out FILE.json]

Prints Markdown: predicted against measured memory of each replica, load times, tokens per second, what GET /metrics
says of the card, and what a SIGKILL of a worker in mid-decode costs. Needs 36 GiB on the card; the dependency group
`bench` and 15 GB of disk for models of random weights, or models of yours (`--model`); and a llama-server with CUDA:
`--binary`, else it is built, from `--source-dir` or from the package index, with cmake, nvcc and the CUDA toolkit's
cuBLAS. Where something of this is missing it says so on one line, claims nothing and ends with 0.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

import pynvml
from cuda_measure import Host, Load, MeasureFailed, alone, killed, together
from cuda_report import MIB, Figures, page
from llama_server_build import BuildFailed, build_server, download, llama_cpp_in, missing_tools
from served import ServiceFailed

from llama_orch.devices.nvml import Card, Nvml
from llama_orch.models.gguf import read_gguf_header

NEEDED_BYTES = 36 << 30
TOKENS_MIN = 16
MODULES = ("gguf", "numpy")
# Tokens per slot and slots, in the order of shapes.FULL_SIZE: the first fits either device, and beside it the other two
# fit on the large one only.
PLAN = ((8192, 4), (4096, 4), (4096, 2))
OWN_CTX_MAX, OWN_SLOTS = 4096, 2  # of models that are given


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    server = parser.add_mutually_exclusive_group()
    server.add_argument("--binary", type=Path, metavar="PATH", help="a llama-server with CUDA")
    server.add_argument("--source-dir", type=Path, metavar="DIR", help="sources of llama.cpp to build it from")
    parser.add_argument(
        "--build-dir", type=Path, metavar="DIR", help="keep the build here; a later run goes on with it"
    )
    parser.add_argument("--build-only", action="store_true", help="build, say where it is, and measure nothing")
    parser.add_argument("--cmake-arg", action="append", default=[], metavar="ARG", help="one more argument for cmake")
    parser.add_argument("--model", action="append", type=Path, metavar="GGUF", help="your models, once for each")
    parser.add_argument("--tokens", type=int, default=256, metavar="N", help="length of an answer (256)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures here too")
    given = parser.parse_args(arguments)
    if given.binary is not None and not os.access(given.binary, os.X_OK):
        parser.error(f"--binary: {given.binary} is not a program")
    if given.source_dir is not None and not given.source_dir.is_dir():
        parser.error(f"--source-dir: {given.source_dir} is not a folder")
    for path in given.model or ():
        if not path.is_file():
            parser.error(f"--model: {path} is not a file")
    if given.tokens < TOKENS_MIN:
        parser.error(f"--tokens: fewer than {TOKENS_MIN} are no answer to measure")
    if given.binary is not None and given.build_only:
        parser.error("--build-only: there is nothing to build with --binary")
    return given


def why_not(given: argparse.Namespace, cards: Sequence[Card], has_module: Callable[[str], bool]) -> str | None:
    """What is missing here to measure anything, as one line."""
    if not cards:
        return "no NVIDIA card was found"
    tools = [] if given.binary is not None else missing_tools()
    if tools:
        return f"{' and '.join(tools)} not found, which a build needs, and no --binary was given"
    if given.build_only:
        return None
    largest = max(cards, key=lambda card: card.vram_total_bytes)
    if largest.vram_total_bytes < NEEDED_BYTES:
        return (
            f"the largest card, {largest.name}, has {largest.vram_total_bytes / MIB:,.0f} MiB; "
            f"devices of 24 and 12 GB need {NEEDED_BYTES / MIB:,.0f}"
        )
    missing = [name for name in MODULES if given.model is None and not has_module(name)]
    return f"{' and '.join(missing)} not installed (dependency group bench)" if missing else None


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    nvml = Nvml()
    reason = why_not(given, nvml.cards, lambda name: find_spec(name) is not None)
    if reason is not None:
        print(f"nothing was measured: {reason}")
        return 0
    card = max(nvml.cards, key=lambda one: one.vram_total_bytes)
    with tempfile.TemporaryDirectory(prefix="cuda-split-") as name:
        folder = Path(name)
        try:
            binary = given.binary or _build(given, folder, card)
        except BuildFailed as error:
            print(f"nothing was measured: {error}", file=sys.stderr)
            return 1
        if given.build_only:
            print(binary)
            return 0
        return _measure(given, folder, card, nvml, binary.absolute())


def _build(given: argparse.Namespace, folder: Path, card: Card) -> Path:
    source = llama_cpp_in(given.source_dir or download(folder))
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(pynvml.nvmlDeviceGetHandleByUUID(card.uuid))
    build = given.build_dir or folder / "build"
    jobs = len(os.sched_getaffinity(0))
    print(f"building llama-server for compute capability {major}.{minor}, {jobs} jobs", file=sys.stderr)
    return build_server(source.absolute(), build.absolute(), f"{major}{minor}", jobs, given.cmake_arg)


def _measure(given: argparse.Namespace, folder: Path, card: Card, nvml: Nvml, binary: Path) -> int:
    """Figures are printed and written as far as they came, also when a later part fails."""
    figures, code = Figures(_machine(card, binary)), 0
    try:
        models = [_own_model(path.resolve()) for path in given.model or ()] or _made_models(folder)
        loads = [replace(one, tokens=given.tokens) for one in models]
        asyncio.run(_run(Host(card, nvml, binary, folder / "homes"), loads, figures))
    except* (MeasureFailed, ServiceFailed) as failed:
        code = 1
        for error in _leaves(failed):
            print(f"not all was measured: {error}", file=sys.stderr)
    finally:
        print(page(figures))
        if given.out is not None:
            given.out.write_text(json.dumps(asdict(figures), indent=1) + "\n")
    return code


def _leaves(group: BaseExceptionGroup) -> Iterator[BaseException]:
    for error in group.exceptions:
        yield from _leaves(error) if isinstance(error, BaseExceptionGroup) else (error,)


def _made_models(folder: Path) -> list[Load]:
    from shapes import FULL_SIZE, write  # of the dependency group, which nothing else here needs

    loads = []
    for number, (family, (ctx, slots)) in enumerate(zip(FULL_SIZE, PLAN, strict=True)):
        path = folder.resolve() / f"{number}.gguf"
        print(f"writing {family.name}", file=sys.stderr)
        write(family, path)
        loads.append(
            Load(_pool_id(family.name), f"{family.name} {family.quant.name}, {family.scaled}", path, ctx, slots)
        )
    return loads


def _own_model(path: Path) -> Load:
    trained = read_gguf_header(path).context_length or OWN_CTX_MAX
    return Load(_pool_id(path.stem), path.stem, path, min(trained, OWN_CTX_MAX), OWN_SLOTS)


def _pool_id(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower())[:64]


async def _run(host: Host, loads: Sequence[Load], figures: Figures) -> None:
    for load in loads:
        print(f"{load.name}: alone", file=sys.stderr)
        memory, speeds = await alone(host, load)
        figures.memory.append(memory)
        figures.speed += speeds
    print("all pools at once", file=sys.stderr)
    await together(host, loads, figures)
    print("a worker is killed", file=sys.stderr)
    figures.killed = await killed(host, loads)


def _machine(card: Card, binary: Path) -> dict[str, str]:
    """What the figures hold for."""
    asked = subprocess.run([str(binary), "--version"], capture_output=True, text=True, check=False)
    said = (asked.stdout + asked.stderr).splitlines()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "card": f"{card.name} with {card.vram_total_bytes / MIB:,.0f} MiB",
        "driver": str(pynvml.nvmlSystemGetDriverVersion()),
        "llama-server": next((line for line in said if line.startswith("version")), "of unknown version"),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
