"""What models really took, learned from each load, so that the next forecast of the same is a measurement.

One small JSON file, replaced as a whole, so a reader never sees half of it. It is a memory and nothing more: lost or
damaged, it is empty, and forecasts are those of `memory.py` again.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path

ENTRIES_MAX = 500
# How far another load of the same model may move a forecast. Less is trusted to shrink one than to enlarge it: too
# little memory ends in a failed load, too much in an idle corner of a card.
RATIO_MIN, RATIO_MAX = 0.8, 1.5

_FILE_BYTES_MAX = 8 << 20
_BYTES_MAX = 1 << 50
_COUNT_MAX = 1 << 31
_TEXT_CHARS_MAX = 200
_VERSION = 1


@dataclass(frozen=True, slots=True)
class CalibrationKey:
    """What a measurement holds for. `ctx` is in tokens per slot; `device` is the card's name, not its UUID."""

    model_digest: str
    engine_version: str
    ctx: int
    slots: int
    kv_type: str
    device: str
    backend: str


@dataclass(frozen=True, slots=True)
class _Entry:
    predicted_bytes: int
    measured_bytes: int

    @property
    def ratio(self) -> float:
        return self.measured_bytes / self.predicted_bytes


class Calibration:
    """Measured against predicted totals, by key. `file` is in the home folder; its folder has to exist.

    Not for several threads, nor for several services on one file (the later writer wins).
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._entries = _read(file)

    def __len__(self) -> int:
        return len(self._entries)

    def record(self, key: CalibrationKey, predicted_bytes: int, measured_bytes: int) -> None:
        """Remember what a load took on its device, in bytes, beside the uncorrected forecast for it.

        `measured_bytes` is all of it: what the driver counts for the process, or the engine's own buffers plus the
        forecast's overhead. Figures that no load can have are dropped. OSError when the file cannot be written; the
        measurement is used all the same until the process ends.
        """
        entry = _Entry(predicted_bytes, measured_bytes)
        if not _is_sound(key, entry):
            return
        self._entries.pop(key, None)  # the newest is last, and the oldest is forgotten first
        self._entries[key] = entry
        for oldest in list(self._entries)[:-ENTRIES_MAX]:
            del self._entries[oldest]
        self._write()

    def corrected(self, predicted_bytes: int, key: CalibrationKey) -> int:
        """The total in bytes that experience suggests.

        The same key's measurement as it is; else the nearest load of the same model on the same backend moves the
        forecast by its ratio, within bounds; else the forecast itself.
        """
        exact = self._entries.get(key)
        if exact is not None:
            return exact.measured_bytes
        alike = [
            (_distance(key, other), order, entry)
            for order, (other, entry) in enumerate(reversed(self._entries.items()))
            if (other.model_digest, other.backend) == (key.model_digest, key.backend)
        ]
        if not alike:
            return predicted_bytes
        *_, nearest = min(alike, key=lambda one: one[:2])  # of equally near ones the newest
        ratio = min(max(nearest.ratio, RATIO_MIN), RATIO_MAX)
        return math.ceil(predicted_bytes * ratio)

    def _write(self) -> None:
        lines = [[*astuple(key), *astuple(entry)] for key, entry in self._entries.items()]
        handle, name = tempfile.mkstemp(dir=self._file.parent, prefix=".calibration-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"version": _VERSION, "entries": lines}, file)
            Path(name).replace(self._file)
        except BaseException:
            with suppress(OSError):
                Path(name).unlink()
            raise


def _distance(key: CalibrationKey, other: CalibrationKey) -> tuple[float, ...]:
    """How unlike two loads of one model are: another build first, then device, KV type, and last the KV's size."""
    sizes = (key.ctx * key.slots) / (other.ctx * other.slots)
    return (
        key.engine_version != other.engine_version,
        key.device != other.device,
        key.kv_type != other.kv_type,
        abs(math.log2(sizes)),
    )


def _read(file: Path) -> dict[CalibrationKey, _Entry]:
    """What the file holds, as far as it is sound."""
    try:
        with file.open("rb") as content:
            raw = content.read(_FILE_BYTES_MAX + 1)
        document = json.loads(raw) if len(raw) <= _FILE_BYTES_MAX else None
    except (OSError, ValueError, RecursionError):
        return {}
    lines = document.get("entries") if isinstance(document, dict) and document.get("version") == _VERSION else None
    found = {}
    for line in lines if isinstance(lines, list) else []:
        if isinstance(line, list) and len(line) == 9:
            key, entry = CalibrationKey(*line[:7]), _Entry(*line[7:])
            if _is_sound(key, entry):
                found[key] = entry
    return dict(list(found.items())[-ENTRIES_MAX:])


def _is_sound(key: CalibrationKey, entry: _Entry) -> bool:
    texts = (key.model_digest, key.engine_version, key.kv_type, key.device, key.backend)
    return (
        all(isinstance(text, str) and len(text) <= _TEXT_CHARS_MAX for text in texts)
        and all(_is_count(count, _COUNT_MAX) for count in (key.ctx, key.slots))
        and all(_is_count(count, _BYTES_MAX) for count in (entry.predicted_bytes, entry.measured_bytes))
    )


def _is_count(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most
