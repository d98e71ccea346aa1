"""Who has which memory of which device. What is free is the lesser of what the driver and what this ledger count.

The two are brought together as follows. What is used on a device beyond the replicas that are loaded there belongs to
other programs; that part is measured while nothing is being loaded, since a load that is half done would be counted
twice. The rest of the device, less all that replicas hold or are promised and less a reserve, can be given away.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llama_orch.contract.models import ReplicaState
from llama_orch.core.replica import Replica

RESERVE_BYTES = 256 * 2**20  # of every device, for what else needs a little of it


@dataclass(slots=True, eq=False)
class Device:
    """One card, or the CPU. Bytes free is what the device layer saw last; `external_bytes` what other programs use."""

    device_id: str
    name: str
    backend: str
    vram_total_bytes: int
    vram_free_bytes: int
    external_bytes: int = 0
    problem: str | None = None  # why nothing may be placed on it now
    is_lost: bool = False  # the card is gone until it is reset: what ran on it is lost

    def __post_init__(self) -> None:
        self.external_bytes = self.vram_total_bytes - self.vram_free_bytes


class Ledger:
    """The devices and what replicas hold of them. Derived from the replicas' states at each question: it cannot drift
    from them."""

    def __init__(self, devices: Iterable[Device], replicas: Mapping[str, Replica]) -> None:
        self.devices = {device.device_id: device for device in devices}
        self._replicas = replicas

    def seen(self, device_id: str, vram_free_bytes: int, problem: str | None, *, is_lost: bool) -> None:
        """What the device layer measured."""
        device = self.devices[device_id]
        device.problem, device.is_lost = problem, is_lost
        if problem is not None:
            return  # a card that cannot be read says nothing of its memory
        device.vram_free_bytes = vram_free_bytes
        here = [replica for replica in self._replicas.values() if device_id in replica.device_ids]
        if any(replica.state is ReplicaState.LOADING and replica.is_launched for replica in here):
            return
        loaded = sum(
            replica.need_bytes.get(device_id, 0)
            for replica in here
            if replica.state in (ReplicaState.READY, ReplicaState.UNLOADING)
        )
        device.external_bytes = max(0, device.vram_total_bytes - vram_free_bytes - loaded)

    def held_bytes(self, device_id: str) -> int:
        """By replicas that are loaded, being loaded or about to be started again."""
        return sum(r.need_bytes.get(device_id, 0) for r in self._replicas.values() if r.holds_memory)

    def promised_bytes(self, device_id: str, *, besides: Replica | None = None) -> int:
        """To replicas that wait until others have left."""
        return sum(
            r.need_bytes.get(device_id, 0)
            for r in self._replicas.values()
            if r is not besides and r.state is ReplicaState.LOADING and not r.is_launched
        )

    def free_bytes(self, device_id: str, *, besides: Replica | None = None) -> int:
        """What can be given away on the device. Negative where more is taken than there is. `besides`: a replica whose
        own promise does not count."""
        device = self.devices[device_id]
        taken = self.held_bytes(device_id) + self.promised_bytes(device_id, besides=besides)
        return device.vram_total_bytes - device.external_bytes - taken - RESERVE_BYTES

    def capacity_bytes(self, device_id: str) -> int:
        """What an empty device has to give."""
        return self.devices[device_id].vram_total_bytes - RESERVE_BYTES

    def has_room(self, replica: Replica) -> bool:
        """Whether it could be loaded now."""
        return self.is_sound(replica) and all(
            need <= self.free_bytes(device_id, besides=replica) for device_id, need in replica.need_bytes.items()
        )

    def is_sound(self, replica: Replica) -> bool:
        """Whether all of its devices can be used."""
        return all(self.devices[device_id].problem is None for device_id in replica.device_ids)

    def scarcest_free_bytes(self, replica: Replica) -> int:
        """Free on that of its devices which has least."""
        return min(self.free_bytes(device_id) for device_id in replica.device_ids)
