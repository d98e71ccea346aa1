"""Reads the header of a GGUF file: what a model is, and how large, without loading it.

The file is hostile until proven otherwise (its sizes have been memory errors in other readers), so every count, length
and offset is checked against a cap and against the file's end before it is used, and nothing is read that is not
needed. Whatever is wrong is a GgufError with one clear sentence; nothing else is ever raised for a file's contents.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llama_orch.models.gguf_types import FILE_TYPES, TENSOR_TYPES

_PAIRS_MAX = 4096
_TENSORS_MAX = 1 << 16
_ARRAY_ITEMS_MAX = 1 << 22
_ALL_ITEMS_MAX = 1 << 23  # over all arrays: bounds the time that a header can cost
_HEADER_BYTES_MAX = 1 << 28
_NAME_BYTES_MAX = 512
_STRING_BYTES_MAX = 1 << 20
_STRING_KEPT_BYTES = 1024
_TEMPLATE_BYTES_MAX = 1 << 18
_ARRAY_KEPT_ITEMS = 1024
_ALIGNMENT_MAX = 1 << 16
_DIMS_MAX = 4
_BLOCK = 1 << 16

_STRING = 8
_ARRAY = 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

Scalar = int | float | bool | str


class GgufError(ValueError):
    """The file is not a GGUF that can be used; the text says why."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor as the header declares it."""

    name: str
    type: str
    shape: tuple[int, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF header says. Counts that the file does not state are 0, names that it does not state are empty."""

    architecture: str
    name: str
    context_length: int  # tokens that the model was trained for
    block_count: int
    embedding_length: int
    vocab_size: int
    tokenizer_model: str  # "llama" is SentencePiece, "gpt2" is byte-level BPE
    chat_template: str | None
    file_type: str  # Q4_K_M and the like
    tensor_types: frozenset[str]
    size_bytes: int
    weights_bytes: int
    is_split: bool
    tensors: tuple[GgufTensor, ...] = field(repr=False)
    kv: Mapping[str, Scalar | tuple[Scalar, ...]] = field(repr=False)  # scalars, short strings, short arrays of numbers


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header of the file at `path`. Raises GgufError, or OSError when it cannot be opened."""
    # Not blocking: opening a named pipe would wait for its writer for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise GgufError("the model is not a regular file")
        return _read(_Bounded(descriptor, about.st_size))
    finally:
        os.close(descriptor)


def _read(source: _Bounded) -> GgufHeader:
    if source.take(4) != b"GGUF":
        raise GgufError("the file is not a GGUF: its first bytes are wrong")
    version = source.number("I")
    if version not in (2, 3):
        raise GgufError(f"GGUF version {version} is not supported (2 and 3 are, in little-endian order)")
    n_tensors, n_pairs = source.number("Q"), source.number("Q")
    if n_pairs > _PAIRS_MAX or n_tensors > _TENSORS_MAX:
        raise GgufError(f"the header claims {n_pairs} pairs and {n_tensors} tensors, more than any model has")
    pairs = _Pairs(source)
    for _ in range(n_pairs):
        pairs.read_one()
    tensors = _read_tensors(source, n_tensors, pairs.alignment())
    return _header(source, pairs, tensors)


def _header(source: _Bounded, pairs: _Pairs, tensors: tuple[GgufTensor, ...]) -> GgufHeader:
    architecture = pairs.text("general.architecture")
    if not architecture:
        raise GgufError("the header names no architecture")
    file_type = pairs.count("general.file_type", missing=-1)
    return GgufHeader(
        architecture=architecture,
        name=pairs.text("general.name"),
        context_length=pairs.count(f"{architecture}.context_length"),
        block_count=pairs.count(f"{architecture}.block_count"),
        embedding_length=pairs.count(f"{architecture}.embedding_length"),
        vocab_size=pairs.array_items.get("tokenizer.ggml.tokens", 0) or pairs.count(f"{architecture}.vocab_size"),
        tokenizer_model=pairs.text("tokenizer.ggml.model"),
        chat_template=pairs.template,
        file_type=FILE_TYPES.get(file_type, "unknown"),
        tensor_types=frozenset(tensor.type for tensor in tensors),
        size_bytes=source.size,
        weights_bytes=sum(tensor.size_bytes for tensor in tensors),
        is_split=pairs.count("split.count") > 1,
        tensors=tensors,
        kv=pairs.kept,
    )


class _Bounded:
    """Reads forward through the file in blocks and never past its end or the header's cap."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.size = size
        self._limit = min(size, _HEADER_BYTES_MAX)
        self._descriptor = descriptor
        self._buffer = b""
        self._at = 0  # in the buffer
        self._base = 0  # of the buffer, in the file

    @property
    def position(self) -> int:
        return self._base + self._at

    def take(self, n_bytes: int) -> bytes:
        """The next bytes, exactly that many."""
        end = self._at + n_bytes
        if end > len(self._buffer):
            self._fill(n_bytes)
            end = n_bytes
        data = self._buffer[self._at : end]
        self._at = end
        return data

    def skip(self, n_bytes: int) -> None:
        """Pass over bytes without reading them."""
        self._check(n_bytes)
        self._at += n_bytes
        if self._at > len(self._buffer):
            self._base, self._at, self._buffer = self._base + self._at, 0, b""

    def number(self, code: str) -> int:
        """One little-endian integer."""
        data = self.take(struct.calcsize("<" + code))
        return int.from_bytes(data, "little")

    def string(self, cap: int, what: str) -> bytes:
        length = self.number("Q")
        if length > cap:
            raise GgufError(f"{what} has {length} bytes, more than the {cap} that are allowed")
        return self.take(length)

    def skip_strings(self, n_strings: int) -> None:
        for _ in range(n_strings):
            self.skip(self.number("Q"))

    def _check(self, n_bytes: int) -> None:
        if self.position + n_bytes > self._limit:
            raise GgufError("the header is truncated, or claims more than the file holds")

    def _fill(self, n_bytes: int) -> None:
        self._check(n_bytes)
        position = self.position
        wanted = min(max(n_bytes, _BLOCK), self._limit - position)
        self._buffer = os.pread(self._descriptor, wanted, position)
        self._base, self._at = position, 0
        if len(self._buffer) < n_bytes:
            raise GgufError("the file became shorter while it was read")


class _Pairs:
    """The key-value pairs, kept as far as they are of use."""

    def __init__(self, source: _Bounded) -> None:
        self.kept: dict[str, Scalar | tuple[Scalar, ...]] = {}
        self.array_items: dict[str, int] = {}
        self.template: str | None = None
        self._source = source
        self._seen: set[str] = set()
        self._items = 0

    def read_one(self) -> None:
        key = _text(self._source.string(_NAME_BYTES_MAX, "a key"), "a key")
        if key in self._seen:
            raise GgufError(f"the key {_shown(key)} is there twice")
        self._seen.add(key)
        kind = self._source.number("I")
        if kind == _STRING:
            self._read_string(key)
        elif kind == _ARRAY:
            self._read_array(key)
        else:
            self.kept[key] = self._numbers(key, kind, 1)[0]

    def text(self, key: str) -> str:
        """A string, empty when it is not stated."""
        value = self.kept.get(key, "")
        if not isinstance(value, str):
            raise GgufError(f"{_shown(key)} is not a string")
        return value

    def count(self, key: str, missing: int = 0) -> int:
        """A whole number that is not negative."""
        value = self.kept.get(key, missing)
        if isinstance(value, bool) or not isinstance(value, int) or (value < 0 and value != missing):
            raise GgufError(f"{_shown(key)} is not a count")
        return value

    def alignment(self) -> int:
        """Bytes to which the tensors' data is aligned."""
        value = self.count("general.alignment", missing=32)
        if not 1 <= value <= _ALIGNMENT_MAX or value & (value - 1):
            raise GgufError("general.alignment is not a reasonable power of two")
        return value

    def _read_string(self, key: str) -> None:
        is_template = key == "tokenizer.chat_template"
        raw = self._source.string(_TEMPLATE_BYTES_MAX if is_template else _STRING_BYTES_MAX, _shown(key))
        if is_template:
            self.template = _text(raw, key) or None
        elif len(raw) <= _STRING_KEPT_BYTES:
            self.kept[key] = _text(raw, key)

    def _read_array(self, key: str) -> None:
        kind, n_items = self._source.number("I"), self._source.number("Q")
        self._items += n_items
        if n_items > _ARRAY_ITEMS_MAX or self._items > _ALL_ITEMS_MAX:
            raise GgufError(f"{_shown(key)} claims {n_items} items, more than any model has")
        self.array_items[key] = n_items
        if kind == _STRING:
            self._source.skip_strings(n_items)
        elif n_items <= _ARRAY_KEPT_ITEMS:
            self.kept[key] = self._numbers(key, kind, n_items)
        else:
            self._source.skip(n_items * self._item_bytes(key, kind))

    def _numbers(self, key: str, kind: int, n_items: int) -> tuple[Scalar, ...]:
        raw = self._source.take(n_items * self._item_bytes(key, kind))
        return struct.unpack(f"<{n_items}{_SCALARS[kind]}", raw)

    def _item_bytes(self, key: str, kind: int) -> int:
        if kind not in _SCALARS:  # arrays of arrays too: llama.cpp has none
            raise GgufError(f"{_shown(key)} has a value of an unknown type ({kind})")
        return struct.calcsize("<" + _SCALARS[kind])


def _read_tensors(source: _Bounded, n_tensors: int, alignment: int) -> tuple[GgufTensor, ...]:
    tensors: dict[str, GgufTensor] = {}
    end = 0
    for _ in range(n_tensors):
        tensor, offset = _read_tensor(source)
        if tensor.name in tensors:
            raise GgufError(f"the tensor {_shown(tensor.name)} is there twice")
        if offset % alignment:
            raise GgufError(f"the tensor {_shown(tensor.name)} is not aligned")
        tensors[tensor.name] = tensor
        end = max(end, offset + tensor.size_bytes)
    data_start = -(-source.position // alignment) * alignment
    if data_start + end > source.size:
        raise GgufError(f"the file is truncated: its tensors end at {data_start + end}, it has {source.size} bytes")
    if data_start + sum(tensor.size_bytes for tensor in tensors.values()) > source.size:
        raise GgufError("the tensors overlap: together they are larger than the file")
    return tuple(tensors.values())


def _read_tensor(source: _Bounded) -> tuple[GgufTensor, int]:
    """One tensor and the offset of its data after the header."""
    name = _text(source.string(_NAME_BYTES_MAX, "a tensor's name"), "a tensor's name")
    n_dims = source.number("I")
    if n_dims > _DIMS_MAX:
        raise GgufError(f"the tensor {_shown(name)} claims {n_dims} dimensions")
    shape = tuple(source.number("Q") for _ in range(n_dims))
    kind, offset = source.number("I"), source.number("Q")
    if kind not in TENSOR_TYPES:
        raise GgufError(f"the tensor {_shown(name)} has an unknown type ({kind})")
    type_name, block_items, block_bytes = TENSOR_TYPES[kind]
    n_items = 1
    for length in shape:
        n_items *= length
    if shape and shape[0] % block_items:
        raise GgufError(f"the rows of the tensor {_shown(name)} are not whole blocks of {type_name}")
    return GgufTensor(name, type_name, shape, n_items // block_items * block_bytes), offset


def _text(raw: bytes, what: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise GgufError(f"{_shown(what)} is not valid UTF-8") from error


def _shown(name: str) -> str:
    """A name out of the file, fit for a message: short and printable."""
    return repr(name[:80])
