"""Schemathesis against the real service: real llama.cpp in one pool, simulated engines behind short queues in two, and
one in a pool that no task is for, which alone is drained and reloaded.

python tests/contract/fuzz/run.py                               the gate: the same requests on every run
python tests/contract/fuzz/run.py --random --max-time 600       the nightly variant; prints its seed

The exit code is 0 when no request found a defect and the run was as deep as it is meant to be.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tests.live.client import until
from tests.live.elsewhere import elsewhere
from tests.live_service import LiveService, live_service

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
DOCUMENTS = ROOT / "src" / "llama_orch" / "contract" / "documents"
PHASES = "examples,coverage,fuzzing,stateful"
MODEL = "builtin:tiny"
TASK_ID = "3f2b8c1e-9d5a-4c57-8a43-0c7d5b1f2e90"
SESSION_ID = "7a1d0f3c-5b2e-4f6a-8c9d-1e2f3a4b5c6d"
CHANGING = "changing"
MODEL_ID = "entered"
EMBEDDED_ID, RANKED_ID = "3f2b8c1e-9d5a-4c57-8a43-0c7d5b1f2e91", "3f2b8c1e-9d5a-4c57-8a43-0c7d5b1f2e92"
ARTIFACT_CONTENT = {"fuzz": "an artifact that exists throughout"}
ARTIFACT_ID = hashlib.sha256(json.dumps(ARTIFACT_CONTENT, separators=(",", ":")).encode()).hexdigest()
IDS = {
    "/v1/artifacts/": [ARTIFACT_ID, "ff" * 32],
    "/v1/tasks/{id}/stream": [TASK_ID, "ffffffff-ffff-4fff-bfff-ffffffffffff", EMBEDDED_ID, RANKED_ID],
    "/v1/tasks/": [TASK_ID, "ffffffff-ffff-4fff-bfff-ffffffffffff"],
    "/v1/sessions/": [SESSION_ID, "ffffffff-ffff-4fff-bfff-ffffffffffff"],
    "/v1/catalog/models/": [MODEL_ID, "nowhere"],
    "/v1/pools/{id}/drain": [CHANGING, "nowhere"],
    "/v1/pools/{id}/reload": [CHANGING, "nowhere"],
    "/v1/pools/": ["default", "nowhere"],
    "/v1/models/": [MODEL, "no/where"],
}

# What a run must have seen, or it has tested less than it seems to: operation and status, error codes, frames. A random
# run ends when its time is over, so of it only successes and frames are asked.
MUST_SEE = {
    "data": [
        "hostile correlation-ID",
        *(f"createTask {status}" for status in (202, 400, 401, 405, 409, 415, 429)),
        *(f"code {code}" for code in ("ADMISSION_REJECT", "DEADLINE_UNMET", "CONFLICT")),
        *(f"listTasks {status}" for status in (200, 400, 401)),
        *(f"{operation} {status}" for operation in ("getTask", "streamTask") for status in (200, 400, 401, 404)),
        *(f"cancelTask {status}" for status in (204, 400, 401, 404)),
        *(f"getSession {status}" for status in (200, 400, 401, 404)),
        *(f"deleteSession {status}" for status in (204, 400, 401)),
        *(f"frame {name}" for name in ("started", "token", "metrics", "end", "error")),
        *(f"result {name}" for name in ("embeddings", "scores")),
    ],
    "control": [
        "hostile correlation-ID",
        *(f"listPools {status}" for status in (200, 400, 401)),
        *(f"{operation} {status}" for operation in ("getPool", "getPoolHealth") for status in (200, 400, 401, 404)),
        *(f"{operation} {status}" for operation in ("drainPool", "reloadPool") for status in (202, 400, 401, 404, 415)),
        *(f"createCatalogModel {status}" for status in (201, 400, 401, 405, 409, 415)),
        *(f"listCatalogModels {status}" for status in (200, 400, 401)),
        *(f"getCatalogModel {status}" for status in (200, 400, 401, 404)),
        *(f"deleteCatalogModel {status}" for status in (204, 400, 401, 404)),
        *(f"verifyCatalogModel {status}" for status in (202, 400, 401, 404)),
        *(f"fetchCatalogModel {status}" for status in (202, 400, 401, 404)),
        *(f"streamCatalogModelFetch {status}" for status in (200, 400, 401, 404)),
        *(f"setCatalogModelState {status}" for status in (202, 400, 401, 404, 415)),
        *("drainPool 405", "reloadPool 405", "reloadPool 409"),
        *(f"createArtifact {status}" for status in (200, 201, 400, 401, 404, 405, 415)),
        *(f"listArtifacts {status}" for status in (200, 400, 401)),
        *(f"getArtifact {status}" for status in (200, 401, 404)),
        *(f"deleteArtifact {status}" for status in (204, 401, 404)),
        *(f"{operation} {status}" for operation in ("getCapabilities", "getMetrics") for status in (200, 401)),
        *(f"checkOutbound {status}" for status in (200, 400, 401, 405, 415)),
        *(f"fetchUrl {status}" for status in (200, 400, 401, 403, 405, 415, 502)),
        *(f"getHealthz {status}" for status in (200, 405)),
    ],
    "openai": [
        "hostile correlation-ID",
        *(f"listOpenAiModels {status}" for status in (200, 401)),
        *(f"getOpenAiModel {status}" for status in (200, 401, 404)),
        *(f"createChatCompletion {status}" for status in (200, 400, 401, 405, 415)),
        *(f"createCompletion {status}" for status in (200, 400, 401, 405, 415)),
        *(f"createEmbedding {status}" for status in (200, 400, 401)),
        *("createChatCompletion 429", "createCompletion 429", "chunks", "whole stream"),
    ],
}
MUST_SUCCEED = 50  # tasks, on the real engine; a random run may have little time


class Files(NamedTuple):
    """The model files of the simulated pools. A simulated engine reads none, so that they are empty."""

    short: Path
    dropping: Path
    changing: Path
    changed: Path  # what `changing` is reloaded to, and back from
    entered: Path  # of all models of the catalog; no pool has it

    @property
    def models(self) -> list[str]:
        """Of tasks; the first is the real one."""
        return [MODEL, f"file:{self.short}", f"file:{self.dropping}"]

    @property
    def pools(self) -> list[str]:
        """That serve them."""
        return ["default", "short", "dropping"]

    @property
    def reloads(self) -> list[str]:
        return [f"file:{self.changing}", f"file:{self.changed}"]


def files_in(folder: Path) -> Files:
    files = Files(*(folder / f"{name}.gguf" for name in Files._fields))
    for file in files:
        file.touch()
    files.entered.write_bytes(b"another model than the others")
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", action="store_true", help="other requests on every run")
    parser.add_argument("--seed", type=int, help="of a random run, to repeat it")
    parser.add_argument("--max-time", type=int, default=300, help="seconds of a random run, all documents together")
    parser.add_argument("--junit", type=Path, help="a folder for JUnit reports")
    given = parser.parse_args()
    seed = (random.SystemRandom().randrange(2**32) if given.seed is None else given.seed) if given.random else None
    with tempfile.TemporaryDirectory(prefix="llorch-fuzz-") as folder, elsewhere() as (there, _):
        files = files_in(Path(folder))
        with live_service(configuration(files, there)) as service:
            submit_and_wait(service, files)
            enter(service, files)
            store_artifact(service)
            problems = [
                problem
                for name in MUST_SEE
                for problem in fuzz(
                    service, name, arguments(name, seed, given), files, there, Path(folder), is_gate=seed is None
                )
            ]
            problems += left_in_service(service, files)
            problems += judge(service, MUST_SUCCEED if seed is None else 1)
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    if seed is not None:
        print(f"seed: {seed}")
    return 1 if problems else 0


def configuration(files: Files, there: str) -> dict[str, Any]:
    """Answers are short where a task does not say how long; the queues of the simulated pools are soon full. One
    machine may be called, so that random URLs reach nobody and no name server."""
    simulated = {"engine": "simulated", "slots": 1, "max_tokens": 32}
    return {
        "devices": [{"id": "cpu", "backend": "cpu"}],
        "policy": {"outbound": {"default": "deny", "allow": [there.removeprefix("http://")]}},
        "sessions": {"max_turns": 1000, "budgets": {"mode": "enforce", "tokens": 10_000_000}},
        "catalog": {"file_roots": [str(files.changed.parent)]},
        "pools": [
            {"id": "default", "model": MODEL, "max_tokens": 8},
            {"id": "short", "model": f"file:{files.short}", "queue": {"capacity": 1}, **simulated},
            {
                "id": "dropping",
                "model": f"file:{files.dropping}",
                "queue": {"capacity": 1, "full_policy": "drop-lru"},
                **simulated,
            },
            {"id": CHANGING, "model": f"file:{files.changing}", **simulated},
        ],
    }


def arguments(name: str, seed: int | None, given: argparse.Namespace) -> list[str]:
    config = "schemathesis.toml" if seed is None else "schemathesis-random.toml"
    more = [] if seed is None else ["--seed", str(seed), "--max-time", str(max(1, given.max_time // len(MUST_SEE)))]
    if given.junit:
        given.junit.mkdir(parents=True, exist_ok=True)
        more += ["--report", "junit", "--report-junit-path", str(given.junit.resolve() / f"fuzz-{name}.xml")]
    location = str(DOCUMENTS / f"{name}.json")
    return ["--config-file", str(HERE / config), "--no-color", "run", location, "--phases", PHASES, *more]


def fuzz(
    service: LiveService, name: str, options: list[str], files: Files, there: str, folder: Path, *, is_gate: bool
) -> Iterator[str]:
    """One run of `st`, in a folder of its own so that nothing stays behind. `there`: a machine to call. Yields
    problems."""
    seen_path = folder / f"{name}.json"
    environment = os.environ | {
        "FUZZ_SEEN": str(seen_path),
        "FUZZ_MODELS": json.dumps(files.models),
        "FUZZ_SOURCE": f"file:{files.entered}",
        "FUZZ_POOLS": json.dumps(files.pools),
        "FUZZ_RELOADS": json.dumps(files.reloads),
        "FUZZ_IDS": json.dumps(IDS),
        "FUZZ_ARTIFACT": json.dumps(ARTIFACT_CONTENT),
        "FUZZ_URLS": json.dumps([f"{there}/text", f"{there}/short", f"{there}/back", "http://127.0.0.2/"]),
        "LLORCH_API_TOKEN": service.token,
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis"),
    }
    st = Path(sys.executable).with_name("st")
    code = subprocess.call([str(st), *options, "--url", service.url], cwd=folder, env=environment)
    if code:
        yield f"{name}: st ended with {code}"
    seen = Counter(json.loads(seen_path.read_text())) if seen_path.exists() else Counter()
    print(f"{name}: {sum(n for key, n in seen.items() if key[-1].isdigit())} answers;", end=" ")
    print(", ".join(f"{key} {count}" for key, count in sorted(seen.items())))
    must_see = [key for key in MUST_SEE[name] if is_gate or key.startswith("frame ") or key.split()[-1].startswith("2")]
    yield from (f"{name}: the run never saw: {key}" for key in must_see if not seen[key])


def submit_and_wait(service: LiveService, files: Files) -> None:
    """Tasks that exist throughout, one of each workload. That their streams have ended says that their pools are
    ready."""
    story = {
        "task_id": TASK_ID,
        "model_ref": MODEL,
        "prompt": "Once",
        "max_tokens": 8,
        "seed": 7,
        "session_id": SESSION_ID,
    }
    reads = {"model_ref": files.models[1], "inputs": ["a fox", "a red fox", "a dog"]}
    embedding = {"task_id": EMBEDDED_ID, "workload": "embedding", **reads}
    ranking = {"task_id": RANKED_ID, "workload": "rerank", **reads}
    headers = service.headers | {"Content-Type": "application/json"}
    for body in (story, embedding, ranking):
        request = urllib.request.Request(f"{service.url}/v1/tasks", json.dumps(body).encode(), headers)
        urllib.request.urlopen(request, timeout=60).close()
        assert "event: end" in read(service, f"/v1/tasks/{body['task_id']}/stream")


def store_artifact(service: LiveService) -> None:
    """One that is there to be read; who deletes it has it stored anew (see hooks.py)."""
    body = json.dumps({"kind": "other", "content": ARTIFACT_CONTENT}).encode()
    headers = service.headers | {"Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(f"{service.url}/v1/artifacts", body, headers), timeout=60).close()


def enter(service: LiveService, files: Files) -> None:
    """A model of the catalog that exists throughout."""
    body = json.dumps({"id": MODEL_ID, "source_url": f"file:{files.entered}"}).encode()
    headers = service.headers | {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{service.url}/v1/catalog/models", body, headers)
    urllib.request.urlopen(request, timeout=60).close()


def left_in_service(service: LiveService, files: Files) -> Iterator[str]:
    """After all drains and reloads the next reload brings their pool back, and the others have never gone."""
    until(lambda: ended(health_of(service)))
    body, headers = json.dumps({"new_model_ref": files.reloads[0]}).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{service.url}/v1/pools/{CHANGING}/reload", body, service.headers | headers)
    urllib.request.urlopen(request, timeout=60).close()
    until(lambda: ended(health_of(service)))
    if not str(health_of(service)["last_reload"]).startswith("done:"):
        yield f"the pool that was drained does not come back: {health_of(service)}"
    for pool in json.loads(read(service, "/v1/pools"))["items"]:
        if not pool["ready"]:
            yield f"pool {pool['id']} is out of service"


def health_of(service: LiveService) -> dict[str, Any]:
    health: dict[str, Any] = json.loads(read(service, f"/v1/pools/{CHANGING}/health"))
    return health


def ended(health: dict[str, Any]) -> bool:
    """No reload runs."""
    return not str(health["last_reload"]).startswith(("loading", "waiting"))


def read(service: LiveService, path: str) -> str:
    request = urllib.request.Request(service.url + path, headers=service.headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        text: str = response.read().decode()
    return text


def judge(service: LiveService, must_succeed: int) -> Iterator[str]:
    """What the service says of itself after the run: it decoded, lost no worker, and nothing unforeseen happened."""
    metrics = read(service, "/metrics")
    pattern = r'^tasks_finished_total\{engine="llamacpp",.*state="succeeded"\} ([0-9.e+]+)$'
    succeeded = sum(float(value) for value in re.findall(pattern, metrics, re.MULTILINE))
    if succeeded < must_succeed:
        yield f"only {succeeded:g} tasks of the real engine succeeded; {must_succeed} must"
    if re.findall(r"^replica_restarts_total\{", metrics, re.MULTILINE):
        yield "a worker was lost"
    for entry in service.log():
        if entry["level"] in ("error", "critical"):
            yield f"the service logged: {entry['message'][:500]}"


if __name__ == "__main__":
    sys.exit(main())
