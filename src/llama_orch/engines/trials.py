"""Whether a grammar is harmless to llama.cpp: judged in a process that may be lost, once for each grammar.

A worker that is given a bad grammar grows, stands still or dies, with the tasks of others in it.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import sys
import tempfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import msgspec

from llama_orch.engines.base import EngineBusy
from llama_orch.engines.process import worker_environment

# For a good grammar 64 tokens take 0.02 to 0.1 s with the small model's 1,280 tokens of vocabulary. With 128,000 tokens
# of vocabulary any grammar took 60 ms for a token (two cores of 2023), and one that is near this limit here 100 ms.
ANSWER_CPU_S = 0.5
_PROCESS_CPU_S = 2  # with the start of the interpreter and the load of the library
_MEMORY_BYTES = 1 << 30
_WALL_S = 20.0  # on a machine that has other things to do
_REMEMBERED = 1024
_PARSE_ERROR = re.compile(r"error parsing grammar: ([^\r\n]{1,300})")
_MODEL = Path(__file__).parents[1] / "models" / "tiny.gguf"


class _Result(msgspec.Struct):
    error: str | None
    cpu_s: float


class GrammarTrials:
    """Judges grammars, one at a time, and remembers what it found."""

    def __init__(self) -> None:
        self._found: OrderedDict[bytes, str | None] = OrderedDict()
        self._turn = asyncio.Lock()

    async def refusal(self, grammar: str) -> str | None:
        """Why the engine must not be given the grammar; None when it may. EngineBusy when that could not be found out
        in time."""
        digest = hashlib.sha256(grammar.encode()).digest()
        if digest not in self._found:
            async with self._turn:
                if digest not in self._found:
                    self._found[digest] = await _attempt(grammar)
                    if len(self._found) > _REMEMBERED:
                        self._found.popitem(last=False)
        return self._found[digest]


async def _attempt(grammar: str) -> str | None:
    with tempfile.TemporaryDirectory(prefix="llorch-trial-") as folder:
        given = {
            "grammar": grammar,
            "model_path": str(_MODEL),
            "socket_path": f"{folder}/engine.sock",
            "parent_pid": os.getpid(),
            "cpu_s": _PROCESS_CPU_S,
            "memory_bytes": _MEMORY_BYTES,
        }
        try:
            process = await _start(folder)
        except OSError as error:
            raise EngineBusy(f"no process could be started to try the grammar: {error.strerror}") from error
        try:
            async with asyncio.timeout(_WALL_S):
                out, err = await process.communicate(msgspec.json.encode(given) + b"\n")
        except TimeoutError as error:
            raise EngineBusy("the grammar could not be tried in time") from error
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
    return _judge(out, err)


async def _start(folder: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "llama_orch.workers.grammar_trial"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=worker_environment(os.environ, ()),
        cwd=folder,
        start_new_session=True,
    )


def _judge(out: bytes, err: bytes) -> str | None:
    began, _, answer = out.partition(b"\n")
    if not began:
        words = err.decode(errors="replace").strip().splitlines()
        raise EngineBusy(f"llama.cpp did not start to try the grammar: {words[-1] if words else 'it gave no reason'}")
    try:
        result = msgspec.json.decode(answer, type=_Result)
    except msgspec.DecodeError:
        return "it takes llama.cpp too much time or memory, or ends it; use fewer alternatives and optional parts"
    if result.error is not None:
        why = _PARSE_ERROR.search(err.decode(errors="replace"))
        return f"llama.cpp refuses it: {why[1] if why else result.error}"
    if result.cpu_s > ANSWER_CPU_S:
        return "it takes llama.cpp too much time for each token; use fewer alternatives and optional parts"
    return None
