"""The scripts of benchmarks/ can be imported, and there is a machine whose driver and llama-server are stand-ins."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.devices.conftest import machine, nvml_library
from tests.engines.conftest import llama_server, tiny_model

__all__ = ["llama_server", "machine", "nvml_library", "tiny_model"]

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # they are scripts, and import each other by their names
