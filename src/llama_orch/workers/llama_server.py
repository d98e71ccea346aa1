"""Wraps the user's own `llama-server` binary, so that it keeps the duties of a worker.

The binary listens on our Unix socket (it does so when the host ends in .sock), reads its key from a 0600 file in the
0700 folder (a command line is readable by every user), and dies with this wrapper, which dies with the service.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llama_orch.workers import lifeline
from llama_orch.workers.llamacpp import ALL_LAYERS, LOG_VERBOSITY, SPARE_HTTP_THREADS, batch_size, purpose

_POLL_FIRST_S = 0.02
_POLL_MAX_S = 0.5

# What a user's extra arguments may not touch: the listener, the key, files to serve, tools, other models, telemetry of
# prompts, and what the service sets itself. A prefix covers its family (--api-key-file, --hf-repo, --no-slots …).
_REFUSED_FAMILIES = """
    --host --port --reuse-port --api- --path --server- --ssl- --cors --slot-save-path --media-path
    --tools --mcp --ui --no-ui --webui --no-webui --props --slots --no-slots --metrics --alias
    --model --hf --docker --rpc --ctx-size --parallel --gpu-layers --n-gpu-layers --fit --batch-size --ubatch-size
    --kv-unified --no-kv-unified --cache-ram --threads --log- --verbos --tensor-split --device --main-gpu --split-mode
    --embedding --rerank --pooling --cache-prompt --no-cache-prompt
"""
_REFUSED_SHORT_FORMS = """
    -m -mu -md -dr -hf -hfr -hff -hft -hfd -hfrd -hfv -hffv -a -c -np -ngl -b -ub -kvu -no-kvu -cram -t -tb -lv -v
    -ts -dev -mg -sm -fit -fitt -fitc
"""
_REFUSED_PREFIXES = tuple(_REFUSED_FAMILIES.split())
_REFUSED_SHORT = frozenset(_REFUSED_SHORT_FORMS.split())


def refused_argument(arguments: Sequence[str]) -> str | None:
    """The first of a user's extra arguments that is not allowed; None when all are."""
    for argument in arguments:
        name = argument.partition("=")[0].replace("_", "-")
        if name in _REFUSED_SHORT or name.startswith(_REFUSED_PREFIXES):
            return name
    return None


def main(line: lifeline.Lifeline) -> object:
    """Start the binary, wait until it has loaded the model, then stay until it or the service ends."""
    configuration = line.configuration
    refused = refused_argument(configuration["extra_args"])
    if refused:
        raise ValueError(f"extra_args may not have {refused}")
    key_file = Path(configuration["socket_path"]).with_name("engine.key")
    key_file.touch(mode=0o600)
    key_file.write_text(configuration["api_key"])
    child = subprocess.Popen(
        [configuration["binary"], *arguments(configuration, key_file)],
        stdin=subprocess.DEVNULL,
        preexec_fn=partial(lifeline.die_with_parent, os.getpid()),
    )
    line.on_end(child.kill)
    _wait_until_healthy(child, configuration["socket_path"])
    props = _get(configuration["socket_path"], "/props", configuration["api_key"])
    line.ready(engine_version=str(props.get("build_info", "unknown")))
    code = child.wait()
    # Its last words are on our stderr, which it shares. Our exit is what the service sees.
    os._exit(code if code > 0 else 1)


def arguments(configuration: dict[str, Any], key_file: Path) -> list[str]:
    """The binary's command line for our configuration line."""
    slots = configuration["slots"]
    given = {
        "--model": configuration["model_path"],
        "--host": configuration["socket_path"],
        "--api-key-file": key_file,
        "--parallel": slots,
        "--ctx-size": slots * configuration["ctx"],
        "--batch-size": batch_size(configuration),
        "--ubatch-size": batch_size(configuration),
        "--threads": configuration["threads"],
        "--threads-batch": configuration["threads"],
        "--threads-http": slots + SPARE_HTTP_THREADS,
        "--n-gpu-layers": ALL_LAYERS if configuration["gpu"] else 0,
        "--cache-ram": configuration["cache_ram_mib"],
        "--slot-save-path": configuration["slot_save_path"],
        "--fit": "off",
        "--log-verbosity": LOG_VERBOSITY,
    }
    if configuration["tensor_split"]:
        given["--tensor-split"] = ",".join(str(share) for share in configuration["tensor_split"])
    flags = ["--no-kv-unified", "--slots", "--metrics", "--no-webui", "--offline"]
    if not configuration["gpu"]:
        flags.append("--no-warmup")
    if purpose(configuration) != "completion":
        flags += ["--embeddings" if purpose(configuration) == "embedding" else "--reranking", "--no-cache-prompt"]
    pairs = [text for name, value in given.items() for text in (name, str(value))]
    return [*pairs, *flags, *configuration["extra_args"]]


def _wait_until_healthy(child: subprocess.Popen[bytes], socket_path: str) -> None:
    """Poll /health until the model is loaded. No time limit here: the service watches for a stall."""
    pause_s = _POLL_FIRST_S
    while True:
        code = child.poll()
        if code is not None:
            raise RuntimeError(f"llama-server ended with code {code} while it loaded the model")
        try:
            _get(socket_path, "/health", "")
            return
        except (OSError, http.client.HTTPException):
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, _POLL_MAX_S)


def _get(socket_path: str, path: str, api_key: str) -> dict[str, Any]:
    """The JSON answer of one GET; ConnectionError when it is not 200."""
    connection = http.client.HTTPConnection("worker", timeout=10)
    connection.sock = socket.socket(socket.AF_UNIX)
    try:
        connection.sock.connect(socket_path)
        connection.request("GET", path, headers={"Authorization": f"Bearer {api_key}", "Connection": "close"})
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise ConnectionError(f"{path} answered {answer.status}")
        value: dict[str, Any] = json.loads(body)
        return value
    finally:
        connection.close()


if __name__ == "__main__":
    lifeline.run(main)
