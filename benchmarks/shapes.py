"""Model files of random weights in the shapes of published models, for benchmarks: `write` makes one.

Needs the dependency group `bench`. The files load and compute like the real ones, and say nothing: what is measured on
them is memory and speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Quant

POOL_BLOCKS = 1 << 16
# Where a block keeps its scales, which are f16 and have to be finite.
SCALES = {Quant.Q4_0: (0,), Quant.Q8_0: (0,), Quant.Q4_K: (0, 2), Quant.Q2_K: (80, 82), Quant.MXFP4: ()}


@dataclass(frozen=True)
class Family:
    """The shape of a published model, scaled as it says."""

    name: str
    arch: str
    scaled: str
    quant: Quant
    layers: int
    width: int
    heads: int
    heads_kv: int
    inner: int  # width of the feed-forward part, of one expert where there are experts
    vocab: int
    head: int = 0  # explicit length of a head
    experts: int = 0
    experts_used: int = 0
    window: int = 0
    is_tied: bool = False
    settings: tuple[tuple[int, int], ...] = ((4096, 1), (16384, 1), (8192, 4))  # tokens per slot, slots

    @property
    def head_length(self) -> int:
        return self.head or self.width // self.heads


FAMILIES = (
    Family("Llama 3 8B", "llama", "4 of 32 layers, 32k of 128k tokens", Quant.Q4_K, 4, 4096, 32, 8, 14336, 32768),
    Family(
        "Qwen3 4B", "qwen3", "4 of 36 layers, 32k of 152k tokens", Quant.Q8_0, 4, 2560, 32, 8, 9728, 32768,
        head=128, is_tied=True,
    ),
    Family(
        "Gemma 3 4B", "gemma3", "8 of 34 layers, 32k of 262k tokens", Quant.Q4_0, 8, 2560, 8, 4, 10240, 32768,
        head=256, window=1024, is_tied=True,
    ),
    Family("Phi-3 mini", "phi3", "6 of 32 layers", Quant.Q4_K, 6, 3072, 32, 32, 8192, 32064),
    Family(
        "Qwen3 30B-A3B", "qwen3moe", "3 of 48 layers, 16k of 152k tokens", Quant.Q2_K, 3, 2048, 32, 4, 768, 16384,
        head=128, experts=128, experts_used=8,
    ),
    Family(
        "gpt-oss 20B", "gpt-oss", "4 of 24 layers, 8 of 32 experts, 8k of 201k tokens", Quant.MXFP4, 4, 2880, 64, 8,
        2880, 8192, head=64, experts=8, experts_used=4, window=128,
    ),
    Family("Llama 3 70B", "llama", "2 of 80 layers, 8k of 128k tokens", Quant.Q2_K, 2, 8192, 64, 8, 28672, 8192),
    Family(
        "bge-base (encoder)", "bert", "not scaled", Quant.F16, 12, 768, 12, 12, 3072, 30522,
        settings=((512, 1), (512, 4), (256, 2)),
    ),
)  # fmt: skip

# As large as a card is for: all layers and all tokens, but for the last one.
FULL_SIZE = (
    Family("Llama 3 8B", "llama", "not scaled", Quant.Q4_K, 32, 4096, 32, 8, 14336, 128256),
    Family(
        "Qwen3 4B", "qwen3", "not scaled", Quant.Q8_0, 36, 2560, 32, 8, 9728, 151936, head=128, is_tied=True
    ),
    Family("Llama 3 70B", "llama", "16 of 80 layers", Quant.Q2_K, 16, 8192, 64, 8, 28672, 128256),
)  # fmt: skip

Tensor = tuple[str, tuple[int, ...], Quant]


def tensors(family: Family) -> Iterator[Tensor]:
    """Every tensor of the file: name, shape with the rows first, type."""
    # gpt-oss keeps everything but its experts in a larger type.
    outer = Quant.Q8_0 if family.quant == Quant.MXFP4 else family.quant
    width = family.width
    yield "token_embd.weight", (family.vocab, width), outer
    if family.arch == "bert":
        yield from (("position_embd.weight", (512, width), Quant.F32), ("token_types.weight", (2, width), Quant.F32))
        yield from norm("token_embd_norm", width, has_bias=True)
    else:
        yield from norm("output_norm", width)
        if not family.is_tied:
            yield "output.weight", (family.vocab, width), outer
    for i in range(family.layers):
        for name, shape, kind in (*attention(family, outer), *feed_forward(family)):
            yield f"blk.{i}.{name}", shape, kind


def norm(name: str, width: int, has_bias: bool = False) -> Iterator[Tensor]:
    yield f"{name}.weight", (width,), Quant.F32
    if has_bias:
        yield f"{name}.bias", (width,), Quant.F32


def attention(family: Family, quant: Quant) -> Iterator[Tensor]:
    width, query, kv = family.width, family.heads * family.head_length, family.heads_kv * family.head_length
    has_bias = family.arch in ("bert", "gpt-oss")
    if family.arch != "bert":
        yield from norm("attn_norm", width)
    if family.arch == "phi3":
        yield "attn_qkv.weight", (query + 2 * kv, width), quant
    for name, rows in (("attn_q", query), ("attn_k", kv), ("attn_v", kv)) if family.arch != "phi3" else ():
        yield f"{name}.weight", (rows, width), quant
        if has_bias:
            yield f"{name}.bias", (rows,), Quant.F32
    yield "attn_output.weight", (width, query), quant
    if has_bias:
        yield "attn_output.bias", (width,), Quant.F32
    if family.arch in ("qwen3", "qwen3moe", "gemma3"):
        yield from (*norm("attn_q_norm", family.head_length), *norm("attn_k_norm", family.head_length))
    if family.arch == "gpt-oss":
        yield "attn_sinks.weight", (family.heads,), Quant.F32
    if family.arch in ("gemma3", "gpt-oss"):
        yield from norm("post_attention_norm", width)
    if family.arch == "bert":
        yield from norm("attn_output_norm", width, has_bias=True)


def feed_forward(family: Family) -> Iterator[Tensor]:
    width, inner, quant = family.width, family.inner, family.quant
    if family.arch not in ("bert", "gpt-oss"):
        yield from norm("ffn_norm", width)
    if family.experts:
        yield "ffn_gate_inp.weight", (family.experts, width), Quant.F32
        has_bias = family.arch == "gpt-oss"
        if has_bias:
            yield "ffn_gate_inp.bias", (family.experts,), Quant.F32
        for name, shape in (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner))):
            yield f"ffn_{name}_exps.weight", (family.experts, *shape), quant
            if has_bias:
                yield f"ffn_{name}_exps.bias", (family.experts, shape[0]), Quant.F32
        return
    if family.arch not in ("bert", "phi3"):
        yield "ffn_gate.weight", (inner, width), quant
    yield "ffn_up.weight", ((2 if family.arch == "phi3" else 1) * inner, width), quant
    yield "ffn_down.weight", (width, inner), quant
    if family.arch == "bert":
        yield from (("ffn_up.bias", (inner,), Quant.F32), ("ffn_down.bias", (width,), Quant.F32))
        yield from norm("layer_output_norm", width, has_bias=True)
    if family.arch == "gemma3":
        yield from norm("post_ffw_norm", width)


def write(family: Family, path: Path) -> None:
    """The whole file, tensor by tensor, so that it never is in memory as a whole."""
    writer = gguf.GGUFWriter(path, family.arch)
    describe(writer, family)
    parts = list(tensors(family))
    for name, shape, quant in parts:
        items, size = gguf.GGML_QUANT_SIZES[quant]
        row = (*shape[:-1], shape[-1] // items * size)
        kind = {Quant.F32: np.float32, Quant.F16: np.float16}.get(quant, np.uint8)
        stored = row if kind is np.uint8 else shape
        writer.add_tensor_info(name, stored, np.dtype(kind), int(np.prod(row)), raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    pools: dict[Quant, np.ndarray] = {}
    for _, shape, quant in parts:
        if quant not in pools:
            pools[quant] = pool(quant)
        items, size = gguf.GGML_QUANT_SIZES[quant]
        writer.write_tensor_data(np.resize(pools[quant], int(np.prod(shape)) // items * size))
    writer.close()


def pool(quant: Quant) -> np.ndarray:
    """Bytes of random, valid blocks; tensors repeat them."""
    random = np.random.default_rng(20240418)
    if quant == Quant.F32:
        return np.ones(POOL_BLOCKS, dtype=np.float32).view(np.uint8)
    if quant == Quant.F16:
        return (random.standard_normal(POOL_BLOCKS) / 32).astype(np.float16).view(np.uint8)
    blocks = random.integers(0, 256, (POOL_BLOCKS, gguf.GGML_QUANT_SIZES[quant][1]), dtype=np.uint8)
    for offset in SCALES[quant]:
        blocks[:, offset : offset + 2] = np.frombuffer(np.float16(0.001).tobytes(), dtype=np.uint8)
    if quant == Quant.MXFP4:
        blocks[:, 0] = 118  # the block's exponent
    return blocks.reshape(-1)


def describe(writer: gguf.GGUFWriter, family: Family) -> None:
    """Metadata as the published files have it, and a vocabulary of made-up words."""
    is_bert = family.arch == "bert"
    writer.add_name("random weights")  # llama.cpp looks for some families' names in here
    writer.add_context_length(512 if is_bert else 131072)
    writer.add_embedding_length(family.width)
    writer.add_block_count(family.layers)
    writer.add_feed_forward_length(family.inner)
    writer.add_head_count(family.heads)
    writer.add_head_count_kv(family.heads_kv)
    writer.add_vocab_size(family.vocab)
    if family.head:
        writer.add_key_length(family.head)
        writer.add_value_length(family.head)
    if family.window:
        writer.add_sliding_window(family.window)
    if family.experts:
        writer.add_expert_count(family.experts)
        writer.add_expert_used_count(family.experts_used)
        writer.add_expert_feed_forward_length(family.inner)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] if is_bert else ["<unk>", "<s>", "</s>"]
    kinds = [gguf.TokenType.CONTROL] * len(words)
    if is_bert:
        writer.add_layer_norm_eps(1e-12)
        writer.add_causal_attention(False)
        writer.add_pooling_type(gguf.PoolingType.CLS)
        writer.add_token_type_count(2)
        writer.add_unk_token_id(1)
        writer.add_sep_token_id(3)
    else:
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_dimension_count(family.head_length)
        words += [f"<0x{byte:02X}>" for byte in range(256)]
        kinds += [gguf.TokenType.BYTE] * 256
    words += [f"\N{LOWER ONE EIGHTH BLOCK}w{number:x}" for number in range(family.vocab - len(words))]
    writer.add_tokenizer_model("bert" if is_bert else "llama")
    writer.add_token_list(words)
    writer.add_token_scores([-float(number) for number in range(family.vocab)])
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * (family.vocab - len(kinds)))
