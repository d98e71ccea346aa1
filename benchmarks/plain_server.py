"""llama.cpp's own server, alone on a port of loopback, with the parameters that our workers have: what is called
directly, and what a peer's proxy stands in front of.

    python benchmarks/plain_server.py SLOTS CTX THREADS KEY

Serves builtin:tiny. Prints its address. Ends with its standard input.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

KEY = "plain-0123456789abcdefghijklmnopqrstuv"
SAID = "listening on "
SCRIPT = Path(__file__).resolve()


@asynccontextmanager
async def a_plain_server(slots: int, ctx: int, threads: int) -> AsyncIterator[str]:
    """Its address, http://127.0.0.1:PORT. The key is KEY."""
    command = [sys.executable, str(SCRIPT), *map(str, (slots, ctx, threads, KEY))]
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        said = (await process.stdout.readline()).decode()
        if not said.startswith(SAID):
            raise RuntimeError("llama.cpp's server did not start")
        yield said.removeprefix(SAID).strip()
    finally:
        process.stdin.close()
        await process.wait()


def main(slots: int, ctx: int, threads: int, key: str) -> None:
    import xllamacpp

    from llama_orch.models.references import resolve
    from llama_orch.workers.llamacpp import parameters

    said_fd = os.dup(1)
    os.dup2(2, 1)  # the library prints to descriptor 1 as it likes
    made = parameters(
        xllamacpp,
        {
            "slots": slots, "ctx": ctx, "threads": threads, "gpu": False, "socket_path": "127.0.0.1", "api_key": key,
            "cache_ram_mib": 0, "slot_save_path": "", "model_path": str(resolve("builtin:tiny")), "tensor_split": [],
        },
    )  # fmt: skip
    made.port = 0
    server = xllamacpp.Server(made)
    os.write(said_fd, f"{SAID}{server.listening_address}\n".encode())
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), sys.argv[4])
