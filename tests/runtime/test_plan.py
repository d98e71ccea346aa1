"""From settings to replicas on devices."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_orch.contract.config import PoolSettings
from llama_orch.contract.models import ReplicaState
from llama_orch.core.ledger import RESERVE_BYTES
from llama_orch.engines.simulated import SimulatedEngine
from llama_orch.models.digest import Digests
from llama_orch.runtime.library import FileLibrary
from llama_orch.runtime.plan import PlanError, make_plan
from llama_orch.testing.rehearsal import settings_for, sources_for

ENGINES = {"simulated": SimulatedEngine()}
CARDS = ("3090", "3060")


def tiny_bytes(slots: int) -> int:
    """What builtin:tiny takes of a card."""
    return FileLibrary().look("builtin:tiny").need(2048, slots, "simulated") or 0


@pytest.mark.spec("HP-PLC-6")
def test_one_replica_on_each_device_unless_a_split_was_asked_for() -> None:
    """`auto` never spreads a replica over cards."""
    plan = make_plan(settings_for(PoolSettings(slots=2)), ENGINES, sources_for(CARDS))
    assert [r.device_ids for r in plan.pools[0].replicas.values()] == [("3090",), ("3060",)]
    plan = make_plan(settings_for(PoolSettings(devices=["3060"], replicas=2)), ENGINES, sources_for(CARDS))
    assert [r.device_ids for r in plan.pools[0].replicas.values()] == [("3060",), ("3060",)]


@pytest.mark.spec("HP-PLC-6")
def test_a_split_goes_in_the_pools_own_order() -> None:
    """The first share is that of the device that the pool names first, whatever order the machine lists them in."""
    pool = PoolSettings(devices=["3060", "3090"], tensor_split=[1.0, 2.0])
    plan = make_plan(settings_for(pool), ENGINES, sources_for(CARDS))
    (replica,) = plan.pools[0].replicas.values()
    assert (replica.device_ids, plan.replicas[replica.replica_id][1].tensor_split) == (("3060", "3090"), (1.0, 2.0))


@pytest.mark.spec("HP-PLC-5")
def test_a_replica_is_never_started_on_a_device_that_cannot_hold_it() -> None:
    """`auto` leaves the small card out; a pool that fits nowhere is refused with the figures, and the others serve."""
    big, small = sources_for(("3090", "3060"))
    small.device.vram_free_bytes = RESERVE_BYTES + (100 << 20)
    pools = (PoolSettings(id="fits"), PoolSettings(id="nowhere", devices=["3060"], slots=8))
    plan = make_plan(settings_for(*pools), ENGINES, [big, small])
    fits, nowhere = plan.pools
    assert [replica.device_ids for replica in fits.replicas.values()] == [("3090",)]
    assert (fits.is_live, nowhere.is_live) == (True, False)
    assert "device 3060, which has 100 MiB to give" in (nowhere.last_error or "")


@pytest.mark.spec("HP-PLC-5")
def test_replicas_do_not_count_on_the_same_memory() -> None:
    """What one replica was promised is not there for the next on the same device."""
    (card,) = sources_for(("3060",))
    need = tiny_bytes(4)
    card.device.vram_free_bytes = RESERVE_BYTES + 2 * need + 1000
    plan = make_plan(settings_for(PoolSettings(replicas=3)), ENGINES, [card])
    states = [replica.state for replica in plan.pools[0].replicas.values()]
    assert states == [ReplicaState.LOADING, ReplicaState.LOADING, ReplicaState.FAILED]


@pytest.mark.spec("HP-PLC-4", "HP-PLC-5")
def test_auto_gives_every_pool_a_place_before_anyone_gets_more_slots() -> None:
    """One slot each first; what is left over on a card goes into more slots in turn, up to those that were asked for.
    A count of replicas is taken at its word."""
    (card,) = sources_for(("3060",))
    one, two, three = tiny_bytes(1), tiny_bytes(2), tiny_bytes(3)
    card.device.vram_free_bytes = RESERVE_BYTES + three + two
    pools = (PoolSettings(id="a", slots=3), PoolSettings(id="b", slots=8))
    a, b = make_plan(settings_for(*pools), ENGINES, [card]).pools
    assert [r.slots for pool in (a, b) for r in pool.replicas.values()] == [3, 2]
    card.device.vram_free_bytes = RESERVE_BYTES + one + one
    a, b = make_plan(settings_for(*pools), ENGINES, [card]).pools
    assert [r.slots for pool in (a, b) for r in pool.replicas.values()] == [1, 1]
    fixed = make_plan(settings_for(PoolSettings(slots=3, replicas=1)), ENGINES, [card]).pools[0]
    assert [(r.slots, r.state) for r in fixed.replicas.values()] == [(3, ReplicaState.LOADING)]


@pytest.mark.spec("HP-PLC-8")
def test_a_pool_that_is_not_kept_is_loaded_when_it_is_needed() -> None:
    """It claims nothing at the start, and has a place on each device that could hold it alone."""
    big, small = sources_for(CARDS)
    pools = (PoolSettings(id="kept"), PoolSettings(id="lent", keep_alive_ms=1000))
    kept, lent = make_plan(settings_for(*pools), ENGINES, [big, small]).pools
    assert {replica.state for replica in kept.replicas.values()} == {ReplicaState.LOADING}
    assert [(r.state, r.is_pinned) for r in lent.replicas.values()] == [(ReplicaState.UNLOADED, False)] * 2


@pytest.mark.parametrize(
    ("pool", "says"),
    [
        (PoolSettings(ctx=4096), "trained with 2048; set ctx to at most 2048"),
        (PoolSettings(devices=["4090"]), "no device 4090; this machine has: 3060, 3090"),
        (PoolSettings(model="file:/nowhere.gguf"), "there is no such file"),
        (PoolSettings(model="builtin:huge"), "built in: tiny"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(pool: PoolSettings, says: str) -> None:
    """The start fails with a sentence for each pool that this machine cannot serve; nothing is lowered in silence."""
    with pytest.raises(PlanError, match=f"pool default: .*{says}"):
        make_plan(settings_for(pool), ENGINES, sources_for(CARDS))


def test_an_engine_that_is_not_installed_says_how_to_get_it() -> None:
    """ctransformers is an extra."""
    settings = settings_for(PoolSettings())
    settings.pools[0] = PoolSettings(engine="ctransformers")
    with pytest.raises(PlanError, match="pip install"):
        make_plan(settings, ENGINES, sources_for(CARDS))


def test_a_digest_is_remembered_and_its_memory_may_be_lost(tmp_path: Path) -> None:
    """A known file is not read again; a damaged or unwritable memory costs a read and nothing else."""
    model = tmp_path / "model.gguf"
    model.write_bytes(b"abc")
    digests = Digests(tmp_path / "digests.json")
    first = digests.of(model)
    assert first == "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    digests.stop()  # from here on no file can be read
    assert digests.of(model) == first
    (tmp_path / "digests.json").write_text("{damaged")
    with pytest.raises(InterruptedError):
        digests.of(model)
    assert Digests(tmp_path / "nowhere" / "digests.json").of(model) == first
