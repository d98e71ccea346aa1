"""The imaginary workstation: cards by name, models by figures, memory that is really taken."""

from __future__ import annotations

import asyncio

import pytest

from llama_orch.engines.base import LoadFailed, OutOfMemory, ReplicaSpec
from llama_orch.models.references import ModelNotFound
from llama_orch.testing.cards import GIB, KNOWN, UnknownCard, parse_card, parse_cards
from llama_orch.testing.imaginary import ImaginaryLibrary, a_model, physical_pace
from llama_orch.testing.loop import run
from llama_orch.testing.machine import LOST, Machine

MODEL = a_model("8b", gib=9.0)


def a_machine(cards: str = "3090,3060") -> Machine:
    return Machine(parse_cards(cards), ImaginaryLibrary([MODEL]))


def a_spec(card: str, replica_id: str = "r", **fields: object) -> ReplicaSpec:
    devices = tuple(card.split("+"))
    return ReplicaSpec(replica_id, "p", MODEL.path, 1, 2048, "simulated", devices, **fields)  # type: ignore[arg-type]


def test_cards_have_names_or_figures() -> None:
    """A known one, one by its figures, and the second of a kind with a name of its own."""
    assert parse_card("RTX".lower() + ":24GB:936").vram_bytes == parse_card("3090").vram_bytes == 24 * GIB
    assert [card.device_id for card in parse_cards("3060, 3090,3060")] == ["3060", "3090", "3060-2"]
    for text in ("", "3091", "x:0:9", "x:9", "x:9GB:0", "a b:9:9"):
        with pytest.raises(UnknownCard, match="3090"):
            parse_card(text)


def test_speeds_are_those_that_were_measured() -> None:
    """llama.cpp with an 8B model in Q4_K_M at 1,024 tokens, within a tenth: tokens per second, answers and prompts."""
    model = a_model("8b", gib=4.58, parameters=8.03e9)
    for name, decode, prompt in (
        ("3070", 70.94, 2283.62),
        ("3080", 106.40, 3557.02),
        ("3090", 111.74, 3865.39),
        ("4080", 106.22, 5064.99),
        ("4090", 127.74, 6898.71),
    ):
        service = physical_pace()(model, [KNOWN[name]])
        assert 1 / service.decode_s_per_token == pytest.approx(decode, rel=0.1), name
        assert 1 / service.prefill_s_per_token == pytest.approx(prompt, rel=0.1), name


def test_the_library_knows_its_models_and_no_others() -> None:
    """With what each needs, and in words where there is none."""
    library = ImaginaryLibrary([MODEL])
    model = library.look(MODEL.reference)
    one, two = (model.need(2048, slots, "simulated") or 0 for slots in (1, 2))
    assert two - one == 2048 * MODEL.kv_bytes_per_token
    assert one - (model.need(2048, 1, "cpu") or 0) == 450 * 2**20
    with pytest.raises(ModelNotFound, match="builtin:8b"):
        library.look("builtin:9b")


def test_a_load_takes_its_memory_or_fails() -> None:
    """What is read as free falls by what a worker takes; the next one that does not fit fails as on a real card."""

    async def main() -> None:
        machine = a_machine("3060")
        worker = await machine.engine.launch(a_spec("3060", "r-0"))
        await worker.ready()
        assert machine.read_free_bytes("3060") == 12 * GIB - MODEL.need(2048, 1, "simulated")
        with pytest.raises(OutOfMemory):
            await (await machine.engine.launch(a_spec("3060", "r-1"))).ready()
        await worker.stop(0)
        assert machine.read_free_bytes("3060") == 12 * GIB
        machine.take("3060", 8 * GIB)
        with pytest.raises(OutOfMemory):
            await (await machine.engine.launch(a_spec("3060", "r-2"))).ready()

    run(main())


def test_a_split_model_takes_a_part_of_each_card() -> None:
    """By its shares; it is read one card after the other, so the slow one tells."""

    async def main() -> None:
        machine = a_machine()
        await (await machine.engine.launch(a_spec("3090+3060", tensor_split=(3.0, 1.0)))).ready()
        used = [machine.used_bytes(card) for card in ("3090", "3060")]
        assert used[0] == pytest.approx(3 * used[1], rel=1e-6)
        assert sum(used) == pytest.approx(MODEL.need(2048, 1, "simulated"), rel=1e-6)

    run(main())


def test_a_lost_card_kills_and_refuses() -> None:
    """Its workers die, nothing loads, the reading says why; then it is back."""

    async def main() -> None:
        machine = a_machine()
        worker = await machine.engine.launch(a_spec("3090"))
        await worker.ready()
        machine.lose("3090")
        assert await worker.lost() == LOST
        source = machine.sources[0]
        assert (source.read_free_bytes(), source.read_problem()) == (0, LOST)
        with pytest.raises(LoadFailed, match="bus"):
            await (await machine.engine.launch(a_spec("3090"))).ready()
        machine.bring_back("3090")
        assert source.read_problem() is None
        assert await asyncio.wait_for((await machine.engine.launch(a_spec("3090"))).ready(), 60)

    run(main())
