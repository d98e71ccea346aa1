"""The fake library, built once for each test process, and a machine with two cards for each test."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .machine import FakeMachine, Program, a_program


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with libnvidia-ml.so.1."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler to build the fake driver's library with")
    folder = tmp_path_factory.mktemp("nvml")
    source = Path(__file__).with_name("fake_nvml.c")
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *flags, "-o", str(folder / "libnvidia-ml.so.1"), str(source)], check=True)
    return folder


@pytest.fixture
def machine(nvml_library: Path, tmp_path: Path) -> FakeMachine:
    """A 3060 and a 3090, both sound."""
    return FakeMachine(nvml_library, tmp_path / "machine")


@pytest.fixture
def program(machine: FakeMachine) -> Iterator[Program]:
    """The device layer on that machine, its driver opened."""
    with a_program(machine) as running:
        yield running
