"""The header reader: what it tells of a good file, and that a bad one is a GgufError and nothing else."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_orch.models.gguf import GgufError, read_gguf_header

_U32, _STRING, _ARRAY = 4, 8, 9
_F32 = 0
_CHEAP = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _string(text: bytes | str) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def _text_pair(key: str, value: bytes | str) -> bytes:
    return _string(key) + struct.pack("<I", _STRING) + _string(value)


def _u32_pair(key: str, value: int) -> bytes:
    return _string(key) + struct.pack("<II", _U32, value)


def _tensor(name: str = "t", shape: tuple[int, ...] = (4,), kind: int = _F32, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return _string(name) + dims + struct.pack("<IQ", kind, offset)


_LLAMA = _text_pair("general.architecture", "llama")


def _file(
    pairs: tuple[bytes, ...] = (_LLAMA,),
    tensors: tuple[bytes, ...] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    data: int = 4096,
) -> bytes:
    n_tensors, n_pairs = counts or (len(tensors), len(pairs))
    head = magic + struct.pack("<IQQ", version, n_tensors, n_pairs)
    return head + b"".join(pairs) + b"".join(tensors) + bytes(data)


def _write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    return path


def test_the_packaged_model(tiny_model: Path) -> None:
    """Every field of a real file, and weights that fill what the header does not."""
    header = read_gguf_header(tiny_model)
    assert (header.architecture, header.tokenizer_model, header.file_type) == ("llama", "llama", "Q8_0")
    assert header.context_length == 2048
    assert header.vocab_size > 256
    assert header.block_count > 0
    assert header.embedding_length > 0
    assert header.chat_template
    assert header.tensor_types == {"F32", "Q8_0"}
    assert header.size_bytes == tiny_model.stat().st_size
    assert 0.5 * header.size_bytes < header.weights_bytes < header.size_bytes
    assert header.weights_bytes == sum(tensor.size_bytes for tensor in header.tensors)
    assert header.kv["general.architecture"] == "llama"
    assert not header.is_split


def test_a_header_with_nothing_but_an_architecture(tmp_path: Path) -> None:
    """What a file does not state is 0 or empty, not an error."""
    header = read_gguf_header(_write(tmp_path, _file()))
    assert (header.architecture, header.vocab_size, header.chat_template) == ("llama", 0, None)
    assert (header.file_type, header.weights_bytes) == ("unknown", 0)


def test_weights_are_counted_in_blocks(tmp_path: Path) -> None:
    """Quantised tensors count by blocks: 64 values of Q8_0 are two blocks of 34 bytes."""
    tensors = (_tensor("a", (64, 2), 8), _tensor("b", (4,), _F32, 160))
    header = read_gguf_header(_write(tmp_path, _file(tensors=tensors)))
    assert header.weights_bytes == 2 * 2 * 34 + 16
    assert header.tensor_types == {"Q8_0", "F32"}


_HOSTILE = {
    "empty": b"",
    "magic": _file(magic=b"GGML"),
    "version 1": _file(version=1),
    "big endian": _file(version=3 << 24),
    "pairs": _file(counts=(0, 2**63)),
    "tensors": _file(counts=(2**64 - 1, 1)),
    "no architecture": _file(pairs=()),
    "architecture is a number": _file(pairs=(_u32_pair("general.architecture", 1),)),
    "key of 2**63": _file(pairs=(struct.pack("<Q", 2**63),)),
    "string of 2**64-1": _file(pairs=(_LLAMA, _string("a") + struct.pack("<IQ", _STRING, 2**64 - 1))),
    "string past the end": _file(pairs=(_LLAMA, _string("a") + struct.pack("<IQ", _STRING, 99_999))),
    "value type": _file(pairs=(_LLAMA, _string("a") + struct.pack("<I", 99))),
    "array of arrays": _file(pairs=(_LLAMA, _string("a") + struct.pack("<IIQ", _ARRAY, _ARRAY, 1))),
    "array type": _file(pairs=(_LLAMA, _string("a") + struct.pack("<IIQ", _ARRAY, 77, 1))),
    "array items": _file(pairs=(_LLAMA, _string("a") + struct.pack("<IIQ", _ARRAY, _U32, 2**62))),
    "array past the end": _file(pairs=(_LLAMA, _string("a") + struct.pack("<IIQ", _ARRAY, _U32, 1 << 20))),
    "strings past the end": _file(pairs=(_LLAMA, _string("a") + struct.pack("<IIQQ", _ARRAY, _STRING, 2, 2**63))),
    "key twice": _file(pairs=(_LLAMA, _LLAMA)),
    "key is not UTF-8": _file(pairs=(_text_pair("general.architecture", "llama"), _string(b"\xff") + bytes(8))),
    "name is not UTF-8": _file(pairs=(_LLAMA, _text_pair("general.name", b"\xff\xfe"))),
    "template": _file(pairs=(_LLAMA, _text_pair("tokenizer.chat_template", bytes(300_000)))),
    "alignment": _file(pairs=(_LLAMA, _u32_pair("general.alignment", 33))),
    "alignment of 0": _file(pairs=(_LLAMA, _u32_pair("general.alignment", 0))),
    "dimensions": _file(tensors=(_tensor(shape=(1, 1, 1, 1, 1)),)),
    "tensor type": _file(tensors=(_tensor(kind=4),)),
    "rows": _file(tensors=(_tensor(shape=(33,), kind=8),)),
    "tensor past the end": _file(tensors=(_tensor(offset=1 << 40),)),
    "tensor of 2**252": _file(tensors=(_tensor(shape=(2**63, 2**63, 2**63, 2**63)),)),
    "tensor not aligned": _file(tensors=(_tensor(offset=1),)),
    "tensor twice": _file(tensors=(_tensor(), _tensor())),
    "tensors overlap": _file(tensors=tuple(_tensor(str(i), (1000,)) for i in range(8))),
    "cut": _file(tensors=(_tensor(),))[:60],
}


@pytest.mark.parametrize("name", _HOSTILE)
def test_a_hostile_file_is_refused(name: str, tmp_path: Path) -> None:
    """One clear sentence for each way in which a header can lie."""
    with pytest.raises(GgufError) as refused:
        read_gguf_header(_write(tmp_path, _HOSTILE[name]))
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 300


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    """A named pipe or a folder in a model's place is refused at once."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(GgufError, match="regular file"):
            read_gguf_header(path)


def test_a_part_of_a_split_model_says_so(tmp_path: Path) -> None:
    """The weights of one part are not the model's: the engines refuse it."""
    assert read_gguf_header(_write(tmp_path, _file((_LLAMA, _u32_pair("split.count", 3))))).is_split


@_CHEAP
@given(st.data())
def test_a_truncated_file_is_a_gguf_error(tiny_model: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Cut anywhere, the file is refused: its tensors end past its end."""
    whole = tiny_model.read_bytes()
    cut = data.draw(st.one_of(st.integers(0, min(len(whole), 20_000)), st.integers(0, len(whole) - 64)))
    with pytest.raises(GgufError):
        read_gguf_header(_write(tmp_path, whole[:cut]))


@_CHEAP
@given(st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4))
def test_a_mutated_file_is_read_or_refused(tiny_model: Path, tmp_path: Path, edits: list[tuple[int, bytes]]) -> None:
    """Whatever bytes are changed, the reader answers or raises GgufError, and never claims more than the file holds."""
    content = bytearray(tiny_model.read_bytes())
    for at, replacement in edits:
        content[at : at + len(replacement)] = replacement
    try:
        header = read_gguf_header(_write(tmp_path, bytes(content)))
    except GgufError:
        return
    assert header.weights_bytes <= header.size_bytes


@_CHEAP
@given(st.binary(max_size=400), st.integers(0, 3), st.integers(0, 3))
def test_noise_is_a_gguf_error(tmp_path: Path, noise: bytes, n_tensors: int, n_pairs: int) -> None:
    """Noise behind a plausible head."""
    content = b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_pairs) + noise
    with pytest.raises(GgufError):
        read_gguf_header(_write(tmp_path, content))
