"""What was learned from loads: kept across starts, bounded in size and effect, and never worse than nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_orch.models.calibration import ENTRIES_MAX, RATIO_MAX, RATIO_MIN, Calibration, CalibrationKey

KEY = CalibrationKey("sha256:aa", "b11549", 8192, 2, "f16", "RTX 3060", "cuda")
NEED = 1000


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "calibration.json"


def test_without_experience_the_forecast_stands(file: Path) -> None:
    """No file yet is an empty memory."""
    assert Calibration(file).corrected(NEED, KEY) == NEED
    assert not file.exists()


def test_the_same_load_again_takes_what_it_took(file: Path) -> None:
    """Also after a restart, whatever the forecast says by then."""
    Calibration(file).record(KEY, NEED, 3000)
    assert Calibration(file).corrected(1100, KEY) == 3000


def test_a_later_measurement_replaces_an_earlier_one(file: Path) -> None:
    """One entry per key."""
    memory = Calibration(file)
    memory.record(KEY, NEED, 1300)
    memory.record(KEY, NEED, 1250)
    assert memory.corrected(NEED, KEY) == 1250
    assert len(Calibration(file)) == 1


@pytest.mark.parametrize(("measured", "expected"), [(1100, 2200), (5000, 3000), (100, 1600)])
def test_a_similar_load_moves_the_forecast_within_bounds(file: Path, measured: int, expected: int) -> None:
    """The ratio of another context is used, but not further than 0.8 to 1.5."""
    memory = Calibration(file)
    memory.record(KEY, NEED, measured)
    assert memory.corrected(2000, replace(KEY, ctx=16384)) == expected


def test_the_nearest_load_counts(file: Path) -> None:
    """The same build goes before the same card, that before the type of the cache, and that before its size."""
    asked = replace(KEY, ctx=4096)
    by_nearness = [
        replace(KEY, ctx=8192, slots=1),
        replace(KEY, ctx=65536),
        replace(asked, kv_type="q8_0"),
        replace(asked, device="RTX 3090"),
        replace(asked, engine_version="b11550"),
    ]
    for count in range(1, len(by_nearness) + 1):
        memory = Calibration(file.with_name(f"{count}.json"))
        for number, key in enumerate(by_nearness[-count:]):
            memory.record(key, NEED, 1000 + 100 * (number == 0))
        assert memory.corrected(NEED, asked) == 1100


def test_of_equally_near_loads_the_newest_counts(file: Path) -> None:
    """Half and twice the context are as far away."""
    memory = Calibration(file)
    memory.record(replace(KEY, ctx=4096), NEED, 1100)
    memory.record(replace(KEY, ctx=16384), NEED, 1200)
    assert memory.corrected(NEED, KEY) == 1200


@pytest.mark.parametrize("other", [replace(KEY, model_digest="sha256:bb"), replace(KEY, backend="cpu")])
def test_other_models_and_backends_do_not_count(file: Path, other: CalibrationKey) -> None:
    """What another file took, or the same on a CPU, says nothing."""
    memory = Calibration(file)
    memory.record(other, NEED, 1400)
    assert memory.corrected(NEED, KEY) == NEED


def test_the_oldest_is_forgotten(file: Path) -> None:
    """The number of entries is bounded, in the file too; an entry that was renewed is young again."""
    memory = Calibration(file)
    for number in range(ENTRIES_MAX):
        memory.record(replace(KEY, ctx=256 + number), NEED, 1000 + number)
    memory.record(replace(KEY, ctx=256), NEED, 999)
    memory.record(replace(KEY, ctx=1 << 20), NEED, 1100)
    again = Calibration(file)
    assert len(again) == len(memory) == ENTRIES_MAX
    assert again.corrected(NEED, replace(KEY, ctx=256)) == 999
    assert again.corrected(NEED, replace(KEY, ctx=257)) != 1001


@pytest.mark.parametrize("measured", [0, -1, 1 << 60])
def test_figures_that_no_load_has_are_dropped(file: Path, measured: int) -> None:
    """A driver that answers nonsense teaches nothing."""
    memory = Calibration(file)
    memory.record(KEY, NEED, measured)
    assert memory.corrected(NEED, KEY) == NEED


def test_a_failed_write_is_an_error_that_leaves_nothing_behind(tmp_path: Path) -> None:
    """The old file stays, no half of a new one lies about, and the measurement is used all the same."""
    file = tmp_path / "taken"
    file.mkdir()  # a file cannot replace it
    memory = Calibration(file)
    with pytest.raises(OSError, match="taken"):
        memory.record(KEY, NEED, 1300)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    assert memory.corrected(NEED, KEY) == 1300


GOOD = ["sha256:aa", "b11549", 8192, 2, "f16", "RTX 3060", "cuda", 1000, 1300]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b'{"version": 1, "entries": [[',
        b"[]",
        b"null",
        b'{"version": 2, "entries": []}',
        b'{"version": 1, "entries": 7}',
        b'{"version": 1}',
        b"[" * 100_000,
        b" " * (9 << 20),
        b'{"version": ' + b"1" * 5000 + b"}",
    ],
)
def test_a_damaged_file_is_an_empty_memory(file: Path, content: bytes) -> None:
    """It is no error, and the next measurement makes it whole."""
    file.write_bytes(content)
    memory = Calibration(file)
    assert memory.corrected(NEED, KEY) == NEED
    memory.record(KEY, NEED, 1300)
    assert Calibration(file).corrected(NEED, KEY) == 1300


@pytest.mark.parametrize(
    "line",
    [GOOD[:8], [*GOOD, 1], "text", None, {}]
    + [[*GOOD[:at], bad, *GOOD[at + 1 :]] for at in (0, 5) for bad in (7, None, "x" * 1000, [])]
    + [[*GOOD[:at], bad, *GOOD[at + 1 :]] for at in (2, 3, 7, 8) for bad in (0, -1, 1.5, True, "1", 1 << 60, [], {})],
)
def test_a_damaged_line_does_not_spoil_the_others(file: Path, line: object) -> None:
    """Each entry is checked by itself."""
    good = [*GOOD[:2], 4096, *GOOD[3:]]
    file.write_text(json.dumps({"version": 1, "entries": [line, good]}))
    memory = Calibration(file)
    assert len(memory) == 1
    assert memory.corrected(NEED, replace(KEY, ctx=4096)) == 1300


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=20,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
@given(st.lists(st.lists(json_values, min_size=9, max_size=9) | json_values))
def test_no_content_breaks_it(file: Path, lines: list[object]) -> None:
    """Whatever the file holds, a forecast stays within the bounds or is what the same key measured."""
    file.write_text(json.dumps({"version": 1, "entries": [*lines, GOOD]}))
    total = Calibration(file).corrected(NEED, replace(KEY, ctx=256))
    assert RATIO_MIN * NEED <= total <= RATIO_MAX * NEED
