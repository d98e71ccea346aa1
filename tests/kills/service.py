"""The service as a user starts it, on one home folder, to be killed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import select
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx

from tests import live_service
from tests.live.client import descendants, is_running, until

TOKEN = "kills-0123456789abcdef0123456789abcdef"
LIMIT_S = 60.0
GONE_LIMIT_S = 10.0  # for what a killed service had started
SAID = b"listening on "
_is_digest = re.compile(r"[0-9a-f]{64}").fullmatch


class Home:
    """The folder that outlives all the lives, and what must be true of it while none is lived."""

    def __init__(self, folder: Path, configuration: Mapping[str, Any], env: Mapping[str, str]) -> None:
        self.path = folder / "home"
        self.log = folder / "service.log"
        self._config = folder / "config.yaml"
        self._config.write_text(json.dumps(configuration))
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("LLORCH_")}
        self._env = inherited | {"LLORCH_HOME": str(self.path), "LLORCH_API_TOKEN": TOKEN} | dict(env)

    def spawn(self) -> subprocess.Popen[bytes]:
        command = [*live_service.PROGRAM, "serve", "--port", "0", "--config", str(self._config)]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, env=self._env
            )

    def check(self, contents: Mapping[str, str]) -> None:
        """Whatever has a final name is whole; the database is sound. `contents`: digests by file name's beginning."""
        for path in self.path.rglob("*"):
            if path.parent.parent.name == "artifacts" and _is_digest(path.name):
                assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name, f"a part of artifact {path.name}"
            elif path.suffix == ".gguf":
                with path.open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                known = next(digest for name, digest in contents.items() if path.name.startswith(name))
                assert found == known, f"a part of {path.name}: {path.stat().st_size} bytes"
            elif path.suffix == ".json" and path.is_file():
                json.loads(path.read_bytes())
        self._check_database()

    def _check_database(self) -> None:
        """A copy of it, so that the service is the one to recover the original."""
        with tempfile.TemporaryDirectory() as folder:
            for path in self.path.glob("state.sqlite3*"):
                if not path.name.endswith("-shm"):
                    shutil.copy(path, folder)
            if not (copy := Path(folder, "state.sqlite3")).is_file():
                return
            with closing(sqlite3.connect(copy)) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]

    def parts(self) -> dict[str, int]:
        """Partial files, and what is noted to be on the disk of each."""
        notes = (self.path / "models" / "partial").glob("*.json")
        known = {note.stem: json.loads(note.read_bytes()) for note in notes}
        found = (self.path / "models" / "partial").glob("*.part")
        return {path.stem: known.get(path.stem, {}).get("kept_bytes", 0) for path in found}

    def files(self, where: str) -> set[str]:
        return {path.name for path in (self.path / where).rglob("*") if path.is_file()}


class Life:
    """One run of the service."""

    def __init__(self, home: Home) -> None:
        self.began = time.monotonic()
        self.process = home.spawn()
        self.url = ""

    def listens(self, limit_s: float = LIMIT_S) -> bool:
        """Whether it does within so many seconds. One that ends by itself is a failure."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], max(0.0, limit_s))[0]:
            return False
        line = self.process.stdout.readline()
        assert line.startswith(SAID), f"the service did not start: {line!r}"
        self.url = line.removeprefix(SAID).decode().strip()
        return True

    def client(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=LIMIT_S, trust_env=False)

    def kill(self) -> None:
        """-9; and nobody whom it had started outlives it."""
        started = descendants(self.process.pid)
        self._end(signal.SIGKILL)
        assert self.process.returncode == -signal.SIGKILL, f"it ended by itself: {self.process.returncode}"
        until(lambda: not any(is_running(pid) for pid in started), GONE_LIMIT_S)

    def end(self) -> None:
        self._end(signal.SIGTERM)
        assert self.process.returncode == 0, f"SIGTERM ended it with {self.process.returncode}"

    def _end(self, number: int) -> None:
        self.process.send_signal(number)
        self.process.wait(LIMIT_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
