"""Tries one grammar on llama.cpp, in a process that may be lost: short answers of a small model that follow it.

Some grammars take llama.cpp more and more time or memory for every token, or end the process; which ones, only the
attempt tells. Reads one JSON line (`grammar`, `model_path`, `socket_path`, `parent_pid`, `cpu_s`, `memory_bytes`) from
stdin and prints two: one when it is ready to try, then `error` (null: it works) and `cpu_s`, the processor time that
the longest answer took.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any

from llama_orch.workers import lifeline

# About as many as it takes for a grammar to show that it gets slower.
TOKENS = 64
ANSWERS = 3  # each goes other ways through the grammar
_CTX = 256
_ANYTHING = {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "cache_prompt": False}


def main() -> None:
    given = json.loads(sys.stdin.buffer.readline())
    lifeline.die_with_parent(given["parent_pid"])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (given["cpu_s"], given["cpu_s"]))
    # What can be written to, and not all address space: of that a GPU's libraries reserve any amount.
    resource.setrlimit(resource.RLIMIT_DATA, (given["memory_bytes"], given["memory_bytes"]))
    say(attempt(given["grammar"], given["model_path"], given["socket_path"]))
    os._exit(0)  # the library's threads need not be waited for


def say(line: dict[str, Any]) -> None:
    os.write(sys.stdout.fileno(), json.dumps(line).encode() + b"\n")


def attempt(grammar: str, model_path: str, socket_path: str) -> dict[str, Any]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model_path
    params.hostnames = [socket_path]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    settings = {"n_ctx": _CTX, "n_batch": 32, "n_ubatch": 32, "n_parallel": 1, "n_threads_http": 1, "verbosity": 1}
    fixed = {"fit_params": False, "warmup": False, "ui": False, "offline": True, "n_gpu_layers": 0, "cache_ram_mib": 0}
    for name, value in {**settings, **fixed}.items():
        setattr(params, name, value)
    server = xllamacpp.Server(params)
    say({})  # what ends the process from here on is the grammar's doing
    slowest_s = 0.0
    for seed in range(1, ANSWERS + 1):
        began = time.process_time()
        body = {"prompt": "Once upon a time", "n_predict": TOKENS, "seed": seed, "grammar": grammar, **_ANYTHING}
        answer = server.handle_completions(body)
        slowest_s = max(slowest_s, time.process_time() - began)
        if "choices" not in answer:
            return {"error": str(answer.get("error", {}).get("message", "it failed")), "cpu_s": slowest_s}
    return {"error": None, "cpu_s": slowest_s}


if __name__ == "__main__":
    main()
