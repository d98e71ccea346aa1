"""Seats of replicas, and what they take: the forecast, corrected by what earlier loads took."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llama_orch.contract.config import PoolSettings
from llama_orch.contract.models import ReplicaState
from llama_orch.engines.simulated import SimulatedEngine
from llama_orch.models.calibration import Calibration
from llama_orch.runtime.builder import Builder, Room, calibration_key
from llama_orch.runtime.library import Model
from llama_orch.testing.builders import DIGEST
from llama_orch.testing.rehearsal import sources_for

GIB = 2**30
ENGINE = SimulatedEngine()


class OneModel:
    """2 GiB, and one more for each slot."""

    def look(self, reference: str) -> Model:
        return Model(reference, Path("/m.gguf"), 4096, lambda ctx, slots, backend: (2 + slots) * GIB)

    def is_open(self, reference: str) -> bool:
        return True


def a_builder(calibration: Calibration | None = None) -> Builder:
    sources = sources_for(("3090", "3060"))
    return Builder({"simulated": ENGINE}, sources, OneModel(), calibration, lambda _: DIGEST)


def seats(builder: Builder, room: Room, **settings: object) -> list[tuple[str, int, int]]:
    """Device, slots and GiB of each seat."""
    draft = builder.draft(PoolSettings(engine="simulated", **settings), OneModel().look("m"))  # type: ignore[arg-type]
    builder.seat(draft, room)
    while builder.widen(draft, room):
        pass
    return [(d, seat.slots, need // GIB) for seat in draft.seats for d, need in seat.need_bytes.items()]


@pytest.mark.spec("HP-PLC-4")
def test_unequal_cards_get_unequal_replicas() -> None:
    """Each card as many slots as fit, up to those that were asked for; a card that holds none is left out."""
    assert seats(a_builder(), Room({"3090": 24 * GIB, "3060": 4 * GIB}), slots=6) == [("3090", 6, 8), ("3060", 2, 4)]
    assert seats(a_builder(), Room({"3090": 24 * GIB, "3060": 2 * GIB}), slots=6) == [("3090", 6, 8)]


@pytest.mark.spec("HP-PLC-5")
def test_a_load_that_was_measured_is_what_the_next_one_claims(tmp_path: Path) -> None:
    """The same model, build, context, slots and device: a measurement is no forecast any more."""
    calibration = Calibration(tmp_path / "calibration.json")
    builder = a_builder(calibration)
    key = calibration_key(DIGEST, ENGINE.traits.version, 2048, 4, builder.sources["3090"])
    calibration.record(key, 6 * GIB, 7 * GIB)
    draft = builder.draft(PoolSettings(engine="simulated"), OneModel().look("m"))
    assert builder.need(draft, [builder.sources["3090"]], 4) == {"3090": 7 * GIB}


@pytest.mark.spec("HP-PLC-6")
def test_a_split_takes_its_share_of_each_card() -> None:
    """By `tensor_split`, in the order in which the pool names its devices."""
    room = Room({"3090": 24 * GIB, "3060": 12 * GIB})
    split = seats(a_builder(), room, slots=4, devices=["3090", "3060"], tensor_split=[2.0, 1.0], replicas=1)
    assert split == [("3090", 4, 4), ("3060", 4, 2)]


@pytest.mark.parametrize(("stay", "expected"), [(0, 4), (1, 4), (3, 2)])
def test_what_does_not_stay_loaded_leaves_the_others_their_cores(
    monkeypatch: pytest.MonkeyPatch, stay: int, expected: int
) -> None:
    """Of eight cores on a machine with two devices that are none: a model on demand gets a half, since there may be
    another one on the other device, or its part beside those that stay."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    builder = a_builder()
    draft = builder.draft(PoolSettings(engine="simulated", replicas=stay or 1), OneModel().look("m"))
    builder.seat(draft, Room({"3090": 100 * GIB, "3060": 100 * GIB}))
    if stay:
        builder.build(draft, state=ReplicaState.LOADING)
    built = builder.build(draft, state=ReplicaState.UNLOADED, is_on_demand=True)
    assert {spec.threads for _, spec in built.workers.values()} == {expected}
