"""This machine's CPU as a device: main memory stands for VRAM."""

from __future__ import annotations

import platform
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")


def _meminfo_bytes(key: str) -> int:
    for line in _MEMINFO.read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == key:
            return int(rest.split()[0]) * 1024
    raise RuntimeError(f"{_MEMINFO} has no {key}")


def memory_total_bytes() -> int:
    return _meminfo_bytes("MemTotal")


def memory_free_bytes() -> int:
    """Memory that programs can still get without swapping."""
    return _meminfo_bytes("MemAvailable")


def name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
