"""A worker's stderr: cut into lines, cleaned, kept in part, forwarded to the log, and read for what it tells.

It owns no IO: bytes come in through `feed`. What an engine prints may hold anything (a model's name, say), so control
characters are replaced before a line reaches a log, and a line that speaks of API keys is dropped.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Mapping

from llama_orch.engines.base import is_out_of_memory

_log = logging.getLogger("llama_orch.worker")

_LINES_KEPT = 50
_LINE_CHARS_MAX = 2000
_MIB = 1024 * 1024

# llama.cpp's own prefix: "0.00.004.952 E gguf_init…": minutes.seconds.milliseconds.microseconds, then the level.
_LEVEL = re.compile(r"\d+\.\d+\.\d+\.\d+ ([A-Z]) ")
# These explain a death at any time; the others only a load that failed, where the first one is nearest to the cause.
_FATAL = re.compile(r"GGML_ASSERT|GGML_ABORT|CUDA error|cudaMalloc failed|terminate called|Segmentation fault")
# What an engine says before it dies of it; a backtrace may follow. After more lines than this it has lived on.
_FATAL_LINES = 200
# The C++ runtime names the exception's type on one line and what it said on the next.
_WHAT = re.compile(r"what\(\): +")
_ERROR = re.compile(r"failed to |error loading|error: |Error: ")
_BUFFER = re.compile(r"(\S+)\s+(model|KV|compute|output|RS) buffer size =\s*([\d.]+) MiB")
_BUFFER_KINDS = {"model": "weights", "KV": "kv", "compute": "compute", "output": "output", "RS": "state"}
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")
_KEYS = re.compile(r"api[_-]?key", re.IGNORECASE)


class WorkerLog:
    """Collects one worker's stderr."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        self.lines: deque[str] = deque(maxlen=_LINES_KEPT)
        self.first_error = ""
        self._fatal_error = ""
        self._fatal_at = -_FATAL_LINES  # the number of that line, or of the last one of its kind
        self._lines_taken = 0
        self.buffer_bytes: dict[str, int] = {}
        self._fields = dict(fields)
        self._tail = b""
        self._secrets: list[str] = []

    @property
    def fatal_error(self) -> str:
        """The line that explains the worker's death, if it dies now: the first that tells of a lack of memory, else the
        last that an engine says before it aborts."""
        return self._fatal_error if self._lines_taken - self._fatal_at < _FATAL_LINES else ""

    def redact(self, secret: str) -> None:
        """Strike this text from every line to come."""
        self._secrets.append(secret)

    def feed(self, data: bytes) -> None:
        """Take what came from the pipe; whole lines are handled, the rest waits for its end."""
        *lines, self._tail = (self._tail + data).split(b"\n")
        for line in lines:
            self._take(line)
        if len(self._tail) > _LINE_CHARS_MAX:
            self.flush()

    def flush(self) -> None:
        """Handle what waits for an end of line: the pipe is closed, or the line is longer than any honest one."""
        line, self._tail = self._tail, b""
        if line:
            self._take(line)

    def say(self, level: int, message: str) -> None:
        """Log a sentence of our own with the worker's fields."""
        _log.log(level, message, extra={"fields": self._fields})

    def _take(self, raw: bytes) -> None:
        line = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", raw[:_LINE_CHARS_MAX].decode(errors="replace").rstrip())
        if not line or _KEYS.search(line):
            return
        for secret in self._secrets:
            line = line.replace(secret, "[redacted]")
        self.lines.append(line)
        self._lines_taken += 1
        is_error = self._note_error(line)
        self._note_buffer(line)
        _log.log(logging.WARNING if is_error else logging.DEBUG, line, extra={"fields": self._fields})

    def _note_error(self, line: str) -> bool:
        """Remember the line if it explains a failure; True when it is an error at all."""
        level = _LEVEL.match(line)
        text = _LEVEL.sub("", line).strip()
        if _WHAT.match(text) and self._fatal_at == self._lines_taken - 1:
            text = f"{self._fatal_error}: {_WHAT.sub('', text)}"
        is_memory = (level is None or level[1] == "E") and is_out_of_memory(text)
        if is_memory or _FATAL.search(text):
            if not is_out_of_memory(self.fatal_error):
                self._fatal_error = text
            self._fatal_at = self._lines_taken
            return True
        is_error = level[1] == "E" if level else bool(_ERROR.search(text))
        if is_error and not self.first_error:
            self.first_error = text
        return is_error

    def _note_buffer(self, line: str) -> None:
        """Add up buffers by device and kind: llama.cpp prints one line for each part of a split model."""
        found = _BUFFER.search(line)
        if found:
            key = f"{found[1].removesuffix('_Mapped')}/{_BUFFER_KINDS[found[2]]}"
            self.buffer_bytes[key] = self.buffer_bytes.get(key, 0) + round(float(found[3]) * _MIB)
