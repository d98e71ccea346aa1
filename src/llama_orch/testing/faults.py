"""What goes wrong in a world, done to the stage at its time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from llama_orch.engines.simulated import SimulatedWorker
from llama_orch.errors import LlorchError
from llama_orch.testing.stage import Stage
from llama_orch.testing.world import Fault, World

DRAIN_MS = (0, 500, 5_000)
Note = Callable[[str], None]


class Faults:
    """Does a world's faults. `note` is told of each."""

    def __init__(self, world: World, stage: Stage, note: Note) -> None:
        self._world = world
        self._stage = stage
        self._machine = stage.machine
        self._note = note

    # -- of launches ---------------------------------------------------------------------------------------------------

    def launched(self, worker: SimulatedWorker, number: int) -> None:
        """To be called at each launch, with its number."""
        self._note(f"launch {number}: {worker.spec.replica_id} on {', '.join(worker.spec.device_uuids)}")
        fault = self._world.launch_faults.get(number)
        if fault is None:
            return
        self._note(f"fault {fault.kind} on launch {number}")
        if fault.kind == "slow_load":
            worker.slow_load(fault.for_s + 1.0)
        elif fault.kind == "fail_load":
            worker.fail_load("the file is not a model")
        else:
            crash = fault.kind == "crash_load"
            self._later(fault.part * 0.5, worker.crash if crash else worker.hang)
            if not crash and fault.for_s:
                self._later(fault.for_s, worker.resume)

    @staticmethod
    def _later(seconds: float, act: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_later(seconds, act)

    # -- of a time -----------------------------------------------------------------------------------------------------

    async def run(self, fault: Fault) -> None:
        """Do it when it is due, and undo what does not last."""
        await asyncio.sleep(fault.at_s)
        match fault.kind:
            case "crash" | "no_memory" | "hang" | "freeze":
                await self._on_worker(fault)
            case "take_vram":
                await self._take(fault)
            case "lose_card":
                await self._lose(fault)
            case "drain" | "reload":
                await self._on_pool(fault)
            case _:
                raise ValueError(f"there is no fault {fault.kind!r}")

    async def _on_worker(self, fault: Fault) -> None:
        alive = [worker for worker in self._machine.engine.workers.values() if worker.is_alive]
        if not alive:
            return self._note(f"fault {fault.kind}: no worker is there")
        worker = alive[fault.pick % len(alive)]
        how = "decodes" if worker.is_busy else "idles" if worker.is_ready else "loads"
        self._note(f"fault {fault.kind} on {worker.spec.replica_id}, which {how}")
        acts = {"crash": worker.crash, "no_memory": worker.run_out_of_memory, "hang": worker.hang}
        acts.get(fault.kind, worker.freeze)()
        if fault.kind in ("hang", "freeze") and fault.for_s:
            await asyncio.sleep(fault.for_s)
            worker.resume()
            self._note(f"{worker.spec.replica_id} goes on")

    def _card(self, fault: Fault) -> str:
        return self._world.cards[fault.pick % len(self._world.cards)].device_id

    async def _take(self, fault: Fault) -> None:
        """Another program takes a part of what is free, or of all: then the next load finds less than it was told."""
        device_id = self._card(fault)
        free = self._machine.read_free_bytes(device_id)
        taken = round(free * fault.part)
        self._machine.take(device_id, taken)
        self._note(f"fault take_vram: {taken / 2**30:.1f} GiB of {device_id}")
        await asyncio.sleep(fault.for_s or 60.0)  # not for ever: who waits for room may wait for as long as it is gone
        self._machine.take(device_id, -taken)
        self._note(f"{device_id} has its memory back")

    async def _lose(self, fault: Fault) -> None:
        device_id = self._card(fault)
        self._note(f"fault lose_card: {device_id}")
        self._machine.lose(device_id)
        if fault.for_s:
            await asyncio.sleep(fault.for_s)
            self._machine.bring_back(device_id)
            self._note(f"{device_id} is back")

    async def _on_pool(self, fault: Fault) -> None:
        pool_id = self._world.pools[fault.pick % len(self._world.pools)].id
        service = self._stage.service
        try:
            if fault.kind == "drain":
                deadline_ms = DRAIN_MS[fault.pick % len(DRAIN_MS)]
                self._note(f"drain {pool_id} within {deadline_ms} ms")
                await service.drain_pool(pool_id, deadline_ms)
            else:
                model = self._world.models[fault.pick % len(self._world.models)]
                self._note(f"reload {pool_id} with {model.name}")
                await service.reload_pool(pool_id, model.reference)
            self._note(f"{fault.kind} {pool_id} has returned")
        except LlorchError as error:
            self._note(f"{fault.kind} {pool_id} refused: {error.code.value}")
