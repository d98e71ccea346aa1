"""An environment of its own for LiteLLM's proxy: its pins are not ours.

    python benchmarks/litellm_venv.py FOLDER

Needs `uv` in this environment. Makes FOLDER anew with the dependency group `peers`. Where that cannot be installed, it
writes why to FOLDER.log and ends with 0, so that a report can say so: run.py reads it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def executable(folder: Path) -> Path:
    return folder / "bin" / "litellm"


def why_not(folder: Path) -> str:
    """The last line of what the installation said."""
    log = folder.with_name(f"{folder.name}.log")
    said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.is_file() else []
    return said[-1].strip() if said else f"there is no {executable(folder)}"


def main(folder: Path) -> None:
    folder = folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(sys.executable).with_name("uv")
    uv = str(beside) if beside.exists() else shutil.which("uv") or "uv"
    python = folder / "bin" / "python"
    commands = (
        [uv, "venv", "--quiet", "--python", sys.executable, str(folder)],
        [uv, "pip", "install", "--quiet", "--python", str(python), "--group", f"{PYPROJECT}:peers"],
    )
    log = folder.with_name(f"{folder.name}.log")
    said = ""
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            said += f"{error}\n"
            break
        said += "".join(line + "\n" for line in done.stderr.splitlines() if not line.startswith("WARNING"))
        if done.returncode != 0:
            break
    log.write_text(said)
    print(f"{executable(folder)}: {'installed' if executable(folder).exists() else why_not(folder)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
