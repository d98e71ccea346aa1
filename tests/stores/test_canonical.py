"""Equal values have one text."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_orch.errors import InvalidParams
from llama_orch.stores.canonical import canonical_json

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    # Every text that UTF-8 can say.
    | st.text(st.characters(codec="utf-8"), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=4), inner, max_size=4)
    ),
    max_leaves=20,
)


@pytest.mark.spec("HP-ART-1")
@given(value=VALUES)
def test_what_is_read_back_is_equal_and_has_the_same_text(value: Any) -> None:
    """Also through the decoder of the requests, whatever order and blanks the text came with."""
    text = canonical_json(value)
    assert msgspec.json.decode(text) == value
    spaced = json.dumps(value, indent=2, ensure_ascii=True).encode()
    assert canonical_json(msgspec.json.decode(spaced)) == text


@pytest.mark.spec("HP-ART-1")
@pytest.mark.parametrize(
    ("given", "text"),
    [
        ('{"b": 1, "a": [true, null, "x"]}', '{"a":[true,null,"x"],"b":1}'),
        ('{"n": [1.0, 1e2, -0.0, 0.50]}', '{"n":[1,100,0,0.5]}'),
        ('{"n": [9007199254740993, 9223372036854775807]}', '{"n":[9007199254740993,9223372036854775807]}'),
        ('{"n": [1e22, 1e-7]}', '{"n":[1e+22,1e-07]}'),
        (r'{"s": "\u20ac\u0000\n\"\\\/\u007f"}', '{"s":"€\\u0000\\n\\"\\\\/\x7f"}'),
        # UTF-16 puts the pair of U+1F600 before U+FB33, which code points do not.
        (r'{"\ufb33": 1, "\ud83d\ude00": 2, "z": 3}', '{"z":3,"\U0001f600":2,"\ufb33":1}'),
    ],
)
def test_the_one_text(given: str, text: str) -> None:
    assert canonical_json(msgspec.json.decode(given)).decode() == text


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**30])
def test_a_whole_number_of_more_than_64_bits_is_refused(number: int) -> None:
    with pytest.raises(InvalidParams, match="more than 64 bits; send it as text"):
        canonical_json({"n": number})


def test_what_is_nested_too_deeply_is_refused() -> None:
    value: Any = 0
    for _ in range(100):
        value = [value]
    assert canonical_json(value) == b"[" * 100 + b"0" + b"]" * 100
    with pytest.raises(InvalidParams, match="nested more than 100 deep"):
        canonical_json([value])
