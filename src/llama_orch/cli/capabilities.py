"""`llama-orch capabilities`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import typer

from llama_orch.cli.connection import connected
from llama_orch.cli.options import Json
from llama_orch.cli.output import command, print_facts, print_json, print_table, size

if TYPE_CHECKING:
    from llama_orch.contract.models import Device


@command
def capabilities(as_json: Json = False) -> None:
    """Show what the installation can do."""
    with connected(os.environ) as client:
        answer = client.capabilities()
    if as_json:
        return print_json(answer)
    queue, limits = answer.queue, answer.rate_limits
    print_facts(
        {
            "api_version": answer.api_version,
            "concurrency": f"{answer.concurrency.recommended} recommended, {answer.concurrency.slots} slots",
            "queue": f"{queue.capacity} places, {queue.full_policy}",
            "limits": f"{limits.streams} streams, {limits.body_bytes} bytes a request",
            "sampler_profiles": [profile.version for profile in answer.sampler_profiles],
            "features": answer.features,
        }
    )
    typer.echo("")
    engines = ((e.engine, e.version, e.workloads, e.ctx_max, e.determinism) for e in answer.engines)
    print_table(("engine", "version", "workloads", "ctx max", "determinism"), engines)
    typer.echo("")
    pools = ((p.id, p.engine, p.model, p.ctx, p.slots, p.recommended_concurrency, p.max_tokens) for p in answer.pools)
    print_table(("pool", "engine", "model", "ctx", "slots", "recommended", "max tokens"), pools)
    typer.echo("")
    print_table(("device", "name", "backend", "memory", "free", "reserved", "problem"), map(_device, answer.devices))


def _device(device: Device) -> tuple[object, ...]:
    memory = (device.vram_total_bytes, device.vram_free_bytes, device.vram_reserved_bytes)
    return (device.id, device.name, device.backend, *map(size, memory), device.problem)
