"""Small encoders with random weights, written as GGUF: what embeds, what ranks, and a decoder that pools.

The same name gives the same bytes. They say nothing of what texts mean; but they are read, tokenized and evaluated by
the engines like the published ones.
"""

from __future__ import annotations

import random
import string
import struct
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import llama_orch

WIDTH, HEADS, INNER, LAYERS = 32, 2, 64, 2
CTX = 512  # tokens
MEAN, CLS, LAST, RANK = 1, 2, 3, 4

_F32, _U32, _BOOL, _STRING, _ARRAY, _I32 = 6, 4, 7, 8, 9, 5
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_WORDS = ("the", "fox", "dog", "house", "river", "is", "red", "old", "small", "sea", "night")
_CHARS = string.ascii_lowercase + string.digits + string.punctuation
VOCABULARY = (*_SPECIAL, *(f"\u2581{word}" for word in (*_WORDS, *_CHARS)), *_CHARS)

Tensor = tuple[str, tuple[int, ...]]
TINY = Path(llama_orch.__file__).parent / "models" / "tiny.gguf"


def an_encoder(path: Path, pooling: int | None = CLS, ctx: int = CTX, layers: int = LAYERS) -> Path:
    """A BERT. `pooling` RANK makes it a reranker; None leaves unsaid how it pools."""
    pairs = [
        _text("general.architecture", "bert"),
        _text("general.name", path.stem),
        *(_number(f"bert.{name}", value) for name, value in _shape(ctx, layers).items()),
        _key("bert.attention.layer_norm_epsilon", _F32) + struct.pack("<f", 1e-12),
        _key("bert.attention.causal", _BOOL) + b"\0",
        _text("tokenizer.ggml.model", "bert"),
        _number("tokenizer.ggml.token_type_count", 2),
        _texts("tokenizer.ggml.tokens", VOCABULARY),
        _numbers("tokenizer.ggml.token_type", [3] * len(_SPECIAL) + [1] * (len(VOCABULARY) - len(_SPECIAL))),
        *(_number(f"tokenizer.ggml.{name}_token_id", i) for name, i in _IDS.items()),
    ]
    if pooling is not None:
        pairs.append(_number("bert.pooling_type", pooling))
    tensors = [*_tensors(ctx, layers), *(_HEAD if pooling == RANK else ())]
    path.write_bytes(_file(pairs, tensors, random.Random(path.stem)))
    return path


def a_pooling_decoder(path: Path, pooling: int = LAST) -> Path:
    """The packaged model, as if it had been trained to embed."""
    data = TINY.read_bytes()
    version, n_tensors, n_pairs = struct.unpack_from("<IQQ", data, 4)
    added = _number("llama.pooling_type", pooling)
    # Of a length that leaves the tensors' data where it is aligned.
    blank = 32 - (len(added) + len(_text("general.padding", ""))) % 32
    added += _text("general.padding", " " * blank)
    path.write_bytes(data[:4] + struct.pack("<IQQ", version, n_tensors, n_pairs + 2) + added + data[24:])
    return path


_IDS = {"unknown": 1, "cls": 2, "bos": 2, "seperator": 3, "eos": 3, "padding": 0}
_HEAD: tuple[Tensor, ...] = (
    ("cls.weight", (WIDTH, WIDTH)),
    ("cls.bias", (WIDTH,)),
    ("cls.output.weight", (1, WIDTH)),
    ("cls.output.bias", (1,)),
)


def _shape(ctx: int, layers: int) -> dict[str, int]:
    return {
        "context_length": ctx,
        "embedding_length": WIDTH,
        "block_count": layers,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "vocab_size": len(VOCABULARY),
    }


def _tensors(ctx: int, layers: int) -> Iterator[Tensor]:
    yield from (("token_embd.weight", (len(VOCABULARY), WIDTH)), ("position_embd.weight", (ctx, WIDTH)))
    yield from (("token_types.weight", (2, WIDTH)), *_pair("token_embd_norm", WIDTH))
    for i in range(layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            yield from _pair(f"blk.{i}.{name}", WIDTH, WIDTH)
        yield from _pair(f"blk.{i}.attn_output_norm", WIDTH)
        yield from _pair(f"blk.{i}.ffn_up", INNER, WIDTH)
        yield from _pair(f"blk.{i}.ffn_down", WIDTH, INNER)
        yield from _pair(f"blk.{i}.layer_output_norm", WIDTH)


def _pair(name: str, *shape: int) -> tuple[Tensor, Tensor]:
    return (f"{name}.weight", shape), (f"{name}.bias", shape[:1])


def _file(pairs: Sequence[bytes], tensors: Sequence[Tensor], dice: random.Random) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join(pairs)
    data = b""
    for name, shape in tensors:
        count = 1
        for length in shape:
            count *= length
        is_norm = name.endswith("norm.weight")
        values = array("f", [1.0 if is_norm else dice.gauss(0.0, 0.3) for _ in range(count)])
        head += _string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += struct.pack("<IQ", 0, len(data))
        data += values.tobytes().ljust(-(-count * 4 // 32) * 32, b"\0")
    return head.ljust(-(-len(head) // 32) * 32, b"\0") + data


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _key(name: str, kind: int) -> bytes:
    return _string(name) + struct.pack("<I", kind)


def _text(name: str, value: str) -> bytes:
    return _key(name, _STRING) + _string(value)


def _number(name: str, value: int) -> bytes:
    return _key(name, _U32) + struct.pack("<I", value)


def _texts(name: str, values: Sequence[str]) -> bytes:
    return _key(name, _ARRAY) + struct.pack("<IQ", _STRING, len(values)) + b"".join(map(_string, values))


def _numbers(name: str, values: Sequence[int]) -> bytes:
    return _key(name, _ARRAY) + struct.pack("<IQ", _I32, len(values)) + struct.pack(f"<{len(values)}i", *values)
