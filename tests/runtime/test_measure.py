"""What a loaded replica takes: the driver's word for its processes, else a difference, else the engine's buffers."""

from __future__ import annotations

import os

import pytest

from llama_orch.core.ledger import Device
from llama_orch.devices.inventory import Source
from llama_orch.devices.nvml import Reading
from llama_orch.engines.base import WorkerFacts
from llama_orch.models.memory import CUDA_CONTEXT_BYTES
from llama_orch.runtime.measure import Differences, measured_bytes, process_tree

GIB = 2**30
BUFFERS = {"CUDA0/weights": 3 * GIB, "CUDA0/kv": GIB, "CUDA1/weights": 2 * GIB, "CPU/output": 7}


class Card:
    """A card of 24 GiB whose driver says what it is told to."""

    def __init__(self, device_id: str = "gpu0") -> None:
        self.used = GIB
        self.by_pid: dict[int, int] | None = None
        device = Device(device_id, "RTX 3090", "cuda", 24 * GIB, 23 * GIB)
        self.source = Source(device, "cuda", f"GPU-{device_id}", lambda: 24 * GIB - self.used, self._read)

    def _read(self) -> Reading:
        return Reading(
            f"GPU-{self.source.device.device_id}",
            24 * GIB,
            24 * GIB - self.used,
            vram_used_bytes=self.used,
            process_bytes=self.by_pid,
        )


def facts(pid: int | None = None, buffers: dict[str, int] | None = None) -> WorkerFacts:
    return WorkerFacts("1", 1, 2048, load_ms=1, pid=pid, buffer_bytes=BUFFERS if buffers is None else buffers)


def never(_: Source) -> int | None:
    return None


@pytest.mark.spec("HP-PLC-5")
def test_the_drivers_word_comes_first() -> None:
    """By process, whatever the engine says of its buffers."""
    card = Card()
    card.by_pid = {os.getpid(): 5 * GIB, 1: GIB}
    assert measured_bytes([card.source], facts(os.getpid()), lambda _: 9 * GIB) == {"gpu0": 5 * GIB}


@pytest.mark.spec("HP-PLC-5")
def test_without_it_the_difference_and_then_the_buffers() -> None:
    """Each card of a mask by its own buffers, with what a process takes beside them; nothing where nothing is known."""
    first, second = Card("gpu0"), Card("gpu1")
    mask = [first.source, second.source]
    assert measured_bytes(mask, facts(os.getpid()), lambda _: 4 * GIB) == {"gpu0": 4 * GIB, "gpu1": 4 * GIB}
    expected = {"gpu0": 4 * GIB + CUDA_CONTEXT_BYTES, "gpu1": 2 * GIB + CUDA_CONTEXT_BYTES}
    assert measured_bytes(mask, facts(), never) == expected
    assert measured_bytes(mask, facts(buffers={}), never) == {}


def test_main_memory_says_nothing_of_a_simulated_card() -> None:
    """On a CPU the engine's buffers are all there is; on a device that stands for a card they are of another kind."""
    device = Device("d", "D", "simulated", GIB, GIB)
    assert measured_bytes([Source(device, "simulated", None, lambda: GIB)], facts(), never) == {}
    assert measured_bytes([Source(device, "cpu", None, lambda: GIB)], facts(), never) == {"d": sum(BUFFERS.values())}


@pytest.mark.spec("HP-PLC-5")
def test_a_difference_counts_when_one_load_alone_could_have_made_it() -> None:
    """What a card's use rose by from the begin of a load to its end."""
    card, differences = Card(), Differences()
    differences.begin("a", [card.source])
    card.used += 4 * GIB
    assert differences.of("a", card.source, 4 * GIB) == 4 * GIB
    assert differences.of("a", card.source, 4 * GIB) is None, "it is told once"


@pytest.mark.parametrize("rise_gib", [1, 7])
def test_a_difference_that_is_far_from_the_forecast_is_somebody_elses(rise_gib: int) -> None:
    """Half of it at least, half as much more at most."""
    card, differences = Card(), Differences()
    differences.begin("a", [card.source])
    card.used += rise_gib * GIB
    assert differences.of("a", card.source, 4 * GIB) is None


@pytest.mark.parametrize("other", ["is loading", "loads", "was loaded", "ends"])
def test_a_difference_in_which_others_had_a_part_says_nothing(other: str) -> None:
    """Another replica was being loaded on the same card when this one began, or began, came or went meanwhile."""
    card, differences = Card(), Differences()
    if other in ("is loading", "was loaded"):
        differences.begin("b", [card.source])
    differences.begin("a", [card.source])
    if other == "loads":
        differences.begin("b", [card.source])
    elif other == "was loaded":
        differences.loaded("b", ["gpu0"])
    elif other == "ends":
        differences.end("b", ["gpu0"])
    card.used += 4 * GIB
    assert differences.of("a", card.source, 4 * GIB) is None


def test_once_a_load_is_over_the_next_one_can_be_told() -> None:
    """Whether it was measured or failed."""
    card, differences = Card(), Differences()
    for over in (differences.loaded, differences.end):
        differences.begin("b", [card.source])
        over("b", ["gpu0"])
    differences.begin("a", [card.source])
    card.used += 4 * GIB
    assert differences.of("a", card.source, 4 * GIB) == 4 * GIB


def test_a_process_tree_has_the_process_and_those_below_it() -> None:
    """A wrapper's child is who uses the card; a process that is gone has nobody below it."""
    assert next(process_tree(os.getpid())) == os.getpid()
    assert list(process_tree(2**22 + 1)) == [2**22 + 1]
