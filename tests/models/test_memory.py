"""What a model will take, from its header: figures worked out by hand, what must always hold, and a real worker."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_orch.engines.base import ReplicaSpec
from llama_orch.engines.llamacpp import LlamaCppEngine
from llama_orch.engines.worker_log import WorkerLog
from llama_orch.models.gguf import GgufError, GgufHeader, GgufTensor, read_gguf_header
from llama_orch.models.gguf_types import TENSOR_TYPES
from llama_orch.models.memory import CUDA_CONTEXT_BYTES, KV_TYPES, Backend, KvType, LoadSettings, memory_need
from llama_orch.models.references import resolve
from llama_orch.workers.llamacpp import BATCH_CPU, BATCH_GPU
from tests.encoders import RANK, a_pooling_decoder, an_encoder

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BLOCKS = {name: (items, size) for name, items, size in TENSOR_TYPES.values()}

Value = int | float | bool | str | tuple[int, ...]


def a_tensor(name: str, *shape: int, kind: str = "F16") -> GgufTensor:
    """The shape as a file has it: the length of a row first."""
    items, size = BLOCKS[kind]
    return GgufTensor(name, kind, shape, math.prod(shape) // items * size)


def a_header(architecture: str, kv: Mapping[str, Value | None], tensors: list[GgufTensor], vocab: int) -> GgufHeader:
    return GgufHeader(
        architecture=architecture,
        name="",
        context_length=0,
        block_count=0,
        embedding_length=0,
        vocab_size=vocab,
        tokenizer_model="llama",
        chat_template=None,
        file_type="unknown",
        tensor_types=frozenset(),
        size_bytes=0,
        weights_bytes=0,
        is_split=False,
        tensors=tuple(tensors),
        kv={f"{architecture}.{key}": value for key, value in kv.items() if value is not None},
    )


def a_model(
    architecture: str = "llama",
    *,
    layers: int = 2,
    width: int = 512,
    heads: int = 8,
    heads_kv: int | tuple[int, ...] = 2,
    inner: int = 1536,
    vocab: int = 2048,
    kind: str = "F16",
    experts: int = 0,
    is_tied: bool = False,
    tensors: list[GgufTensor] | None = None,
    **kv: Value | None,
) -> GgufHeader:
    """A model of the usual kind. Keywords with __ for a dot are keys of its header; None takes a key out."""
    parts = [a_tensor("token_embd.weight", width, vocab, kind=kind), a_tensor("output_norm.weight", width, kind="F32")]
    parts += [] if is_tied else [a_tensor("output.weight", width, vocab, kind=kind)]
    bank, more = ("_exps", (experts,)) if experts else ("", ())
    for i in range(layers):
        parts.append(a_tensor(f"blk.{i}.attn_norm.weight", width, kind="F32"))
        parts.append(a_tensor(f"blk.{i}.ffn_gate{bank}.weight", width, inner, *more, kind=kind))
        parts.append(a_tensor(f"blk.{i}.ffn_up{bank}.weight", width, inner, *more, kind=kind))
        parts.append(a_tensor(f"blk.{i}.ffn_down{bank}.weight", inner, width, *more, kind=kind))
    stated: dict[str, Value | None] = {
        "block_count": layers,
        "embedding_length": width,
        "attention.head_count": heads,
        "attention.head_count_kv": heads_kv,
    }
    stated |= {key.replace("__", "."): value for key, value in kv.items()}
    return a_header(architecture, stated, parts if tensors is None else tensors, vocab)


LLAMA_8B = a_model(layers=32, width=4096, heads=32, heads_kv=8, inner=14336, vocab=128256)
LLAMA_70B = a_model(layers=80, width=8192, heads=64, heads_kv=8, inner=28672, vocab=128256)
HEAD_128: dict[str, Value] = {"attention__key_length": 128, "attention__value_length": 128}
HEAD_256: dict[str, Value] = {"attention__key_length": 256, "attention__value_length": 256}
QWEN3_4B = a_model("qwen3", layers=36, width=2560, heads=32, heads_kv=8, inner=9728, vocab=151936, **HEAD_128)
GEMMA3_4B = a_model(
    "gemma3",
    layers=34,
    width=2560,
    heads=8,
    heads_kv=4,
    inner=10240,
    vocab=262208,
    is_tied=True,
    attention__sliding_window=1024,
    **HEAD_256,
)
QWEN3_30B = a_model(
    "qwen3moe",
    layers=48,
    width=2048,
    heads=32,
    heads_kv=4,
    inner=768,
    vocab=151936,
    experts=128,
    expert_used_count=8,
    **HEAD_128,
)
BERT_TENSORS = [
    a_tensor("token_embd.weight", 768, 30522),
    *(a_tensor(f"blk.{i}.ffn_up.weight", 768, 3072) for i in range(12)),
    *(a_tensor(f"blk.{i}.ffn_down.weight", 3072, 768) for i in range(12)),
]
BERT = a_model("bert", layers=12, width=768, heads=12, heads_kv=12, vocab=30522, tensors=BERT_TENSORS)
FAMILIES = {
    "Llama 3 8B": LLAMA_8B,
    "Llama 3 70B": LLAMA_70B,
    "Qwen3 4B": QWEN3_4B,
    "Gemma 3 4B": GEMMA3_4B,
    "Qwen3 30B-A3B": QWEN3_30B,
    "BERT": BERT,
}


@pytest.mark.parametrize(
    ("family", "ctx", "slots", "expected"),
    [
        ("Llama 3 8B", 8192, 1, 1 * GIB),  # 32 layers × 8 heads × 128 × 2 (K, V) × 2 bytes = 128 KiB per token
        ("Llama 3 8B", 8192, 4, 4 * GIB),
        ("Llama 3 70B", 32768, 1, 10 * GIB),  # 80 × 8 × 128 × 4 = 320 KiB per token
        ("Qwen3 4B", 32768, 1, 4608 * MIB),  # 36 × 8 × 128 × 4 = 144 KiB: not 2560 / 32 = 80 per head
        ("Qwen3 30B-A3B", 32768, 1, 3 * GIB),  # 48 × 4 × 128 × 4 = 96 KiB
        # 4 KiB per token and layer; 5 of 34 layers see everything, 29 see 1024 and hold a step of 512 with it.
        ("Gemma 3 4B", 32768, 1, (5 * 32768 + 29 * 1536) * 4 * KIB),
        ("Gemma 3 4B", 1024, 2, 34 * 1024 * 4 * KIB * 2),  # a window is never larger than the context
        ("BERT", 512, 4, 0),
    ],
)
def test_the_kv_cache_of_known_families(family: str, ctx: int, slots: int, expected: int) -> None:
    """Bytes of an F16 cache, from the published shapes."""
    need = memory_need(FAMILIES[family], LoadSettings(ctx, slots, ubatch=512))
    assert need.kv_bytes == expected
    assert need.is_certain


@pytest.mark.parametrize(
    ("family", "widths"),
    [
        ("Llama 3 8B", 5 * 4096 + 3 * 14336),  # stream, then gate, up and their product
        ("Llama 3 70B", 5 * 8192 + 3 * 28672),
        ("Qwen3 4B", 5 * 2560 + 3 * 9728),
        ("Gemma 3 4B", 5 * 2560 + 3 * 10240),
        ("Qwen3 30B-A3B", 5 * 2048 + 8 * (3 * 768 + 2048)),  # eight experts, whose outputs are too wide for the gaps
        ("BERT", 5 * 768 + 3072),  # no gate
    ],
)
def test_the_scratch_of_known_families(family: str, widths: int) -> None:
    """A step of 512 tokens in F32, the masks in F16, and one row of logits per slot."""
    header = FAMILIES[family]
    mask = {"Gemma 3 4B": 4096 + 1536, "BERT": 512}.get(family, 4096)
    expected = 512 * 4 * widths + 512 * 2 * mask + 2 * header.vocab_size * 4
    assert memory_need(header, LoadSettings(4096, slots=2, ubatch=512)).compute_bytes == expected


def test_scratch_where_attention_is_the_widest() -> None:
    """Many heads over a narrow feed-forward part: queries twice, keys and values where they are wide too."""
    narrow = a_model(heads=16, heads_kv=4, inner=64, **HEAD_128)
    wide = a_model(heads=16, heads_kv=16, inner=64, **HEAD_128)
    stream, mask, logits = 5 * 512, 512 * 2 * 512, 2048 * 4
    assert (
        memory_need(narrow, LoadSettings(512, ubatch=512)).compute_bytes == 2048 * (stream + 2 * 2048) + mask + logits
    )
    assert memory_need(wide, LoadSettings(512, ubatch=512)).compute_bytes == 2048 * (stream + 4 * 2048) + mask + logits


def test_scratch_without_flash_attention() -> None:
    """The scores of all heads exist at once and the mask is twice as wide: most of the scratch at a long context."""
    need = memory_need(a_model(), LoadSettings(4096, ubatch=512, flash_attention=False))
    widths = 5 * 512 + 2 * 512 + 2 * 128 + 8 * 4096
    assert need.compute_bytes == 512 * 4 * widths + 512 * 4 * 4096 + 2048 * 4


@pytest.mark.parametrize(
    ("used", "inner", "widths"),
    [(8, 64, 8 * 512), (8, 128, 8 * (3 * 128 + 512)), (8, 256, 8 * 3 * 256), (2, 1536, 2 * 3 * 1536)],
)
def test_the_experts_in_use_count(used: int, inner: int, widths: int) -> None:
    """As measured: the outputs alone where experts are tiny, then beside the inner values, then in their place."""
    need = memory_need(a_model(experts=16, inner=inner, expert_used_count=used), LoadSettings(512, ubatch=512))
    assert need.compute_bytes == 512 * 4 * (5 * 512 + widths) + 512 * 2 * 512 + 2048 * 4


@pytest.mark.parametrize("kv_type", list(KV_TYPES))
def test_the_type_of_the_cache(kv_type: KvType) -> None:
    """Blocks of 32 with their scales, against two bytes per value."""
    items, size = KV_TYPES[kv_type]
    plain = memory_need(LLAMA_8B, LoadSettings(4096)).kv_bytes
    assert memory_need(LLAMA_8B, LoadSettings(4096, kv_type=kv_type)).kv_bytes * items * 2 == plain * size


def test_steps_are_those_of_our_worker() -> None:
    """Where no step is given, the size that the worker pins for its backend."""
    host, card = LoadSettings(4096), LoadSettings(4096, backend="cuda")
    assert memory_need(LLAMA_8B, host) == memory_need(LLAMA_8B, replace(host, ubatch=BATCH_CPU))
    assert memory_need(LLAMA_8B, card) == memory_need(LLAMA_8B, replace(card, ubatch=BATCH_GPU))


def test_contexts_are_padded() -> None:
    """llama.cpp grants whole multiples of 256 tokens per slot."""
    assert memory_need(LLAMA_8B, LoadSettings(300, 3)) == memory_need(LLAMA_8B, LoadSettings(512, 3))
    assert memory_need(LLAMA_8B, LoadSettings(513)).kv_bytes == 768 * 128 * KIB


def test_weights_on_a_cpu() -> None:
    """Mapped from the first tensor to the last that is used as it is; matrices of some types once more, repacked."""
    plain = a_model(kind="Q8_0")
    assert memory_need(plain, LoadSettings(512)).weights_bytes == sum(tensor.size_bytes for tensor in plain.tensors)
    repacked = a_model(kind="Q4_K")
    matrix, part = 512 * 2048 * 144 // 256, 512 * 1536 * 144 // 256
    mapped = 2 * matrix + 3 * 512 * 4 + 3 * part  # up to the norm of the last layer
    assert memory_need(repacked, LoadSettings(512)).weights_bytes == mapped + matrix + 6 * part


def test_a_shared_output_matrix() -> None:
    """Repacked on a CPU although it is the embeddings' matrix; on a card, where embeddings are not, a copy."""
    tied, matrix = a_model(kind="Q4_K", is_tied=True), 512 * 2048 * 144 // 256
    parts = 3 * 512 * 1536 * 144 // 256
    assert memory_need(tied, LoadSettings(512)).weights_bytes == (matrix + 3 * 2048 + parts) + (matrix + 2 * parts)
    on_card = LoadSettings(512, backend="cuda")
    assert memory_need(tied, on_card).weights_bytes == sum(tensor.size_bytes for tensor in tied.tensors)


def test_a_card() -> None:
    """Without the embeddings and the results, which stay with the host, and with the context of CUDA."""
    backends: tuple[Backend, Backend] = ("cuda", "cpu")
    card, host = (memory_need(LLAMA_8B, LoadSettings(8192, ubatch=512, backend=one)) for one in backends)
    assert host.weights_bytes - card.weights_bytes == 4096 * 128256 * 2
    assert host.compute_bytes - card.compute_bytes == 128256 * 4
    assert (card.overhead_bytes, host.overhead_bytes) == (CUDA_CONTEXT_BYTES, 0)
    parts = card.weights_bytes + card.kv_bytes + card.compute_bytes + card.overhead_bytes
    assert card.total_bytes == parts


def test_heads_by_layer() -> None:
    """A list of KV heads counts layer by layer, and one that is too short is refused."""
    assert memory_need(a_model(layers=3, heads_kv=(8, 0, 2)), LoadSettings(1024)).kv_bytes == 10 * 64 * 4 * 1024
    with pytest.raises(GgufError, match="has 2 values for 3 layers"):
        memory_need(a_model(layers=3, heads_kv=(8, 2)), LoadSettings(1024))


def test_window_patterns_of_the_file() -> None:
    """A period or a list in the file goes before what llama.cpp assumes for the family."""
    window: dict[str, Value] = {"attention__sliding_window": 256}
    pattern = "attention__sliding_window_pattern"
    a_token = 2 * 64 * 4
    by_period = a_model("gemma3", layers=4, **window, **{pattern: 2})
    assert memory_need(by_period, LoadSettings(4096, ubatch=512)).kv_bytes == (2 * 4096 + 2 * 768) * a_token
    by_list = a_model("mimo2", layers=4, **window, **{pattern: (1, 1, 1, 0)})
    assert memory_need(by_list, LoadSettings(4096, ubatch=512)).kv_bytes == (4096 + 3 * 768) * a_token


def test_windows_that_are_not_known_count_in_full() -> None:
    """An upper estimate that says so; a window that llama.cpp ignores is certain."""
    unknown = memory_need(a_model("new-one", attention__sliding_window=256), LoadSettings(4096))
    assert unknown.kv_bytes == 2 * 2 * 64 * 4 * 4096
    assert not unknown.is_certain
    assert memory_need(a_model("phi3", attention__sliding_window=256), LoadSettings(4096)).is_certain


def test_latent_attention() -> None:
    """DeepSeek's cache is one latent of 576 values per token and layer: there are no values beside it."""
    latent: dict[str, Value] = {"attention__key_length": 576, "attention__value_length": 512}
    header = a_model("deepseek2", layers=27, heads=16, heads_kv=1, attention__key_length_mla=192, **latent)
    need = memory_need(header, LoadSettings(4096))
    assert need.kv_bytes == 27 * 576 * 2 * 4096
    assert need.is_certain
    older = a_model("deepseek2", layers=27, heads=16, heads_kv=16, attention__kv_lora_rank=512, **latent)
    assert not memory_need(older, LoadSettings(4096)).is_certain


MAMBA: dict[str, Value] = {"ssm__inner_size": 1024, "ssm__state_size": 16, "ssm__conv_kernel": 4}


@pytest.mark.parametrize(
    ("header", "states", "caches"),
    [
        (a_model("mamba", heads_kv=0, attention__head_count=None, **MAMBA), 2, 0),
        (a_model("jamba", layers=4, heads_kv=(0, 0, 2, 0), **MAMBA), 3, 1),
        (a_model("falcon-h1", **MAMBA), 2, 2),
        (a_model("qwen3next", layers=4, full_attention_interval=4, **MAMBA), 3, 1),
    ],
)
def test_recurrent_layers(header: GgufHeader, states: int, caches: int) -> None:
    """A state of fixed size per slot instead of a cache, or beside one; never said to be certain."""
    need = memory_need(header, LoadSettings(4096, slots=2))
    state = (3 * 1024 + 16 * 1024) * 4
    assert need.kv_bytes == 2 * (states * state + caches * 2 * 64 * 4 * 4096)
    assert not need.is_certain


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (a_model(block_count=None), "does not state llama.block_count"),
        (a_model(attention__head_count=None), "does not state llama.attention.head_count"),
        (a_model(embedding_length=0), "width 0"),
        (a_model(block_count=100_000), "100000 layers"),
        (a_model(attention__head_count="eight"), "not a reasonable count"),
        (a_model(attention__key_length=-1), "not a reasonable count"),
        (a_model(attention__key_length=1 << 40), "not a reasonable count"),
        (a_model(experts=8), "expert_used_count"),
        (a_model(tensors=[]), "no layers"),
        (replace(a_model(), is_split=True), "one part of a split"),
    ],
)
def test_what_cannot_be_estimated_is_refused(header: GgufHeader, words: str) -> None:
    """A file that lacks a figure, or states nonsense, is a GgufError with one clear sentence."""
    with pytest.raises(GgufError, match=words):
        memory_need(header, LoadSettings(4096))


@pytest.mark.parametrize("changes", [{"ctx": 0}, {"slots": 0}, {"ubatch": 0}, {"kv_type": "q9_9"}])
def test_settings_that_make_no_sense_are_refused(changes: dict[str, object]) -> None:
    """They are the caller's defect, not the file's."""
    with pytest.raises(ValueError, match=r"at least 1|cannot be"):
        LoadSettings(**({"ctx": 512} | changes))  # type: ignore[arg-type]


any_family = st.sampled_from(list(FAMILIES.values()))
any_settings = st.builds(
    LoadSettings,
    ctx=st.integers(1, 1 << 18),
    slots=st.integers(1, 64),
    kv_type=st.sampled_from(list(KV_TYPES)),
    ubatch=st.integers(1, 4096),
    flash_attention=st.booleans(),
    backend=st.sampled_from(["cpu", "cuda"]),
)


@settings(deadline=None)
@given(any_family, any_settings, st.integers(1, 1 << 16), st.integers(1, 16))
def test_more_never_takes_less(header: GgufHeader, less: LoadSettings, ctx: int, slots: int) -> None:
    """A longer context, more slots or larger steps never shrink any part."""
    small = memory_need(header, less)
    for more in (
        replace(less, ctx=less.ctx + ctx),
        replace(less, slots=less.slots + slots),
        replace(less, ubatch=(less.ubatch or 0) + ctx),
    ):
        large = memory_need(header, more)
        assert large.weights_bytes == small.weights_bytes
        assert large.kv_bytes >= small.kv_bytes
        assert large.compute_bytes >= small.compute_bytes
        assert large.total_bytes >= small.total_bytes


@settings(deadline=None)
@given(any_family, any_settings)
def test_a_smaller_type_never_takes_more(header: GgufHeader, some: LoadSettings) -> None:
    """In the order of their bits per value; and flash attention never costs memory."""
    sizes = [memory_need(header, replace(some, kv_type=kv_type)).total_bytes for kv_type in KV_TYPES]
    assert sizes == sorted(sizes, reverse=True)
    plain = memory_need(header, replace(some, flash_attention=False))
    assert memory_need(header, replace(some, flash_attention=True)).total_bytes <= plain.total_bytes


KEYS = [key.replace(".", "__") for key in ("block_count", "embedding_length", "full_attention_interval")]
KEYS += [f"attention__{key}" for key in ("head_count", "head_count_kv", "key_length", "key_length_mla")]
KEYS += [f"attention__{key}" for key in ("sliding_window", "sliding_window_pattern")]
KEYS += [*MAMBA, "expert_used_count", "ssm__group_count"]
any_value = st.one_of(
    st.integers(-2, 64), st.integers(), st.floats(), st.text(), st.lists(st.integers(-1, 9), max_size=4).map(tuple)
)


@settings(deadline=None)
@given(
    st.sampled_from(["llama", "gemma3", "mamba", "new-one"]),
    st.dictionaries(st.sampled_from(KEYS), any_value),
    st.sampled_from([0, 4]),
    any_settings,
)
def test_no_header_breaks_it(architecture: str, kv: dict[str, Value], experts: int, some: LoadSettings) -> None:
    """Whatever a header says, the answer is a sum that is not negative, or a GgufError."""
    try:
        need = memory_need(a_model(architecture, experts=experts, **kv), some)
    except GgufError:
        return
    parts = (need.weights_bytes, need.kv_bytes, need.compute_bytes, need.overhead_bytes)
    assert min(parts) >= 0
    assert sum(parts) == need.total_bytes


@pytest.mark.parametrize("pooling_type", [1, 2, 3, 4])
def test_what_embeds_or_ranks_evaluates_a_whole_input_at_once(pooling_type: int) -> None:
    """Its step is its context and not the batch of those that write, unless somebody says so."""
    writes, reads = a_model(), a_model(pooling_type=pooling_type)
    whole = memory_need(writes, LoadSettings(4096, ubatch=4096))
    assert memory_need(reads, LoadSettings(4096)) == whole
    assert memory_need(reads, LoadSettings(4096, ubatch=128)) == memory_need(writes, LoadSettings(4096, ubatch=128))
    assert whole.compute_bytes > 4 * memory_need(writes, LoadSettings(4096)).compute_bytes


class Buffers(logging.Handler):
    """What a worker says of its buffers. llama.cpp logs from a thread, so the last of it may follow READY."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines = WorkerLog({})
        self.is_complete = asyncio.Event()
        self._is_feeding = False

    def emit(self, record: logging.LogRecord) -> None:
        if self._is_feeding:  # what reads the log logs too
            return
        self._is_feeding = True
        self.lines.feed(record.getMessage().encode() + b"\n")
        self._is_feeding = False
        if "CPU/compute" in self.lines.buffer_bytes:  # the last buffer that is made
            self.is_complete.set()


MODELS: dict[str, Callable[[Path], Path]] = {
    "writes": lambda _: resolve("builtin:tiny"),
    "embeds": lambda folder: an_encoder(folder / "embeds.gguf"),
    "ranks": lambda folder: an_encoder(folder / "ranks.gguf", RANK, layers=6),
    "embeds like a decoder": lambda folder: a_pooling_decoder(folder / "decoder.gguf"),
}


@pytest.mark.parametrize(
    ("model", "ctx", "slots"),
    [
        ("writes", 512, 1),
        ("writes", 2048, 4),
        ("embeds", 512, 4),
        ("ranks", 512, 1),
        ("embeds like a decoder", 512, 3),
        ("embeds like a decoder", 2048, 1),
    ],
)
def test_a_real_worker_takes_what_was_predicted(
    model: str, ctx: int, slots: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In llama.cpp, launched for what the model is for: the total of the engine's own buffer lines is within 10 % of
    the forecast."""
    path = MODELS[model](tmp_path)
    caplog.set_level(logging.DEBUG, logger="llama_orch.worker")
    log = logging.getLogger("llama_orch.worker")

    async def main() -> int:
        buffers = Buffers()
        log.addHandler(buffers)
        worker = await LlamaCppEngine().launch(ReplicaSpec("r-1", "p-1", path, slots=slots, ctx=ctx))
        try:
            async with asyncio.timeout(60):
                await worker.ready()
                await buffers.is_complete.wait()
            return sum(buffers.lines.buffer_bytes.values())
        finally:
            await worker.stop(grace_s=5)
            log.removeHandler(buffers)

    measured = asyncio.run(main())
    predicted = memory_need(read_gguf_header(path), LoadSettings(ctx, slots)).total_bytes
    assert abs(predicted - measured) <= 0.1 * measured
