"""NVIDIA cards as the driver reports them. Without a driver there are none, and that is no error.

Invariant: nothing in here raises because of a card or the driver. A card that cannot be read has a reading that says
so, with nothing free, so that no model is placed on it; the others go on.

The driver answers in microseconds to milliseconds, but a sick card can hold a call for seconds, and one that hangs for
ever; so can opening the driver. `Nvml` waits for as long as the driver takes. `Watch` does not: it reads on a thread of
its own and keeps its caller waiting for a bounded time, so that an event loop may use it.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pynvml

from llama_orch.clock import Clock, SystemClock

log = logging.getLogger("llama_orch.devices")

REOPEN_FIRST_S = 1.0
REOPEN_MAX_S = 60.0
MAX_AGE_S = 0.1  # how old a reading may be that a Watch gives again
DEADLINE_S = 0.5  # how long a Watch waits for the driver
_XIDS_PER_READ_MAX = 64

# The driver as a whole is away; it must be opened anew before anything can be read.
_DRIVER_IS_AWAY = frozenset(
    {
        pynvml.NVML_ERROR_UNINITIALIZED,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
    }
)
# The card is away: it fell off the bus, or waits for a reset.
_CARD_IS_AWAY = frozenset(
    {
        pynvml.NVML_ERROR_GPU_IS_LOST,
        pynvml.NVML_ERROR_RESET_REQUIRED,
        pynvml.NVML_ERROR_NOT_FOUND,
        pynvml.NVML_ERROR_GPU_NOT_FOUND,
    }
)
# Xids after which a card computes nothing sound until it is reset. Others come from a program's own faults, end that
# program and leave the card sound.
_FATAL_XIDS = {
    48: "uncorrectable ECC error",
    62: "the card's controller halted",
    64: "ECC row remapping failed",
    79: "the card has fallen off the bus",
    95: "uncontained ECC error",
    119: "the card's system processor does not answer",
    120: "the card's system processor failed",
    140: "unrecovered ECC error",
}


@dataclass(frozen=True, slots=True)
class Card:
    """One card. `index` is NVML's own and means nothing to CUDA; the UUID does."""

    uuid: str
    name: str
    index: int
    vram_total_bytes: int


@dataclass(frozen=True, slots=True)
class Reading:
    """A card at one moment. With an `error`, nothing counts as free and the rest is unknown."""

    uuid: str
    vram_total_bytes: int
    vram_free_bytes: int = 0
    vram_used_bytes: int | None = None  # by anybody, the driver's own share included
    utilization: float | None = None  # 0 to 1: the part of the last moments in which the card computed
    process_bytes: Mapping[int, int] | None = None  # by process id; None where the driver does not tell
    error: str | None = None
    is_lost: bool = False  # the card is gone, or must be reset before it computes again


class Nvml:
    """The driver's library, opened once, and anew while the driver or a card cannot be read: it finds a card that came
    back only then.

    `cards` are those found at the start and stay the same. It is empty where there is no driver or no card.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self.cards: list[Card] = []
        self._clock = clock or SystemClock()
        self._one_at_a_time = threading.Lock()
        self._why_closed: str | None = None
        self._reopen_at: float | None = None
        self._reopen_after_s = REOPEN_FIRST_S
        self._has_failed = False  # a card could not be read at the last pass
        self._xids = _XidListener()
        self._fatal_xids: dict[str, int] = {}  # by UUID
        self._gone: set[str] = set()  # UUIDs of cards that the driver did not have at the last pass
        self._errors: dict[str, str] = {}  # by UUID, as told to the log
        self._open()
        if self._why_closed is None:
            self.cards = _cards()
            self._xids.start(self.cards)

    def read(self) -> dict[str, Reading]:
        """All cards in one pass, by UUID. Blocks for as long as the driver does; see Watch."""
        with self._one_at_a_time:
            if self._reopen_at is not None and self._clock.now() >= self._reopen_at:
                self._reopen()
            if self.cards and self._why_closed is None:
                self._fatal_xids.update(self._xids.heard())
            self._has_failed = False
            readings = {card.uuid: self._read(card) for card in self.cards}
            if self._why_closed is not None:  # perhaps since this very pass, and then after a card that could be read
                readings = {card.uuid: _unreadable(card, self._why_closed) for card in self.cards}
                self._gone.update(readings)
            self._plan_to_reopen()
            self._tell_changes(readings)
            return readings

    def _read(self, card: Card) -> Reading:
        if self._why_closed is not None:
            return _unreadable(card, self._why_closed)
        try:
            # By UUID each time: a handle does not outlive the library's being opened anew.
            handle = pynvml.nvmlDeviceGetHandleByUUID(card.uuid)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        except pynvml.NVMLError as error:
            return self._failed(card, error)
        if card.uuid in self._gone:  # it was away and came back, so it was reset
            self._gone.discard(card.uuid)
            self._fatal_xids.pop(card.uuid, None)
        xid = self._fatal_xids.get(card.uuid)
        if xid is not None:
            return _unreadable(card, f"Xid {xid}: {_FATAL_XIDS[xid]}; the card must be reset", is_lost=True)
        return Reading(
            uuid=card.uuid,
            vram_total_bytes=int(memory.total),
            vram_free_bytes=int(memory.free),
            vram_used_bytes=int(memory.used),
            utilization=_utilization(handle),
            process_bytes=_process_bytes(handle),
        )

    def _failed(self, card: Card, error: pynvml.NVMLError) -> Reading:
        if error.value in _DRIVER_IS_AWAY:
            self._why_closed = str(error)
        is_lost = error.value in _CARD_IS_AWAY
        if is_lost:
            self._gone.add(card.uuid)
        self._has_failed = True
        return _unreadable(card, str(error), is_lost=is_lost)

    def _open(self) -> None:
        """Sets why it is closed, if it is."""
        try:
            pynvml.nvmlInit()
            self._why_closed = None
        except pynvml.NVMLError as error:
            self._why_closed = str(error)
            absent = (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
            log.log(logging.DEBUG if error.value in absent else logging.WARNING, "no NVIDIA driver: %s", error)

    def _reopen(self) -> None:
        self._reopen_at = None
        self._xids.stop()
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
        self._open()
        if self._why_closed is None:
            self._xids.start(self.cards)

    def _plan_to_reopen(self) -> None:
        if not self._has_failed and self._why_closed is None:
            self._reopen_at, self._reopen_after_s = None, REOPEN_FIRST_S
        elif self._reopen_at is None:
            self._reopen_at = self._clock.now() + self._reopen_after_s
            self._reopen_after_s = min(REOPEN_MAX_S, 2 * self._reopen_after_s)

    def _tell_changes(self, readings: Mapping[str, Reading]) -> None:
        """Log what changed since the last pass, once."""
        errors = {uuid: reading.error for uuid, reading in readings.items() if reading.error is not None}
        for uuid, error in errors.items():
            if self._errors.get(uuid) != error:
                log.warning("card %s cannot be used: %s", uuid, error)
        for uuid in self._errors.keys() - errors.keys():
            log.info("card %s can be used again", uuid)
        self._errors = errors


class _XidListener:
    """Hears of the driver's Xids that condemn a card. Where the driver does not tell them, none is heard."""

    def __init__(self) -> None:
        self._events: Any = None
        self._uuids: dict[int | None, str] = {}  # by the handle's address

    def start(self, cards: list[Card]) -> None:
        self._events, self._uuids = None, {}
        try:
            events = pynvml.nvmlEventSetCreate()
        except pynvml.NVMLError as error:
            log.debug("Xids are not told: %s", error)
            return
        self._events = events
        for card in cards:
            try:
                handle = pynvml.nvmlDeviceGetHandleByUUID(card.uuid)
                pynvml.nvmlDeviceRegisterEvents(handle, pynvml.nvmlEventTypeXidCriticalError, events)
                self._uuids[_address(handle)] = card.uuid
            except pynvml.NVMLError as error:
                log.debug("Xids of card %s are not told: %s", card.uuid, error)

    def stop(self) -> None:
        if self._events is not None:
            with suppress(pynvml.NVMLError):
                pynvml.nvmlEventSetFree(self._events)
        self._events, self._uuids = None, {}

    def heard(self) -> dict[str, int]:
        """The fatal Xids since the last call, by UUID. Does not wait for any."""
        found: dict[str, int] = {}
        with suppress(pynvml.NVMLError):  # the time-out that ends the list is one, too
            for _ in range(_XIDS_PER_READ_MAX if self._uuids else 0):
                event = pynvml.nvmlEventSetWait_v2(self._events, 0)
                uuid, xid = self._uuids.get(_address(event.device)), int(event.eventData)
                if uuid is not None:
                    log.warning("card %s: Xid %d: %s", uuid, xid, _FATAL_XIDS.get(xid, "not fatal to the card"))
                    if xid in _FATAL_XIDS:
                        found[uuid] = xid
        return found


class Watch:
    """Readings for callers that must not wait for a sick driver.

    At most one pass is under way, on a thread of its own. While it is overdue every card counts as unreadable, and no
    caller waits for it: a driver that hangs costs one caller one deadline. Its locks are shared by the cards, so that
    a card that hangs takes the others' readings with it, but not their work.
    """

    def __init__(
        self, nvml: Nvml, clock: Clock | None = None, *, max_age_s: float = MAX_AGE_S, deadline_s: float = DEADLINE_S
    ) -> None:
        self._nvml = nvml
        self._clock = clock or SystemClock()
        self._max_age_s = max_age_s
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._latest: dict[str, Reading] = {}
        self._latest_at: float | None = None
        self._under_way: _Pass | None = None

    def readings(self) -> dict[str, Reading]:
        """All cards, by UUID, as of the last moments. Waits for at most the deadline."""
        with self._lock:
            self._take_what_is_done()
            if self._latest_at is not None and self._clock.now() - self._latest_at < self._max_age_s:
                return self._latest
            if self._under_way is None:
                self._under_way = _Pass(self._nvml)
            if not self._under_way.is_overdue:
                self._under_way.wait(self._deadline_s)
                self._take_what_is_done()
            if self._under_way is None:
                return self._latest
            why = f"the driver has not answered for {self._deadline_s:g} s"
            return {card.uuid: _unreadable(card, why) for card in self._nvml.cards}

    def reading(self, card: Card) -> Reading:
        return self.readings()[card.uuid]

    def _take_what_is_done(self) -> None:
        if self._under_way is not None and self._under_way.result is not None:
            if self._under_way.is_overdue:
                log.info("the NVIDIA driver answers again")
            self._latest, self._latest_at = self._under_way.result, self._clock.now()
            self._under_way = None


class _Pass:
    """One reading of all cards, on a thread that keeps nobody from ending: the driver may never give it back."""

    def __init__(self, nvml: Nvml) -> None:
        self.result: dict[str, Reading] | None = None
        self.is_overdue = False
        self._nvml = nvml
        self._done = threading.Event()
        threading.Thread(target=self._run, name="nvml", daemon=True).start()

    def wait(self, deadline_s: float) -> None:
        if not self._done.wait(deadline_s):
            self.is_overdue = True
            log.warning("the NVIDIA driver does not answer; its cards count as full until it does")

    def _run(self) -> None:
        self.result = self._nvml.read()
        self._done.set()


def _cards() -> list[Card]:
    try:
        count = int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError as error:
        log.warning("the NVIDIA driver does not say how many cards there are: %s", error)
        return []
    return [card for index in range(count) if (card := _card(index)) is not None]


def _card(index: int) -> Card | None:
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        return Card(
            uuid=pynvml.nvmlDeviceGetUUID(handle),
            name=pynvml.nvmlDeviceGetName(handle),
            index=index,
            vram_total_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        )
    except (pynvml.NVMLError, UnicodeDecodeError) as error:
        log.warning("card %d is left out: %s", index, error)
        return None


def _utilization(handle: Any) -> float | None:
    try:
        return float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu) / 100
    except pynvml.NVMLError:
        return None


def _process_bytes(handle: Any) -> dict[int, int] | None:
    """Programs that compute on the card. None also where the driver lists them without their memory."""
    try:
        # Not the unversioned function: with an older driver it raises what is no NVMLError.
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses_v3(handle)
    except pynvml.NVMLError:
        return None
    if any(process.usedGpuMemory is None for process in processes):
        return None
    return {int(process.pid): int(process.usedGpuMemory) for process in processes}


def _unreadable(card: Card, error: str, *, is_lost: bool = False) -> Reading:
    return Reading(card.uuid, card.vram_total_bytes, error=error, is_lost=is_lost)


def _address(handle: Any) -> int | None:
    return ctypes.cast(handle, ctypes.c_void_p).value
