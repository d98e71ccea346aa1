"""Who has which memory of which device. What is free is the lesser of what the driver and what this ledger count.

The two are brought together as follows. What is used on a device beyond the replicas that are loaded there belongs to
other programs. While replicas come or go nobody can tell how much of their memory is in use; then that figure is moved
only as far as it must be wrong. The rest of the device, less all that replicas hold or are promised and less a reserve,
can be given away.
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
        loaded = sum(r.need_bytes.get(device_id, 0) for r in self._replicas.values() if r.state is ReplicaState.READY)
        most = max(0, device.vram_total_bytes - vram_free_bytes - loaded)
        in_between = self.held_bytes(device_id) - loaded
        device.external_bytes = max(0, most - in_between, min(most, device.external_bytes))

    def _sum(self, device_id: str, those: Iterable[Replica]) -> int:
        return sum(replica.need_bytes.get(device_id, 0) for replica in those)

    def held_bytes(self, device_id: str) -> int:
        """By replicas that are loaded, being loaded or about to be started again."""
        return self._sum(device_id, (r for r in self._replicas.values() if r.holds_memory))

    def promised_bytes(self, device_id: str, *, besides: Replica | None = None) -> int:
        """To replicas that wait until others have left. Whoever was promised room first gets it first: of the promises
        besides that to a replica, later ones do not count."""
        promised = [r for r in self._replicas.values() if r.is_promised]
        if besides is not None and besides.is_promised:
            promised = [r for r in promised if _turn(r) < _turn(besides)]
        return self._sum(device_id, promised)

    def leaving_bytes(self, device_id: str) -> int:
        """What comes back by itself."""
        return self._sum(device_id, (r for r in self._replicas.values() if r.is_leaving))

    def unheld_bytes(self, device_id: str) -> int:
        """What nobody has, promised or not. Negative where more is taken than there is."""
        device = self.devices[device_id]
        return device.vram_total_bytes - device.external_bytes - RESERVE_BYTES - self.held_bytes(device_id)

    def free_bytes(self, device_id: str, *, besides: Replica | None = None) -> int:
        """What can be given away on the device now. `besides`: a replica whose own promise does not count."""
        return self.unheld_bytes(device_id) - self.promised_bytes(device_id, besides=besides)

    def lacking_bytes(self, replica: Replica) -> dict[str, int]:
        """What others have to give up for the replica, by device, besides those that are leaving anyway."""
        found = {
            device_id: need - self.free_bytes(device_id, besides=replica) - self.leaving_bytes(device_id)
            for device_id, need in replica.need_bytes.items()
        }
        return {device_id: lack for device_id, lack in found.items() if lack > 0}

    def staying_bytes(self, device_id: str) -> int:
        """Held by replicas that nobody can make leave, or promised to them."""
        return self._sum(device_id, (r for r in self._replicas.values() if r.is_staying))

    def contested_bytes(self, device_id: str) -> int:
        """What is free, or held by who can be made to leave."""
        device = self.devices[device_id]
        return device.vram_total_bytes - device.external_bytes - RESERVE_BYTES - self.staying_bytes(device_id)

    def capacity_bytes(self, device_id: str) -> int:
        """What an empty device has to give."""
        return self.devices[device_id].vram_total_bytes - RESERVE_BYTES

    def has_room(self, replica: Replica) -> bool:
        """Whether it could be loaded now, and those who were promised room before it would still get theirs."""
        return (
            self.is_sound(replica)
            and not self.lacking_bytes(replica)
            and all(need <= self.unheld_bytes(device_id) for device_id, need in replica.need_bytes.items())
        )

    def can_restart(self, replica: Replica) -> bool:
        """Whether a replica in backoff, whose memory is kept for it, finds that memory there. Others in backoff hold
        nothing in truth once their process is gone: whoever is first takes it."""
        waiting = [r for r in self._replicas.values() if r.state is ReplicaState.BACKOFF]
        others = [r for r in waiting if r is replica or not r.is_lingering]
        return self.is_sound(replica) and all(
            need <= self.unheld_bytes(device_id) + self._sum(device_id, others)
            for device_id, need in replica.need_bytes.items()
        )

    def is_sound(self, replica: Replica) -> bool:
        """Whether all of its devices can be used."""
        return all(self.devices[device_id].problem is None for device_id in replica.device_ids)

    def lost_device(self, replica: Replica) -> Device | None:
        """The first of its devices that is lost."""
        return next((self.devices[d] for d in replica.device_ids if self.devices[d].is_lost), None)

    def scarcest_free_bytes(self, replica: Replica) -> int:
        """Free on that of its devices which has least; 0 of a replica elsewhere, which has none here."""
        return min((self.free_bytes(device_id) for device_id in replica.device_ids), default=0)


def _turn(replica: Replica) -> tuple[float, str]:
    return (replica.promised_since_s or 0.0, replica.replica_id)
