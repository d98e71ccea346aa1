"""The file of a load: what is taken, what is refused and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_orch.simulate.load import LoadError, parse_load, read_load
from llama_orch.testing.cards import GIB

MODEL = "models: [{name: m, size_gb: 4.9}]"
AGENT = "agents: [{name: a, model: m}]"


def problems(text: str) -> str:
    with pytest.raises(LoadError) as refused:
        parse_load(text, "l.yaml")
    return "; ".join(refused.value.problems)


def test_sizes_follow_from_parameters_and_quantisation() -> None:
    """An 8B model at 4.89 bits is 4.9 GB; a size alone gives parameters; a mixture reads its active part."""
    load = parse_load(
        "models: [{name: a, parameters_b: 8}, {name: b, size_gb: 4.89}, {name: c, parameters_b: 30, active_b: 3}]\n"
        "agents: [{name: x, model: a}]",
        "l.yaml",
    )
    a, b, c = load.models.values()
    assert (a.weights_bytes, a.active, a.kv_bytes_per_token) == (pytest.approx(4.89e9), 1.0, 128 * 1024)
    assert b.parameters == pytest.approx(8e9, rel=0.01)
    assert c.active == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "missing required field `models`"),
        (MODEL, "missing required field `agents`"),
        (f"{MODEL}\n{AGENT}\nagent: []", "unknown field `agent`"),
        (f"{MODEL}\nagents: [{{name: a, model: n}}]", "there is no model 'n'; the models: m"),
        (f"models: [{{name: m}}]\n{AGENT}", "give either size_gb or parameters_b"),
        (f"models: [{{name: m, size_gb: 1, parameters_b: 1}}]\n{AGENT}", "give either"),
        (f"models: [{{name: m, size_gb: 1, quantization: Q9}}]\n{AGENT}", "quantization is one of Q2_K"),
        (f"models: [{{name: m, size_gb: 1}}, {{name: m, size_gb: 1}}]\n{AGENT}", "'m' is given more than once"),
        (f"{MODEL}\nagents: [{{name: a, model: m, prompt_tokens: 9000}}]", "up to 13950 tokens, but ctx is 8192"),
        (f"{MODEL}\nagents: [{{name: a, model: m, tasks: 90000, count: 2}}]", "180000 tasks in all"),
        (f"{MODEL}\nagents: [{{name: a, model: m, tasks: 0}}]", "Expected `int` >= 1"),
        (f"{MODEL}\n{AGENT}\npools: [{{model: x}}]", "there is no model 'x'"),
        (f"{MODEL}\n{AGENT}\npools: [{{model: m, slot: 1}}]", "did you mean 'slots'"),
        (f"{MODEL}\n{AGENT}\nassume: {{spread: 1}}", "Expected `float` < 1"),
        ("a: &x 1", "anchors and aliases"),
    ],
)
def test_what_cannot_be_is_refused_by_name(text: str, words: str) -> None:
    """The file's name, where it is wrong, and what would be right."""
    said = problems(text)
    assert words in said
    assert said.startswith("l.yaml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """A missing file, one that is no text, one that is too large."""
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "large").write_bytes(b"#" * (1 << 20) + b"\n")
    for name, words in (("none", "cannot be read"), ("binary", "not UTF-8"), ("large", "larger than")):
        with pytest.raises(LoadError, match=words):
            read_load(tmp_path / name)


def test_hosts_are_cards_by_name_or_by_figures() -> None:
    """Known cards, own ones of the file, which may also correct a known one, and figures on the spot."""
    cards = (
        "cards: [{name: mine, memory_gb: 20, bandwidth_gb_s: 500}, {name: 3060, memory_gb: 12, bandwidth_gb_s: 300}]"
    )
    load = parse_load(f"{MODEL}\n{AGENT}\n{cards.replace('3060', chr(39) + '3060' + chr(39))}", "l.yaml")
    host = load.host("3090, mine,3060,3060,x:8GB:100")
    assert [card.device_id for card in host] == ["3090", "mine", "3060", "3060-2", "x"]
    assert [round(card.bandwidth / 1e9) for card in host] == [936, 500, 300, 300, 100]
    assert host[1].vram_bytes == 20 * GIB
    with pytest.raises(LoadError, match="there is no card '9999'; known: "):
        load.host("9999")
