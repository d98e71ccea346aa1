"""The command line with a defect in it, for `tests.live_service`."""

from __future__ import annotations

import sys
from pathlib import Path


def program(defect: str) -> list[str]:
    return [sys.executable, "-P", str(Path(__file__).with_name("serve.py")), defect]
