"""The device layer in a process of its own: a line of JSON in, a line of JSON out. The clock stands where it is put."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict
from time import perf_counter
from typing import Any

import msgspec

from llama_orch.contract.config import DeviceSettings
from llama_orch.devices.inventory import DeviceError, Source, discover
from llama_orch.devices.nvml import Nvml, Watch


class _Clock:
    at = 0.0

    def now(self) -> float:
        return self.at

    def wall(self) -> float:
        return self.at


class _Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append((record.levelname, record.getMessage()))


class _Program:
    def __init__(self) -> None:
        self._clock = _Clock()
        self._log = _Log()
        logging.getLogger("llama_orch").addHandler(self._log)
        logging.getLogger("llama_orch").setLevel(logging.DEBUG)
        self._nvml = Nvml(self._clock)
        self._watch: Watch | None = None
        self._sources: list[Source] = []

    def cards(self) -> Any:
        return [asdict(card) for card in self._nvml.cards]

    def log(self) -> Any:
        return self._log.said

    def read(self, at: float) -> Any:
        self._clock.at = at
        return {uuid: asdict(reading) for uuid, reading in self._nvml.read().items()}

    def watch(self, at: float, max_age_s: float, deadline_s: float) -> Any:
        """Readings, and the seconds that they took."""
        self._clock.at = at
        self._watch = self._watch or Watch(self._nvml, self._clock, max_age_s=max_age_s, deadline_s=deadline_s)
        started = perf_counter()
        readings = self._watch.readings()
        return {uuid: asdict(reading) for uuid, reading in readings.items()}, perf_counter() - started

    def discover(self, settings: Any, can_use_cuda: bool) -> Any:
        """The devices' ids, or the error; and what was asked of the engines."""
        asked: list[tuple[str, ...]] = []

        def answer(uuids: tuple[str, ...]) -> bool:
            asked.append(uuids)
            return can_use_cuda

        devices = settings if settings == "auto" else msgspec.convert(settings, list[DeviceSettings])
        try:
            self._sources = discover(devices, answer, self._clock)
        except DeviceError as error:
            return {"error": str(error), "asked": asked}
        return {"sources": self.sources(self._clock.at), "asked": asked}

    def sources(self, at: float, pid: int = 0) -> Any:
        """What each source says at this time; `process_bytes` is that process's."""
        self._clock.at = at
        return [
            {
                **asdict(source.device),
                "uuid": source.uuid,
                "free": source.read_free_bytes(),
                "used": source.read_used_bytes(),
                "utilization": source.read_utilization(),
                "problem": source.read_problem(),
                "process_bytes": source.read_process_bytes(pid),
            }
            for source in self._sources
        ]


def main() -> None:
    program = _Program()
    for line in sys.stdin:
        question = json.loads(line)
        print(json.dumps(getattr(program, question.pop("what"))(**question)), flush=True)


if __name__ == "__main__":
    main()
