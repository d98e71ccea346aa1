"""The reference deployment, rehearsed: a 24 GB and a 12 GB card (declared, so that the books are kept as if they were
there), both engines, and everything that a user does in a day, with the commands that a user has.

    python tests/smoke/rehearsal.py [--write docs/smoke.md]

Prints each command with what it said; the exit code is 0 when all went as it should. `--write` keeps that as a page.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.live.client import descendants, is_running, until

GIB = 2**30
TOKEN = "smoke-0123456789abcdefghijklmnop"
SESSION = "7a1d0f3c-5b2e-4f6a-8c9d-1e2f3a4b5c6d"
LONG_TASK = "3f2b8c1e-9d5a-4c57-8a43-0c7d5b1f2e90"
LIMIT_S = 120.0
LINES_MAX = 14  # of a command's answer on the page

# What differs from run to run is left out of the page.
VARIES = (
    (re.compile(r"127\.0\.0\.1:\d+"), "127.0.0.1:8080"),
    (re.compile(r"/tmp/llorch-smoke-\w+"), "/home/me"),
    (re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+(Z|\+00:00)"), "2026-01-01T12:00:00.000Z"),
    (re.compile(r"[\d.]+ tokens/s"), "… tokens/s"),
)


class Wrong(Exception):
    """Something did not go as it should."""


@dataclass
class Rehearsal:
    """One installation, its commands and what they said."""

    folder: Path
    lines: list[str] = field(default_factory=list)
    url: str = ""
    server: subprocess.Popen[str] | None = None

    # -- saying and doing ----------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        for pattern, instead in VARIES:
            text = pattern.sub(instead, text)
        self.lines += text.splitlines() or [""]
        print(text, flush=True)

    def chapter(self, title: str) -> None:
        if self.lines:
            self.say("```")
        self.say(f"\n## {title}\n```text")

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("LLORCH_")}
        ours = {"LLORCH_HOME": str(self.folder / "home"), "LLORCH_API_TOKEN": TOKEN, "COLUMNS": "160"}
        return kept | ours | ({"LLORCH_URL": self.url} if self.url else {})

    def command(self, *words: str, expect: int = 0, has: str = "", stdin: str | None = None) -> str:
        """`llama-orch` with these words; both of its streams. `has` must be in them."""
        self.say(f"$ llama-orch {' '.join(words)}")
        program = [sys.executable, "-P", "-m", "llama_orch.cli"]
        done = subprocess.run(
            [*program, *words], env=self.environment, input=stdin, capture_output=True, text=True, timeout=LIMIT_S
        )
        said = (done.stdout + done.stderr).strip()
        shown = said.splitlines()
        self.say("\n".join(shown[:LINES_MAX] + (["[…]"] if len(shown) > LINES_MAX else [])))
        if done.returncode != expect or has not in said:
            raise Wrong(f"{' '.join(words)}: exit code {done.returncode} for {expect}, wanted {has!r} in:\n{said}")
        return done.stdout.strip()

    def http(self, method: str, path: str, body: Mapping[str, Any] | None = None, *, expect: int) -> Any:
        """One request, for what has no command."""
        self.say(f"$ curl -X {method} {path}" + ("" if body is None else f" --json '{json.dumps(body)}'"))
        headers = {"Authorization": f"Bearer {TOKEN}"}
        with httpx.Client(base_url=self.url, headers=headers, trust_env=False, timeout=LIMIT_S) as client:
            answer = client.request(method, path, json=body)
        self.say(f"{answer.status_code} {answer.text[:400]}")
        if answer.status_code != expect:
            raise Wrong(f"{method} {path}: {answer.status_code} for {expect}: {answer.text}")
        return answer.json() if answer.content else None

    # -- the service ---------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        self.say("$ llama-orch serve --config config.yaml")
        config = self.folder / "config.yaml"
        program = [sys.executable, "-P", "-m", "llama_orch.cli", "serve", "--port", "0", "--config", str(config)]
        self.url = ""
        with (self.folder / "service.log").open("ab") as log:
            self.server = subprocess.Popen(program, env=self.environment, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.server.stdout is not None
        line = self.server.stdout.readline().strip()
        self.say(line)
        if not line.startswith("listening on "):
            raise Wrong(f"the service did not start:\n{(self.folder / 'service.log').read_text()[-2000:]}")
        self.url = line.removeprefix("listening on ")

    def end(self, number: signal.Signals) -> int:
        assert self.server is not None
        self.server.send_signal(number)
        code = self.server.wait(LIMIT_S)
        assert self.server.stdout is not None
        self.server.stdout.close()
        self.server = None
        return code

    def wait(self, what: str, arguments: tuple[str, ...], field_name: str, value: object) -> None:
        """Until a command's JSON has this value."""
        program = [sys.executable, "-P", "-m", "llama_orch.cli", *arguments, "--json"]

        def is_so() -> bool:
            done = subprocess.run(program, env=self.environment, capture_output=True, text=True, timeout=LIMIT_S)
            return done.returncode == 0 and json.loads(done.stdout)[field_name] == value

        until(is_so, LIMIT_S)
        self.say(f"# {what}")


def prepare(folder: Path) -> None:
    """Two model files of the user's, and the configuration."""
    models = folder / "models"
    models.mkdir(parents=True)
    for name in ("coder.gguf", "coder-v2.gguf"):
        shutil.copy(str(files("llama_orch.models") / "tiny.gguf"), models / name)
    configuration = {
        "devices": [
            {"id": "rtx3090", "name": "RTX 3090", "backend": "simulated", "vram_bytes": 24 * GIB},
            {"id": "rtx3060", "name": "RTX 3060", "backend": "simulated", "vram_bytes": 12 * GIB},
        ],
        "pools": [
            {"id": "coder", "model": f"file:{models}/coder.gguf", "slots": 2},
            {"id": "second", "engine": "ctransformers", "replicas": 1},
        ],
        "catalog": {"file_roots": [str(models)]},
        "sessions": {"budgets": {"mode": "enforce", "tokens": 400}},
        "policy": {"outbound": {"deny": ["*.tracker.example"]}},
        "tasks": {"keep_transcripts": True},
    }
    (folder / "config.yaml").write_text(json.dumps(configuration, indent=2))


def play(stage: Rehearsal) -> None:
    models = stage.folder / "models"
    stage.chapter("Two cards, nothing pinned")
    stage.command("config", "check", str(stage.folder / "config.yaml"))
    stage.serve()
    stage.wait("both pools are ready", ("pools", "health", "coder"), "ready", True)
    stage.wait("", ("pools", "health", "second"), "ready", True)
    stage.command("capabilities", has="rtx3060")
    stage.command("pools", has="coder")

    stage.chapter("Both engines")
    story = ("run", "Once upon a time", "--max-tokens", "24", "--seed", "7", "--model")
    stage.command(*story, f"file:{models}/coder.gguf")
    stage.command(*story, "builtin:tiny", "--engine", "ctransformers")

    stage.chapter("The catalog: enter, verify, serve")
    stage.command("models", "add", "coder-v2", f"file:{models}/coder-v2.gguf", "--tag", "coding")
    stage.command("models", "verify", "coder-v2", has="passed")
    stage.command("run", "The fox", "--model", "coder-v2", "--max-tokens", "8", "--seed", "1")
    stage.command("models", "add", "wrong", f"file:{models}/coder.gguf", "--digest", "sha256:" + "0" * 64)
    stage.command("models", "verify", "wrong", expect=1)
    stage.command("run", "The fox", "--model", "wrong", expect=1, has="UNTRUSTED_ARTIFACT")

    stage.chapter("Drain and reload")
    stage.command("pools", "reload", "coder", "coder-v2", has="done: ")
    stage.command("pools", "drain", "coder", "--deadline-ms", "10000", "--wait")
    stage.command("pools", "reload", "coder", f"file:{models}/coder.gguf", has="done: ")

    stage.chapter("Retire")
    stage.command("models", "retire", "coder-v2")
    stage.command("run", "The fox", "--model", "coder-v2", expect=1, has="MODEL_DEPRECATED")
    stage.command("models", "activate", "coder-v2")
    stage.command("run", "The fox", "--model", "coder-v2", "--max-tokens", "4", "--seed", "1")

    stage.chapter("Artifacts")
    steps = '{"steps": ["read", "write"]}'
    plan = stage.command("artifacts", "put", "-", "--kind", "plan", "--tag", "fox", stdin=steps)
    stage.command("artifacts", "put", "-", "--kind", "summary", "--parent", plan, stdin='{"text": "done"}')
    stage.command("artifacts", "tree", plan)
    stage.command("artifacts", "ls", "--kind", "trace", has="trace")

    stage.chapter("What may be called")
    stage.http("POST", "/v1/policy/outbound/check", {"url": "http://169.254.169.254/latest/meta-data/"}, expect=200)
    stage.http("POST", "/v1/tools/fetch", {"url": "https://a.tracker.example/"}, expect=403)
    decision = stage.http("POST", "/v1/policy/outbound/check", {"url": "https://192.0.2.10/model"}, expect=200)
    if decision["allowed"]:
        raise Wrong("an address that is for documentation is nobody's")

    stage.chapter("Budgets")
    told = ("--session", SESSION, "--model", "builtin:tiny", "--max-tokens", "150", "--seed", "3")
    stage.command("run", "Once upon a time", *told)
    stage.command("sessions", "get", SESSION, has="tokens_budget_remaining")
    stage.command("run", "Once upon a time", *told[:-4], "--max-tokens", "390", expect=75, has="BUDGET_EXHAUSTED")

    stage.chapter("Cancel")
    body = {"task_id": LONG_TASK, "model_ref": "builtin:tiny", "prompt": "Once", "max_tokens": 2000}
    stage.http("POST", "/v1/tasks", body, expect=202)
    stage.command("tasks", "cancel", LONG_TASK)
    stage.command("tasks", "get", LONG_TASK)

    stage.chapter("kill -9, and all is there again")
    assert stage.server is not None
    workers = descendants(stage.server.pid)
    stage.say("$ kill -9 $(pidof llama-orch)")
    stage.end(signal.SIGKILL)
    until(lambda: not any(is_running(pid) for pid in workers))
    stage.say(f"# its {len(workers)} workers have ended")
    stage.serve()
    stage.wait("the pools are ready again", ("pools", "health", "coder"), "ready", True)
    stage.command("models", "ls", has="coder-v2")
    stage.command("artifacts", "get", plan, has="write")
    stage.command("run", "The fox", "--model", "coder-v2", "--max-tokens", "4", "--seed", "1")

    stage.chapter("An orderly end")
    stage.say("$ kill -TERM $(pidof llama-orch)")
    code = stage.end(signal.SIGTERM)
    stage.say(f"# exit code {code}")
    if code != 0:
        raise Wrong(f"SIGTERM ended in {code}")
    stage.say("```")


def rehearse() -> list[str]:
    """The transcript. Raises Wrong."""
    with tempfile.TemporaryDirectory(prefix="llorch-smoke-") as folder:
        stage = Rehearsal(Path(folder))
        prepare(stage.folder)
        try:
            play(stage)
        finally:
            if stage.server is not None:
                stage.end(signal.SIGKILL)
        return stage.lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="the page to keep it on")
    given = parser.parse_args()
    try:
        lines = rehearse()
    except Wrong as wrong:
        print(f"\nWRONG: {wrong}", file=sys.stderr)
        return 1
    if given.write:
        head = (
            "# The reference deployment, rehearsed\nWritten by `tox -e smoke`: a 24 GB and a 12 GB card, declared, "
            "both engines, one day's worth of\ncommands. Ids and times are those of that run.\n"
        )
        given.write.write_text(head + "\n".join(line.rstrip() for line in lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
