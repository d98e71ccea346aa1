"""What `llama-orch run` shows of a task's frames."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llama_orch.cli.output import DONE, FAILED, clean, exit_code, note, print_error, to_json
from llama_orch.contract.models import (
    FRAMES,
    AdmissionResponse,
    EndFrame,
    Error,
    MetricsFrame,
    StartedFrame,
    TokenFrame,
)

if TYPE_CHECKING:
    from rich.status import Status

    from llama_orch.client import Frame

_EVENTS = {type: event for event, type in FRAMES.items()}
_DIGEST_CHARS = len("sha256:") + 12


@dataclass(slots=True)
class Answer:
    """What came of the task, whatever is shown of it."""

    parts: list[str] = field(default_factory=list)
    end: EndFrame | None = None

    def hear(self, frame: Frame) -> None:
        if isinstance(frame, TokenFrame):
            self.parts.append(frame.t)
        elif isinstance(frame, EndFrame):
            self.end = frame


class Text:
    """The answer's text on stdout; the place in the queue and the figures on stderr."""

    def __init__(self) -> None:
        self.code = FAILED  # until `end` says otherwise
        self._waiting = _Waiting()
        self._is_line_open = False
        _replace_what_cannot_be_encoded()

    def admitted(self, admission: AdmissionResponse) -> None:
        self._waiting.show(admission.queue_position, admission.predicted_start_ms)

    def show(self, frame: Frame) -> None:
        if isinstance(frame, TokenFrame):
            self._waiting.close()
            text = clean(frame.t)
            _write(text)
            self._is_line_open = not text.endswith("\n") if text else self._is_line_open
        elif isinstance(frame, StartedFrame | MetricsFrame):
            self._waiting.show(frame.queue_position, frame.predicted_start_ms)
        else:
            self.close()
            self.code = DONE if isinstance(frame, EndFrame) else exit_code(frame)
            if isinstance(frame, EndFrame):
                note(_summary(frame))
            else:
                print_error(frame)

    def close(self) -> None:
        """Leave stdout and stderr at the start of a line. A file or a pipe gets the answer and nothing more."""
        self._waiting.close()
        if self._is_line_open and sys.stdout.isatty():
            _write("\n")
        self._is_line_open = False


class JsonFrames:
    """Each frame on a line of its own."""

    def __init__(self) -> None:
        self.code = FAILED

    def admitted(self, admission: AdmissionResponse) -> None:
        pass

    def show(self, frame: Frame) -> None:
        _write(to_json({"event": _EVENTS[type(frame)], "data": frame}) + "\n")
        if isinstance(frame, EndFrame):
            self.code = DONE
        elif isinstance(frame, Error):
            self.code = exit_code(frame)

    def close(self) -> None:
        pass


class _Waiting:
    """The place in the queue: one line that changes on a terminal, else a line for each change."""

    def __init__(self) -> None:
        self._shown: int | None = None
        self._status: Status | None = None
        self._is_over = False

    def show(self, position: int | None, predicted_start_ms: int | None) -> None:
        if self._is_over or position is None:
            return
        line = f"waiting: place {position} in the queue" if position else "waiting: next in the queue"
        if predicted_start_ms is not None:
            line += f", start in about {predicted_start_ms / 1000:.1f} s"
        if sys.stderr.isatty():
            self._update(line)
        elif position != self._shown and (position or self._shown):
            note(line)
        self._shown = position

    def _update(self, line: str) -> None:
        if self._status is None:
            from rich.console import Console

            self._status = Console(stderr=True, markup=False, highlight=False).status(line)
            self._status.start()
        self._status.update(line)

    def close(self) -> None:
        self._is_over = True
        if self._status is not None:
            self._status.stop()
            self._status = None


def _summary(end: EndFrame) -> str:
    speed = f", {end.tokens_out * 1000 / end.decode_time_ms:.1f} tokens/s" if end.decode_time_ms else ""
    model = f"{end.engine} {end.engine_version}, model {end.model_digest[:_DIGEST_CHARS]}"
    return f"{end.tokens_out} tokens{speed}, {end.finish_reason}, seed {end.seed}, {model}"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _replace_what_cannot_be_encoded() -> None:
    """A terminal that is not UTF-8 shows question marks rather than end the answer."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
