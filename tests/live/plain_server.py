"""llama.cpp's own HTTP server as anybody would run it: on a TCP port, with a key, and no worker of ours."""

from __future__ import annotations

import selectors
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import llama_orch

KEY = "box-key-0123456789"
ALIAS = "org/tiny"
TINY = Path(llama_orch.__file__).parent / "models" / "tiny.gguf"
_START_LIMIT_S = 60.0
_PROGRAM = """
import sys, xllamacpp
model, alias, key, port, slots, ctx = sys.argv[1:]
c = xllamacpp.CommonParams()
c.model.path, c.model_alias, c.api_keys = model, {alias}, [key]
c.hostnames, c.port = ["127.0.0.1"], int(port)
c.n_parallel, c.n_ctx = int(slots), int(slots) * int(ctx)
c.ui = c.warmup = c.fit_params = False
c.offline = True
c.cpuparams.n_threads = c.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(c)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class PlainServer:
    process: subprocess.Popen[bytes]
    address: str  # http://127.0.0.1:PORT

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])


@contextmanager
def plain_server(*, port: int = 0, slots: int = 2, ctx: int = 1024) -> Iterator[PlainServer]:
    arguments = [str(TINY), ALIAS, KEY, str(port), str(slots), str(ctx)]
    with subprocess.Popen(
        [sys.executable, "-P", "-c", _PROGRAM, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            assert process.stdout is not None
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)
                said = process.stdout.readline().decode().strip() if selector.select(_START_LIMIT_S) else ""
            assert said.startswith("http://127.0.0.1:"), said
            yield PlainServer(process, said)
        finally:
            process.kill()
