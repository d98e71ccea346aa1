"""The log: JSON Lines on standard error, one event a line (HP-OBS-5), uvicorn's lines included.

Fields travel as `extra={"fields": {...}}`. Known secrets are blanked in every line, wherever they come from (HP-SEC-7).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any, TextIO

import msgspec

from llama_orch.context import correlation_id, identity

REDACTED = "[redacted]"
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

_encode = msgspec.json.Encoder(enc_hook=str).encode
# Control characters would let a text that came from outside forge a second line or drive a terminal.
_CONTROLS = {code: f"\\x{code:02x}" for code in [*range(32), *range(127, 160)]}


def event(logger: logging.Logger, level: int, message: str, **fields: Any) -> None:
    """One line: a short human sentence, and the fields that apply. Fields of None are left out."""
    if logger.isEnabledFor(level):
        logger.log(level, "%s", message, extra={"fields": {k: v for k, v in fields.items() if v is not None}})


class _Formatter(logging.Formatter):
    def __init__(self, secrets: Collection[str]) -> None:
        super().__init__()
        self._secrets = [secret for secret in secrets if secret]

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        found: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (current := correlation_id.get()) != "-":
            found["correlation_id"] = current
        if known := identity.get():
            found["identity"] = known
        found |= getattr(record, "fields", {})
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return {name: self.blank(value) for name, value in found.items()}

    def blank(self, value: Any) -> Any:
        """Strike secrets out of texts, before encoding: a JSON escape would hide them from the search."""
        if isinstance(value, str):
            for secret in self._secrets:
                value = value.replace(secret, REDACTED)
        return value


class JsonFormatter(_Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        return _encode(self.fields(record)).decode()


class TextFormatter(_Formatter):
    """For people at a terminal: time, level, message, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields = self.fields(record)
        head = f"{fields.pop('time')} {fields.pop('level'):7} {fields.pop('message')}"
        fields.pop("logger")
        exception = fields.pop("exception", None)
        tail = " ".join(f"{key}={value}" for key, value in fields.items())
        lines = [f"{head}  {tail}".rstrip(), *([] if exception is None else exception.splitlines())]
        return "\n".join(line.translate(_CONTROLS) for line in lines)


class _Handler(logging.StreamHandler[TextIO]):
    """Lines that cannot be written, on a disk that is full for instance, are lost and counted; nobody else fails for
    them. logging's own way would print the record as it is, secrets included."""

    _lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        lost = self._lost
        super().emit(record)
        if lost and lost == self._lost:  # it works again
            self._lost = 0
            text = f"{lost} lines of the log could not be written and are lost"
            super().emit(logging.LogRecord(__name__, logging.WARNING, "", 0, text, None, None))

    def handleError(self, record: logging.LogRecord) -> None:
        self._lost += 1


def set_up(level: str, format: str, secrets: Collection[str], stream: TextIO | None = None) -> None:
    """Route every logger of the process through one handler. `secrets` never appear in a line."""
    handler = _Handler(stream or sys.stderr)
    handler.setFormatter(TextFormatter(secrets) if format == "text" else JsonFormatter(secrets))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(LEVELS[level])
    # Client libraries narrate every request; their warnings are enough.
    for name in ("asyncio", "connexion", "httpx", "httpcore"):
        logging.getLogger(name).setLevel(max(logging.WARNING, LEVELS[level]))
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers[:] = []
        logging.getLogger(name).propagate = True
