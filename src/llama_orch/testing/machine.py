"""The imaginary workstation: cards with memory that workers and other programs take, and an engine that runs on them.

This is the physical truth that a simulation holds the service against: the service sees it only through `sources`, and
what it promises of memory is its own affair until a load fails for lack of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from llama_orch.core.ledger import Device
from llama_orch.devices.inventory import Backend, Source
from llama_orch.devices.nvml import Reading
from llama_orch.engines.base import ReplicaSpec
from llama_orch.engines.simulated import NO_MEMORY, ServiceModel, SimulatedEngine, SimulatedWorker
from llama_orch.testing.cards import Card
from llama_orch.testing.imaginary import ImaginaryLibrary, Pace, physical_pace

LOST = "CUDA error: the card has fallen off the bus"


class Machine:
    """Cards and what is on them now. `on_launch` hears of each worker, with the number of its launch. With the backend
    `cuda` the service takes the cards for real ones: it waits for their memory to return, and asks for processes."""

    def __init__(
        self,
        cards: Sequence[Card],
        library: ImaginaryLibrary,
        *,
        pace: Pace | None = None,
        strict_needs_exclusive: bool = True,
        backend: Backend = "simulated",
        on_launch: Callable[[SimulatedWorker, int], None] | None = None,
    ) -> None:
        self.cards = {card.device_id: card for card in cards}
        self.library = library
        self._backend = backend
        self.engine = SimulatedEngine(
            self._service, strict_needs_exclusive=strict_needs_exclusive, on_launch=self._launched
        )
        self.sources = [self._source(card) for card in cards]
        self.launches: list[SimulatedWorker] = []  # every worker that ever was
        self.taken_bytes = dict.fromkeys(self.cards, 0)  # by other programs
        self.shared: set[str] = set()  # cards that other programs have used at any time
        self.lost: set[str] = set()
        self._pace = physical_pace() if pace is None else pace
        self._on_launch = on_launch

    # -- what the service sees ---------------------------------------------------------------------------------------

    def _source(self, card: Card) -> Source:
        device = Device(card.device_id, card.device_id, self._backend, card.vram_bytes, card.vram_bytes)
        # The device's id as its UUID, so that a worker's spec says where it runs.
        return Source(
            device,
            self._backend,
            card.device_id,
            partial(self.read_free_bytes, card.device_id),
            read_card=partial(self._read, card.device_id),
        )

    def read_free_bytes(self, device_id: str) -> int:
        """As a driver says it: nothing, of a card that cannot be read."""
        total = self.cards[device_id].vram_bytes
        if device_id in self.lost:
            return 0
        return max(0, total - self.used_bytes(device_id) - self.taken_bytes[device_id])

    def _read(self, device_id: str) -> Reading:
        total = self.cards[device_id].vram_bytes
        if device_id in self.lost:
            return Reading(device_id, total, error=LOST, is_lost=True)
        free = self.read_free_bytes(device_id)
        return Reading(device_id, total, free, total - free, self.utilization(device_id))

    # -- what is true ------------------------------------------------------------------------------------------------

    def alive(self, device_id: str) -> list[SimulatedWorker]:
        """Workers that hold memory of the card."""
        return [w for w in self.engine.workers.values() if w.is_alive and device_id in w.spec.device_uuids]

    def used_bytes(self, device_id: str) -> int:
        """What workers hold of the card."""
        return sum(self.share_bytes(worker.spec, device_id) for worker in self.alive(device_id))

    def share_bytes(self, spec: ReplicaSpec, device_id: str) -> int:
        """What a worker takes of one of its cards."""
        need = self.library.at(spec.file).need(spec.ctx, spec.slots, spec.backend)
        shares = spec.tensor_split or (1.0,) * len(spec.device_uuids)
        return round(need * shares[spec.device_uuids.index(device_id)] / sum(shares))

    def utilization(self, device_id: str) -> float:
        return float(any(worker.is_busy for worker in self.alive(device_id)))

    # -- acts --------------------------------------------------------------------------------------------------------

    def lose(self, device_id: str) -> None:
        """The card falls off the bus: its workers die, and nothing loads on it."""
        self.lost.add(device_id)
        for worker in self.alive(device_id):
            worker.crash(LOST)

    def take(self, device_id: str, count: int) -> None:
        """Another program takes so many bytes, or gives them back."""
        self.shared.add(device_id)
        self.taken_bytes[device_id] += count

    def bring_back(self, device_id: str) -> None:
        self.lost.discard(device_id)

    # -- the engine's side -------------------------------------------------------------------------------------------

    def _service(self, spec: ReplicaSpec) -> ServiceModel:
        return self._pace(self.library.at(spec.file), [self.cards[device_id] for device_id in spec.device_uuids])

    def _launched(self, worker: SimulatedWorker) -> None:
        """A load takes its memory at once, or fails in the end."""
        self.launches.append(worker)
        for device_id in worker.spec.device_uuids:
            if device_id in self.lost:
                worker.fail_load(LOST)
            elif self.used_bytes(device_id) + self.taken_bytes[device_id] > self.cards[device_id].vram_bytes:
                worker.fail_load(NO_MEMORY)
        if self._on_launch is not None:
            self._on_launch(worker, len(self.launches) - 1)
