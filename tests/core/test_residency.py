"""Who makes room for whom: by the rules, written out one by one, and by what follows from them over time."""

from __future__ import annotations

from itertools import chain, combinations, count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_orch.contract.models import ReplicaState
from llama_orch.core import residency
from llama_orch.core.effects import Load, Unload
from llama_orch.core.ledger import Ledger
from llama_orch.core.replica import Replica
from llama_orch.core.residency import REUSE_HALF_LIFE_S, SUBSETS_FROM_MAX, Holder
from llama_orch.core.scheduler import Scheduler
from llama_orch.testing.builders import DIGEST, GIB, a_device, an_outcome, on_demand, submit

S = ReplicaState
NUMBERS = count()
NOW = 1000.0
FOREVER = float("inf")


def a_replica(need_gib: float, state: ReplicaState = S.READY, devices: str = "3090", **fields: object) -> Replica:
    ids = tuple(devices.split("+"))
    need = dict.fromkeys(ids, int(need_gib * GIB / len(ids)))
    replica = Replica(f"r{next(NUMBERS):04}", "default", ids, 4, state, need, is_pinned=False)
    replica.ready_since_s = 0.0 if state is S.READY else None
    for name, value in fields.items():
        setattr(replica, name, value)
    return replica


def holder(need_gib: float, reload_s: float = 10.0, *, is_busy: bool = False, **fields: object) -> Holder:
    return Holder(a_replica(need_gib, **fields), is_busy, reload_s)  # type: ignore[arg-type]


def a_ledger(*replicas: Replica) -> Ledger:
    return Ledger([a_device("3090"), a_device("3060")], {replica.replica_id: replica for replica in replicas})


def victims(newcomer: Replica, holders: list[Holder], *others: Replica) -> list[Holder] | None:
    ledger = a_ledger(newcomer, *[one.replica for one in holders], *others)
    found = residency.cheapest_victims(newcomer, holders, ledger, NOW)
    return None if found is None else list(found)


# -- who may be asked --------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-PLC-8")
@pytest.mark.parametrize(
    ("fields", "is_busy", "may"),
    [
        ({}, False, True),
        ({"is_pinned": True}, False, False),  # a person wants it to stay
        ({"is_closing": True}, False, False),  # it leaves anyway
        ({"ready_since_s": NOW - 30}, False, True),
        ({"ready_since_s": NOW - 29}, False, False),  # it has only just come
        ({"ready_since_s": NOW - 120}, True, True),
        ({"ready_since_s": NOW - 119}, True, False),  # it has work
        ({"state": S.LOADING}, False, False),
        ({"state": S.UNLOADING}, False, False),
        ({"state": S.BACKOFF}, False, True),  # it has nothing to lose
        ({"state": S.UNLOADED}, False, False),
    ],
)
def test_who_may_be_asked_to_make_room(fields: dict[str, object], is_busy: bool, may: bool) -> None:
    """Idle ones after 30 s here, those with work after 120 s, pinned ones never."""
    one = holder(1, is_busy=is_busy, **fields)  # type: ignore[arg-type]
    assert residency.may_leave(one, NOW, idle_after_s=30.0, busy_after_s=120.0) is may


@pytest.mark.spec("HP-PLC-8")
def test_nobody_with_work_is_asked_before_the_others_patience_is_over() -> None:
    """However long it has been there."""
    for state in (S.READY, S.BACKOFF):
        one = holder(1, is_busy=True, state=state)
        assert not residency.may_leave(one, NOW, idle_after_s=0.0, busy_after_s=FOREVER)


# -- whom it costs least to lose ---------------------------------------------------------------------------------------


@pytest.mark.spec("HP-PLC-8")
def test_a_loss_costs_less_the_longer_nobody_has_asked() -> None:
    """Half as much after each half-life; the full reload where there is work."""
    idle = holder(1, 8.0, last_used_s=NOW - 2 * REUSE_HALF_LIFE_S)
    assert idle.cost(NOW) == pytest.approx(2.0)
    assert holder(1, 8.0, is_busy=True, last_used_s=0.0).cost(NOW) == 8.0


@pytest.mark.spec("HP-PLC-8")
def test_among_equals_the_least_recently_used_one_leaves() -> None:
    """Same size and same time to load."""
    holders = [holder(8, last_used_s=NOW - idle_s) for idle_s in (30, 300, 3)]
    assert victims(a_replica(6, S.UNLOADED), holders) == [holders[1]]


@pytest.mark.spec("HP-PLC-8")
def test_nobody_leaves_where_there_is_room() -> None:
    """Also where the room is only about to be there: those who are leaving make enough."""
    holders = [holder(8)]
    assert victims(a_replica(10, S.UNLOADED), holders) == []
    assert victims(a_replica(14, S.UNLOADED), holders, a_replica(6, S.UNLOADING)) == []
    assert victims(a_replica(14, S.UNLOADED), holders, a_replica(6, is_closing=True)) == []
    assert victims(a_replica(14, S.UNLOADED), holders, a_replica(6)) == holders


@pytest.mark.spec("HP-PLC-8")
def test_one_leaves_rather_than_two_and_the_right_one() -> None:
    """On each device what is lacking there; whoever is elsewhere stays."""
    small, large, elsewhere = holder(4, 4.0), holder(12, 7.0), holder(11, 1.0, devices="3060")
    others = [small, large, elsewhere]
    assert victims(a_replica(11, S.UNLOADED), others) == [small]
    assert victims(a_replica(18, S.UNLOADED), others) == [large]
    assert victims(a_replica(22, S.UNLOADED), others) == [small, large]
    assert victims(a_replica(24, S.UNLOADED), others) is None


@pytest.mark.spec("HP-PLC-6", "HP-PLC-8")
def test_a_split_model_needs_room_on_each_of_its_cards() -> None:
    """The victims of one card do not help the other."""
    here, there = holder(16), holder(8, devices="3060")
    assert victims(a_replica(20, S.UNLOADED, devices="3090+3060"), [here, there]) == [here, there]
    assert victims(a_replica(10, S.UNLOADED, devices="3090+3060"), [here, there]) == [there]


@pytest.mark.spec("HP-PLC-8")
def test_many_small_models_make_room_for_a_large_one() -> None:
    """More than every set can be tried of: the cheapest leave one by one, and nobody for nothing."""
    holders = [holder(1, 1.0 + n) for n in range(SUBSETS_FROM_MAX + 6)]
    found = victims(a_replica(21, S.UNLOADED), holders)
    assert found is not None
    assert found == holders[: len(found)]
    assert len(found) == 14  # 24 less 16 used and a reserve is 7.75: 13.25 are lacking


COSTS = st.tuples(st.integers(1, 9), st.integers(1, 4), st.sampled_from(["3090", "3060", "3090+3060"]))


@pytest.mark.spec("HP-PLC-8")
@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(
    costs=st.lists(COSTS, max_size=6),
    need=st.integers(1, 24),
    devices=st.sampled_from(["3090", "3060", "3090+3060"]),
)
def test_the_victims_are_the_cheapest_that_will_do(costs: list[tuple[int, int, str]], need: int, devices: str) -> None:
    """Against all sets: none that will do costs less, or as much with fewer; None only where no set will do."""
    holders = [holder(size, float(reload_s), devices=where, last_used_s=NOW) for reload_s, size, where in costs]
    newcomer = a_replica(need, S.UNLOADED, devices=devices)
    ledger = a_ledger(newcomer, *[one.replica for one in holders])

    def does(leaving: tuple[Holder, ...]) -> bool:
        return all(
            need_bytes <= ledger.free_bytes(d) + sum(one.replica.need_bytes.get(d, 0) for one in leaving)
            for d, need_bytes in newcomer.need_bytes.items()
        )

    sets = chain.from_iterable(combinations(holders, size) for size in range(len(holders) + 1))
    best = min(((sum(v.cost(NOW) for v in those), len(those)) for those in sets if does(those)), default=None)
    found = residency.cheapest_victims(newcomer, holders, ledger, NOW)
    assert (found is None) is (best is None)
    if found is not None:
        assert does(found)
        assert (sum(one.cost(NOW) for one in found), len(found)) == best


# -- which of the places -----------------------------------------------------------------------------------------------


def chosen(
    candidates: list[Replica],
    holders: list[Holder] | None = None,
    *,
    blocks: dict[str, int] | None = None,
    crowd: dict[str, int] | None = None,
) -> str | None:
    ledger = a_ledger(*candidates, *[one.replica for one in holders or []])
    found = residency.proposals(
        candidates,
        holders or [],
        ledger,
        lambda replica: (blocks or {}).get(replica.replica_id, 0),
        lambda replica: (crowd or {}).get(replica.replica_id, 0),
        NOW,
    )
    best = residency.pick(found)
    return None if best is None else best.replica.replica_id


@pytest.mark.spec("HP-PLC-8")
def test_the_order_of_the_rules_for_the_place() -> None:
    """Nobody has to leave; room is kept for those who fit nowhere else; a device that nobody works on; the cheapest
    leave; the freest device."""
    big, small = a_replica(4, S.UNLOADED), a_replica(4, S.UNLOADED, devices="3060")
    assert chosen([small, big]) == big.replica_id
    assert chosen([small, big], blocks={big.replica_id: 1}) == small.replica_id
    assert chosen([small, big], crowd={big.replica_id: 1}) == small.replica_id
    assert chosen([small, big], crowd={big.replica_id: 1}, blocks={small.replica_id: 1}) == big.replica_id
    full = holder(22)
    assert chosen([small, big], [full], blocks={small.replica_id: 1}) == small.replica_id
    both = [holder(22, 5.0), holder(10, 9.0, devices="3060")]
    assert chosen([small, big], both) == big.replica_id
    assert chosen([small, big], both, blocks={big.replica_id: 1}) == small.replica_id


@pytest.mark.spec("HP-PLC-8")
def test_room_that_is_there_comes_before_room_that_is_coming() -> None:
    """Even on a device that is less free."""
    big, small = a_replica(9, S.UNLOADED), a_replica(9, S.UNLOADED, devices="3060")
    leaving = a_replica(18, S.UNLOADING)
    ledger = a_ledger(big, small, leaving)
    found = residency.proposals([big, small], [], ledger, lambda _: 0, lambda _: 0, NOW)
    assert len(found) == 2
    best = residency.pick(found)
    assert best is not None
    assert best.replica is small


@pytest.mark.spec("HP-PLC-5")
def test_a_device_that_cannot_be_used_is_no_place() -> None:
    """And the reason is told with the figures of those that can be."""
    big, small = a_replica(20, S.UNLOADED), a_replica(9, S.UNLOADED, devices="3060")
    taken = a_replica(10)
    ledger = a_ledger(big, small, taken)
    ledger.devices["3060"].problem = "not answering"
    assert residency.proposals([big, small], [], ledger, lambda _: 0, lambda _: 0, NOW) == []
    assert residency.shortage([big, small], ledger) == (
        "20,480 MiB are needed on device 3090, which has 14,080; device 3060 cannot be used (not answering)"
    )


# -- over time ---------------------------------------------------------------------------------------------------------


class Agents:
    """Agents that keep their model busy: each submits its next task as soon as one has ended. Loads and unloads take
    `load_s` and no time."""

    def __init__(self, *needs_gib: float, load_s: float, task_s: float, min_residency_s: float = 30.0) -> None:
        pools = [on_demand(f"m{n}", need) for n, need in enumerate(needs_gib)]
        self.scheduler = Scheduler(pools, [a_device("3090")], retain_s=0.0, min_residency_s=min_residency_s)
        self.load_s, self.task_s = load_s, task_s
        self.coming: list[tuple[float, str]] = []
        self.ready: list[tuple[float, str]] = []
        self.evicted: list[tuple[float, str]] = []
        self.waits: list[float] = []
        self.number = 0
        for pool in pools:
            self.ask(pool.spec.pool_id, 0.0)

    def ask(self, pool_id: str, now: float) -> None:
        self.number += 1
        submit(self.scheduler, f"{pool_id}/{self.number}", pool_id=pool_id, now=now)

    def play(self, until_s: float, step_s: float = 0.5) -> None:
        for n in range(int(until_s / step_s)):
            now = n * step_s
            self.scheduler.tick(now)
            self.perform(now)
            for due, replica_id in [one for one in self.coming if one[0] <= now]:
                self.coming.remove((due, replica_id))
                self.scheduler.replica_ready(replica_id, slots=4, model_digest=DIGEST, now=now)
                self.ready.append((now, replica_id))
            for task in list(self.scheduler.tasks.values()):
                if task.outcome is None and task.started_s is not None and task.started_s + self.task_s <= now:
                    self.waits.append(task.started_s - task.created_s)
                    self.ask(task.pool_id, now)
                    self.scheduler.finished(task.task_id, an_outcome(), now)
            self.perform(now)

    def perform(self, now: float) -> None:
        while effects := self.scheduler.take_effects():
            for effect in effects:
                if isinstance(effect, Load):
                    self.coming.append((now + self.load_s, effect.replica_id))
                elif isinstance(effect, Unload):
                    self.evicted.append((now, effect.replica_id))
                    self.scheduler.replica_unloaded(effect.replica_id, now)


@pytest.mark.spec("HP-PLC-8")
@pytest.mark.parametrize("load_s", [5.0, 40.0])
def test_two_agents_whose_models_do_not_fit_together_take_turns(load_s: float) -> None:
    """Each has its model for as long as the other one's patience lasts, and neither waits for longer than a turn."""
    agents = Agents(20, 16, load_s=load_s, task_s=3.0)
    agents.play(1500.0)
    patience_s = max(30.0, 4 * load_s)
    assert {replica_id for _, replica_id in agents.ready} == {"m0-0", "m1-0"}
    turns = [gone - came for (came, a), (gone, b) in zip(agents.ready, agents.evicted, strict=False) if a == b]
    assert len(turns) >= 1500 // (patience_s + load_s + 10) - 1
    assert len(turns) == len(agents.evicted), "one after the other"
    # The very first loads are guessed by their size, so that the first turn may be another.
    assert all(turn >= patience_s - 1 for turn in turns[2:]), "nobody is sent away before"
    assert max(agents.waits) <= 30 + 2 * (patience_s + load_s + 6), "nobody starves"


@pytest.mark.spec("HP-PLC-8")
def test_a_task_that_outlasts_everybodys_patience_earns_its_model_no_shorter_turn() -> None:
    """The other one's wait began with the end of its own turn, long ago; the next turn is a full one all the same."""
    agents = Agents(20, 16, load_s=20.0, task_s=100.0)
    agents.play(2500.0)
    turns = [gone - came for (came, _), (gone, _) in zip(agents.ready, agents.evicted, strict=False)]
    assert len(turns) > 6
    assert all(turn >= 80.0 for turn in turns[2:])


@pytest.mark.spec("HP-PLC-8")
def test_models_that_fit_together_stay_together() -> None:
    """Nobody leaves where everybody fits."""
    agents = Agents(10, 8, 5, load_s=5.0, task_s=3.0)
    agents.play(300.0)
    assert (len(agents.ready), agents.evicted) == (3, [])


@pytest.mark.spec("HP-PLC-8")
def test_three_agents_for_two_places_all_get_their_turn() -> None:
    """Who waits longest comes next."""
    agents = Agents(11, 11, 11, load_s=5.0, task_s=3.0)
    agents.play(1500.0)
    counts = {replica: sum(1 for _, one in agents.ready if one == replica) for _, replica in agents.ready}
    assert len(counts) == 3
    assert max(counts.values()) - min(counts.values()) <= 2
    assert max(agents.waits) <= 120.0
