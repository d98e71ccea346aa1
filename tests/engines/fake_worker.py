"""A worker that keeps, or breaks, the protocol in the way that its configuration names. Started by test_process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading

from llama_orch.workers import lifeline


def main(line: lifeline.Lifeline) -> object:
    match line.configuration["act"]:
        case "ready":
            sys.stderr.write("0.00.000.001 I load_tensors:   CUDA0 model buffer size =     2.50 MiB\n")
            sys.stderr.write("0.00.000.002 I load_tensors:   CUDA0 model buffer size =     1.50 MiB\n")
            sys.stderr.write(f"key {line.configuration['api_key']} \x1b[31mred\x1b[0m\n")
        case "prints":
            print("libraries print what they like", flush=True)
            os.write(1, b'{"ready": false, "error": "not me"}\n')
        case "refuse":
            raise RuntimeError("no such luck")
        case "abort":
            sys.stderr.write("ggml.c:1: GGML_ASSERT(x > 0) failed\n")
            sys.stderr.flush()
            os.abort()
        case "loaded, then no memory":
            line.ready(engine_version="1")
            sys.stderr.write("0.00.000.001 E CUDA error: out of memory\nggml-cuda.cu:104: CUDA error\n")
            sys.stderr.flush()
            os.abort()
        case "silent":
            threading.Event().wait()
        case "silent child":
            child = subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait()"])
            sys.stderr.write(f"child {child.pid}\n")
            sys.stderr.flush()
            threading.Event().wait()
        case "slow":
            for _ in range(8):
                sys.stderr.write(".\n")
                sys.stderr.flush()
                threading.Event().wait(0.15)
        case "child":
            child = subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait()"])
            line.ready(engine_version=str(child.pid))
            return child
        case "long line":
            sys.stderr.write("x" * 300_000 + "\n" + "after\n")
        case "environment":
            line.ready(engine_version=json.dumps(dict(os.environ)))
            return None
    sys.stderr.flush()
    line.ready(engine_version="1")
    return None


def deaf(*, hears_sigterm: bool = False, has_child: bool = False) -> None:
    """The end of stdin does not end this one, nor SIGTERM unless it is to; its child hears as little as it does, in a
    process group of its own."""
    if not hears_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.stdin.readline()
    version = "deaf"
    if has_child:
        waits = [sys.executable, "-c", "import threading; threading.Event().wait()"]
        version = str(subprocess.Popen(waits, process_group=0).pid)
    print(json.dumps({"ready": True, "engine_version": version}), flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    match os.environ.get("FAKE_WORKER"):
        case "deaf":
            deaf()
        case "deaf, with a deaf child":
            deaf(has_child=True)
        case "hears SIGTERM":
            deaf(hears_sigterm=True)
    lifeline.run(main)
