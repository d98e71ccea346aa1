"""Which replica takes a task: most free VRAM, then fewest busy slots, then the first id."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_orch.contract.models import ReplicaState
from llama_orch.core import placement
from llama_orch.core.ledger import RESERVE_BYTES, Device, Ledger
from llama_orch.core.placement import Candidate, Faster
from llama_orch.core.replica import Replica
from llama_orch.testing.builders import GIB, a_device


def a_replica(replica_id: str, device: str = "3090", *, busy: int = 0, slots: int = 4, **fields: object) -> Replica:
    replica = Replica(replica_id, "default", tuple(device.split("+")), slots, ReplicaState.READY)
    replica.leases = {slot: f"{replica_id}-task-{slot}" for slot in range(busy)}
    for name, value in fields.items():
        setattr(replica, name, value)
    return replica


def devices(**free_gib: float) -> list[Device]:
    """Cards "a", "b" … with that much free."""
    reserve = RESERVE_BYTES / GIB
    return [a_device(device_id, vram_gib=free + reserve) for device_id, free in free_gib.items()]


def found_among(replicas: list[Replica], cards: list[Device], *, exclusive: bool = False) -> list[Candidate]:
    ledger = Ledger(cards, {replica.replica_id: replica for replica in replicas})
    return placement.candidates(replicas, ledger.scarcest_free_bytes, exclusive=exclusive)


def picked(replicas: list[Replica], cards: list[Device], *, exclusive: bool = False) -> str | None:
    chosen = placement.pick(found_among(replicas, cards, exclusive=exclusive))
    return None if chosen is None else chosen.replica.replica_id


@pytest.mark.spec("HP-PLC-1")
@pytest.mark.parametrize(
    ("replicas", "free", "winner"),
    [
        ([("r1", "a", 0), ("r2", "b", 3)], {"a": 4, "b": 20}, "r2"),  # memory before load
        ([("r1", "a", 2), ("r2", "b", 1)], {"a": 12, "b": 12}, "r2"),  # load where memory is equal
        ([("r2", "a", 1), ("r1", "b", 1)], {"a": 12, "b": 12}, "r1"),  # the id where both are
        ([("r2", "a", 1), ("r1", "a", 1), ("r3", "a", 0)], {"a": 12}, "r3"),  # several on one card
    ],
)
def test_the_order_of_the_rules(replicas: list[tuple[str, str, int]], free: dict[str, float], winner: str) -> None:
    """Each rule decides only where those before it tie, in whatever order the replicas are listed."""
    for listed in permutations(replicas):
        built = [a_replica(replica_id, device, busy=busy) for replica_id, device, busy in listed]
        assert picked(built, devices(**free)) == winner


@pytest.mark.spec("HP-PLC-1", "HP-PLC-6")
def test_a_split_replica_counts_for_its_scarcest_card() -> None:
    """Memory that is free on one card of a mask does not help the other one."""
    split, single = a_replica("r1", "a+b"), a_replica("r2", "c")
    assert picked([split, single], devices(a=24, b=2, c=3)) == "r2"
    assert picked([split, single], devices(a=24, b=4, c=3)) == "r1"


@pytest.mark.spec("HP-PLC-1")
@pytest.mark.parametrize("state", [state for state in ReplicaState if state is not ReplicaState.READY])
def test_only_ready_replicas_are_considered(state: ReplicaState) -> None:
    """A replica that does not serve takes nothing, however free it is."""
    assert picked([a_replica("r1", "a", state=state), a_replica("r2", "b", busy=3)], devices(a=24, b=1)) == "r2"
    assert picked([a_replica("r1", "a", state=state)], devices(a=24)) is None


@pytest.mark.spec("HP-PLC-1", "HP-DET-1")
def test_a_task_that_needs_a_whole_replica_gets_an_idle_one() -> None:
    """One busy slot rules a replica out for an exclusive task and not for a shared one."""
    replicas = [a_replica("r1", "a", busy=1), a_replica("r2", "b")]
    assert picked(replicas, devices(a=24, b=1), exclusive=True) == "r2"
    assert picked(replicas, devices(a=24, b=1), exclusive=False) == "r1"
    assert picked(replicas[:1], devices(a=24), exclusive=True) is None


def test_a_full_replica_takes_nothing() -> None:
    """A replica is a candidate as long as one slot is free."""
    assert picked([a_replica("r1", "a", busy=3)], devices(a=1)) == "r1"
    assert picked([a_replica("r1", "a", busy=4)], devices(a=1)) is None


def test_the_reasons_name_every_candidate_best_first() -> None:
    """ "Why this card?" is answered with the figures that decided."""
    replicas = [a_replica("r1", "a", busy=1), a_replica("r2", "b"), a_replica("r3", "c", busy=4)]
    found = found_among(replicas, devices(a=1, b=2, c=9))
    chosen = placement.pick(found)
    assert chosen is not None
    assert placement.reasons(chosen, found) == (
        "r2 chosen of 2 (r2: 2048 MiB free, 0/4 slots busy; r1: 1024 MiB free, 1/4 slots busy)"
    )


FIGURES = st.tuples(st.integers(0, 3), st.integers(0, 4))  # GiB free, busy slots; few values, so that ties are frequent


@pytest.mark.spec("HP-PLC-1")
@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(figures=st.lists(FIGURES, max_size=6), exclusive=st.booleans())
def test_the_choice_is_the_best_by_the_rules(figures: list[tuple[int, int]], exclusive: bool) -> None:
    """Against the rules, written out one by one over the list of replicas."""
    cards = devices(**{f"d{n}": free for n, (free, _) in enumerate(figures)})
    replicas = [a_replica(f"r{n}", f"d{n}", busy=busy) for n, (_, busy) in enumerate(figures)]
    able = [n for n, (_, busy) in enumerate(figures) if (busy == 0 if exclusive else busy < 4)]
    most_free = max((figures[n][0] for n in able), default=0)
    roomy = [n for n in able if figures[n][0] == most_free]
    least_busy = min((figures[n][1] for n in roomy), default=0)
    winners = [f"r{n}" for n in roomy if figures[n][1] == least_busy]
    assert picked(replicas, cards, exclusive=exclusive) == (winners[0] if winners else None)


# -- sessions and slow cards -------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-SES-3", "HP-PLC-1")
def test_a_session_goes_back_to_its_slot_while_that_costs_little() -> None:
    """The warm replica wins over a freer one, unless it is busier by more than two slots."""

    def chosen(busy: int) -> str:
        warm = Candidate(a_replica("warm", slots=8), 1 * GIB, busy, warm_slot=3)
        cold = Candidate(a_replica("cold", slots=8), 9 * GIB, 1)
        best = placement.pick([warm, cold])
        return "" if best is None else best.replica.replica_id

    assert [chosen(busy) for busy in (0, 3, 4)] == ["warm", "warm", "cold"]


@pytest.mark.spec("HP-PLC-1", "HP-PLC-3")
def test_the_last_tasks_of_a_queue_are_not_started_on_a_slow_card() -> None:
    """One that takes 10 s there waits for a card that is free in 2 s and takes 4 s; with a longer queue it does not."""
    assert placement.hold_back(10.0, [Faster(2.0, [4.0])])
    assert not placement.hold_back(10.0, [Faster(2.0, [4.0, 4.0, 4.0])])
    assert placement.hold_back(10.0, [Faster(2.0, [4.0, 4.0, 4.0]), Faster(2.0, [4.0, 4.0, 4.0])])
    assert not placement.hold_back(10.0, [])
