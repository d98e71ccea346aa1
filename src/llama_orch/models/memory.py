"""How much memory a model will take, told from its header before anything is loaded (HP-PLC-5).

Four parts, as llama.cpp counts them: weights, KV cache, the scratch of one step (its compute buffer), and what the
process takes beside its buffers. Weights and KV follow llama.cpp's own rules; the scratch is fitted to what build 11549
reports (`benchmarks/memory.py` compares). Where an architecture is not covered the answer is an upper estimate and says
so; `calibration.py` corrects by what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

from llama_orch.models.gguf import GgufError, GgufHeader, GgufTensor
from llama_orch.models.pooling import ENCODERS, Purpose, purpose
from llama_orch.workers.llamacpp import BATCH_CPU, BATCH_GPU

KvType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
Backend = Literal["cpu", "cuda"]

# Device memory of one process on a card beside llama.cpp's buffers: driver context, kernels, cuBLAS. The figure is
# taken from reports (300 to 500 MiB) and stays until a card has been measured; calibration replaces it.
CUDA_CONTEXT_BYTES = 450 << 20

# llama.cpp rounds each sequence's context, and the cache of windowed layers, up to whole multiples of this.
CONTEXT_PAD_TOKENS = 256
# Items in a block, bytes of a block.
KV_TYPES: Mapping[KvType, tuple[int, int]] = {
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q8_0": (32, 34),
    "q5_1": (32, 24),
    "q5_0": (32, 22),
    "q4_1": (32, 20),
    "q4_0": (32, 18),
}
# The CPU backend keeps a second, repacked copy of matrices of these types: x86 with AVX2, which is what the wheels are
# built for (measured). ARM builds repack more, builds with AVX-512 also Q2_K.
REPACKED_TYPES = frozenset({"Q4_0", "Q4_K", "IQ4_NL", "MXFP4"})
_REPACK_ROWS = 8

_LAYERS_MAX = 512  # llama.cpp's own limit
_VALUE_MAX = 1 << 24  # of any single length or count in a header
_F32_BYTES, _F16_BYTES = 4, 2
# Residual stream, step input, normed copies and the gaps between them, in rows of the embedding's width (measured).
_STREAM_ROWS = 5

# Every n-th layer sees everything, the others a window. As llama.cpp has it, where the file does not say.
_WINDOW_PERIODS = {"gemma2": 2, "gemma3": 6, "gpt-oss": 2, "cohere2": 4}
_WINDOW_IGNORED = frozenset({"llama", "phi3"})  # llama.cpp gives them a full cache whatever the file says
_UNCERTAIN = frozenset({"eurobert", "gemma-embedding", "modern-bert", "t5", "t5encoder"})
_WITHOUT_KV = (ENCODERS - _UNCERTAIN) | {"dream", "llada", "llada-moe"}  # they read a whole batch and keep nothing
_INPUT_TENSORS = frozenset(
    {"token_embd.weight", "position_embd.weight", "token_types.weight", "per_layer_token_embd.weight"}
)  # on the host even when every layer is on a card


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """What decides, beside the file, how much memory a worker takes. `ctx` is in tokens per slot, `ubatch` in tokens
    that are evaluated at once (None: what our worker pins; a whole input where a model embeds or ranks)."""

    ctx: int
    slots: int = 1
    kv_type: KvType = "f16"
    ubatch: int | None = None
    flash_attention: bool = True
    backend: Backend = "cpu"

    def __post_init__(self) -> None:
        if min(self.ctx, self.slots, 1 if self.ubatch is None else self.ubatch) < 1:
            raise ValueError("ctx, slots and ubatch are at least 1")
        if self.kv_type not in KV_TYPES:
            raise ValueError(f"the KV cache cannot be {self.kv_type!r}; it can be {', '.join(KV_TYPES)}")

    @property
    def cells(self) -> int:
        """Tokens that one slot's cache holds."""
        return _padded(self.ctx, CONTEXT_PAD_TOKENS)

    @property
    def step(self) -> int:
        """Tokens of the largest step."""
        pinned = BATCH_GPU if self.backend == "cuda" else BATCH_CPU
        return min(self.ubatch or pinned, self.ctx * self.slots)


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes on the device that runs the model: VRAM for cuda, host memory for cpu.

    `weights_bytes` includes repacked copies on a CPU and leaves out, on a card, what stays in host memory.
    `compute_bytes` is the scratch of the largest step, on a CPU with the buffer of results. `overhead_bytes` is what a
    process takes on a card beside its buffers (0 on a CPU, where an interpreter is no matter). `is_certain` is False
    where the architecture is not covered by measurements: then it is an upper estimate rather than a forecast.
    """

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    overhead_bytes: int
    total_bytes: int
    is_certain: bool = True


@dataclass(frozen=True, slots=True)
class _Layer:
    """Widths of one layer, in values per token."""

    query: int
    key: int
    value: int
    heads: int
    is_windowed: bool
    is_recurrent: bool


@dataclass(frozen=True, slots=True)
class _Model:
    """What the formulas need of a header."""

    embedding: int
    layers: tuple[_Layer, ...]
    window: int  # tokens; 0: no layer has one
    state_values: int  # of one recurrent layer and slot
    latent_query: int  # MLA: values per token of the query before it is projected, else 0
    has_kv: bool
    is_certain: bool


def memory_need(header: GgufHeader, settings: LoadSettings) -> MemoryNeed:
    """What loading the file with these settings takes, in bytes. GgufError where the header lacks a figure."""
    model, is_whole = _model(header), purpose(header) is not Purpose.COMPLETION
    settings = replace(settings, ubatch=settings.ctx) if is_whole and settings.ubatch is None else settings
    weights = _weights_on_card(header) if settings.backend == "cuda" else _weights_on_cpu(header)
    kv = _kv_bytes(model, settings)
    compute = _compute_bytes(header, model, settings)
    overhead = CUDA_CONTEXT_BYTES if settings.backend == "cuda" else 0
    return MemoryNeed(weights, kv, compute, overhead, weights + kv + compute + overhead, model.is_certain)


# --- the header's figures ---------------------------------------------------------------------------------------------


class _Figures:
    """Reads `<architecture>.<key>` with every value checked."""

    def __init__(self, header: GgufHeader) -> None:
        self._architecture = header.architecture
        self._kv = header.kv

    def has(self, key: str) -> bool:
        return f"{self._architecture}.{key}" in self._kv

    def one(self, key: str, missing: int | None = None) -> int:
        """A whole number; without `missing` the file has to state it."""
        value = self._kv.get(f"{self._architecture}.{key}", missing)
        if value is None:
            raise GgufError(f"the header does not state {self._architecture}.{key}: its memory cannot be estimated")
        return self._checked(key, value)

    def each(self, key: str, n_layers: int, missing: int | None = None) -> tuple[int, ...]:
        """One number for each layer, whether the file states one for all or a list."""
        value = self._kv.get(f"{self._architecture}.{key}", missing)
        if not isinstance(value, tuple):
            return (self.one(key, missing),) * n_layers
        if len(value) < n_layers:
            raise GgufError(f"{self._architecture}.{key} has {len(value)} values for {n_layers} layers")
        return tuple(self._checked(key, one) for one in value[:n_layers])

    def is_list(self, key: str) -> bool:
        return isinstance(self._kv.get(f"{self._architecture}.{key}"), tuple)

    def _checked(self, key: str, value: object) -> int:
        if not isinstance(value, int) or not 0 <= value <= _VALUE_MAX:
            raise GgufError(f"{self._architecture}.{key} is not a reasonable count")
        return int(value)


def _model(header: GgufHeader) -> _Model:
    if header.is_split:
        raise GgufError("the model is one part of a split GGUF: its memory cannot be told from one part")
    figures, architecture = _Figures(header), header.architecture
    n_layers, embedding = figures.one("block_count"), figures.one("embedding_length")
    if not 1 <= n_layers <= _LAYERS_MAX or not embedding:
        raise GgufError(f"a model of {n_layers} layers of width {embedding} cannot be estimated")
    if not any(tensor.name.startswith("blk.") for tensor in header.tensors):
        raise GgufError("the file has no layers' tensors: its memory cannot be estimated")
    window, windowed, is_window_known = _windows(figures, architecture, n_layers)
    state_values, recurrent = _recurrence(figures, n_layers)
    layers = _layers(figures, embedding, windowed, recurrent)
    is_latent = figures.has("attention.key_length_mla")
    if is_latent:  # the cache holds one latent per token, and the values are read out of it
        layers = tuple(replace(layer, value=0) for layer in layers)
    unusual = ("attention.shared_kv_layers", "nextn_predict_layers", "ssm.inner_size", "wkv.head_size")
    is_old_latent = figures.has("attention.kv_lora_rank") and not is_latent
    is_unusual = is_old_latent or any(figures.has(key) for key in unusual)
    return _Model(
        embedding=embedding,
        layers=layers,
        window=window,
        state_values=state_values,
        latent_query=max(layer.heads for layer in layers) * figures.one("attention.key_length_mla", 0),
        has_kv=architecture not in _WITHOUT_KV,
        is_certain=is_window_known and architecture not in _UNCERTAIN and not is_unusual,
    )


def _layers(
    figures: _Figures, embedding: int, windowed: tuple[bool, ...], recurrent: tuple[bool, ...]
) -> tuple[_Layer, ...]:
    """The layers' attention. Only a model with a recurrent state may state no heads."""
    n_layers = len(windowed)
    heads = figures.each("attention.head_count", n_layers, missing=0 if any(recurrent) else None)
    has_groups = figures.has("attention.head_count_kv")
    heads_kv = figures.each("attention.head_count_kv", n_layers) if has_groups else heads
    default = embedding // max(*heads, 1)
    key, value = figures.one("attention.key_length", default), figures.one("attention.value_length", default)
    windowed_key = figures.one("attention.key_length_swa", key)
    windowed_value = figures.one("attention.value_length_swa", value)
    layers = []
    for i in range(n_layers):
        wide, high = (windowed_key, windowed_value) if windowed[i] else (key, value)
        cached = heads_kv[i] if all(recurrent) or not recurrent[i] else 0  # where all are, each has both or no heads
        layers.append(_Layer(heads[i] * wide, cached * wide, cached * high, heads[i], windowed[i], recurrent[i]))
    return tuple(layers)


def _windows(figures: _Figures, architecture: str, n_layers: int) -> tuple[int, tuple[bool, ...], bool]:
    """The window in tokens, which layers have it, and whether that is how llama.cpp sees it.

    Unknown patterns count as full caches, which are never smaller.
    """
    window = figures.one("attention.sliding_window", 0)
    if not window or architecture in _WINDOW_IGNORED:
        return 0, (False,) * n_layers, True
    key = "attention.sliding_window_pattern"
    pattern = figures.each(key, n_layers, missing=_WINDOW_PERIODS.get(architecture, 0))
    if figures.is_list(key):
        return window, tuple(bool(one) for one in pattern), True
    if architecture not in _WINDOW_PERIODS:
        return 0, (False,) * n_layers, False
    period = pattern[0]
    return window, tuple(not period or i % period < period - 1 for i in range(n_layers)), True


def _recurrence(figures: _Figures, n_layers: int) -> tuple[int, tuple[bool, ...]]:
    """The values of one layer's state, and which layers keep one (Mamba and the hybrids with attention)."""
    inner = figures.one("ssm.inner_size", 0)
    if not inner:
        return 0, (False,) * n_layers
    state, groups = figures.one("ssm.state_size"), figures.one("ssm.group_count", 0)
    values = (figures.one("ssm.conv_kernel") - 1) * (inner + 2 * groups * state) + state * inner
    interval = figures.one("full_attention_interval", 0)
    if interval:
        return values, tuple((i + 1) % interval != 0 for i in range(n_layers))
    heads_kv = figures.each("attention.head_count_kv", n_layers, missing=0)
    is_mixed = any(heads_kv) and 0 in heads_kv
    return values, tuple(not is_mixed or not one for one in heads_kv)


# --- weights ----------------------------------------------------------------------------------------------------------


def _weights_on_card(header: GgufHeader) -> int:
    """All layers on the card. The embeddings stay in host memory, but a shared output matrix is copied to the card."""
    names = {tensor.name for tensor in header.tensors}
    on_host = _INPUT_TENSORS - ({"token_embd.weight"} if _is_tied(names) else set())
    return sum(_stored(header, tensor) for tensor in header.tensors if tensor.name not in on_host)


def _weights_on_cpu(header: GgufHeader) -> int:
    """What is mapped, from the first to the last tensor that is used as it is in the file, and the repacked copies."""
    is_tied = _is_tied({tensor.name for tensor in header.tensors})
    ends = list(accumulate(_stored(header, tensor) for tensor in header.tensors))
    repacked, mapped_from, mapped_to = 0, -1, 0
    for tensor, end in zip(header.tensors, ends, strict=True):
        is_shared = is_tied and tensor.name == "token_embd.weight"
        if _is_repacked(tensor) or (is_shared and tensor.type in REPACKED_TYPES):
            repacked += tensor.size_bytes
            if not is_shared:
                continue
        mapped_from = end - _stored(header, tensor) if mapped_from < 0 else mapped_from
        mapped_to = end
    return repacked + mapped_to - max(mapped_from, 0)


def _is_repacked(tensor: GgufTensor) -> bool:
    """Whether the CPU backend keeps a second copy: matrices that are multiplied with, and banks of experts."""
    if tensor.type not in REPACKED_TYPES or tensor.name in _INPUT_TENSORS:
        return False
    is_matrix = len(tensor.shape) == 2 or (len(tensor.shape) == 3 and "_exps." in tensor.name)
    return is_matrix and tensor.shape[1] % _REPACK_ROWS == 0


def _is_tied(names: set[str]) -> bool:
    """Whether the output matrix is the embeddings' one. Encoders have neither an output nor its norm."""
    return "output.weight" not in names and "output_norm.weight" in names


def _stored(header: GgufHeader, tensor: GgufTensor) -> int:
    alignment = header.kv.get("general.alignment", 32)
    return _padded(tensor.size_bytes, alignment if isinstance(alignment, int) else 32)


# --- KV cache and state -----------------------------------------------------------------------------------------------


def _kv_bytes(model: _Model, settings: LoadSettings) -> int:
    """The caches of all slots, and the states of recurrent layers, which are F32."""
    states = sum(layer.is_recurrent for layer in model.layers) * model.state_values * _F32_BYTES * settings.slots
    if not model.has_kv:
        return states
    block_items, block_bytes = KV_TYPES[settings.kv_type]
    caches = sum(
        _cells(model, layer, settings) * -(-width // block_items) * block_bytes * settings.slots
        for layer in model.layers
        for width in (layer.key, layer.value)
    )
    return states + caches


def _cells(model: _Model, layer: _Layer, settings: LoadSettings) -> int:
    """Tokens that a layer's cache holds for one slot. A window needs room for the step that is written into it."""
    if not model.has_kv:
        return settings.step
    if not layer.is_windowed:
        return settings.cells
    return _padded(min(settings.cells, model.window + settings.step), CONTEXT_PAD_TOKENS)


# --- scratch of one step ----------------------------------------------------------------------------------------------


def _compute_bytes(header: GgufHeader, model: _Model, settings: LoadSettings) -> int:
    """What is alive at the worst moment of one step: in the feed-forward part, or in attention.

    Fitted to what llama.cpp's graph allocator reserves. Without flash attention the scores of all heads exist at once
    and the masks are F32. Logits exist for one token per slot only.
    """
    row = settings.step * _F32_BYTES
    mask_bytes = _F16_BYTES if settings.flash_attention else _F32_BYTES
    masks = (
        settings.step
        * mask_bytes
        * sum({layer.is_windowed: _cells(model, layer, settings) for layer in model.layers}.values())
    )
    attention = max(_attention_bytes(model, layer, settings) for layer in model.layers)
    results = settings.slots * header.vocab_size * _F32_BYTES if settings.backend == "cpu" else 0
    return row * _STREAM_ROWS * model.embedding + masks + max(attention, row * _feed_forward(header, model)) + results


def _attention_bytes(model: _Model, layer: _Layer, settings: LoadSettings) -> int:
    """Queries twice (before and after rotation). Keys and values fit in gaps as long as they are narrow."""
    row = settings.step * _F32_BYTES
    wide = 2 * layer.query + model.latent_query
    if not settings.flash_attention:
        return row * (wide + layer.key + layer.value + layer.heads * _cells(model, layer, settings))
    return row * (wide + (layer.key + layer.value if layer.key > model.embedding else 0))


def _feed_forward(header: GgufHeader, model: _Model) -> int:
    """Values per token in the widest feed-forward part. The last layer works on one token per slot: it never counts."""
    last = f"blk.{len(model.layers) - 1}."
    parts: dict[tuple[str, bool], dict[str, GgufTensor]] = {}
    for tensor in header.tensors:
        block, _, kind = tensor.name.removesuffix(".weight").rpartition(".ffn_")
        name = kind.removesuffix("_exps")
        if name in ("gate", "up", "gate_up", "down") and len(tensor.shape) > 1 and not tensor.name.startswith(last):
            parts.setdefault((block, name != kind), {})[name] = tensor
    used = _Figures(header).one("expert_used_count") if any(is_bank for _, is_bank in parts) else 0
    widths = [
        _experts(part, used, model.embedding) if is_bank else _dense(part) for (_, is_bank), part in parts.items()
    ]
    return max(widths, default=0)


def _dense(part: Mapping[str, GgufTensor]) -> int:
    """Both inputs of the gate and its result; without a gate the activation works in place."""
    inner = part["down"].shape[0] if "down" in part else 0
    inputs = sum(part[name].shape[1] for name in ("gate", "up", "gate_up") if name in part)
    return inner if inputs == inner else inputs + inner


def _experts(part: Mapping[str, GgufTensor], used: int, embedding: int) -> int:
    """The same for each expert in use; then their outputs, which go where the gate's inputs were if they fit there."""
    inner, outputs = used * _dense(part), used * embedding
    width = used * (part["down"].shape[0] if "down" in part else 0)
    if width <= embedding:
        return max(inner, outputs)
    return inner + outputs if inner - width < outputs else inner


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
