"""What a model's KV cache does with each further token, by the formulas of memory.py."""

from __future__ import annotations

from llama_orch.models.gguf import GgufError, GgufHeader
from llama_orch.models.memory import LoadSettings, memory_need

_LONG_TOKENS = 1 << 20  # beyond any window


def keeps_every_token(header: GgufHeader) -> bool:
    """Whether every layer keeps all of the context, so that a cache may be cut back to any of its tokens. Layers with a
    window or a recurrent state forget; where the architecture is not covered, nothing is taken for granted."""
    try:
        once, twice = (memory_need(header, LoadSettings(ctx)) for ctx in (_LONG_TOKENS, 2 * _LONG_TOKENS))
    except GgufError:
        return False
    return once.is_certain and twice.kv_bytes == 2 * once.kv_bytes > 0


def kv_bytes_per_token(header: GgufHeader, ctx: int) -> int:
    """Of one slot with a context of `ctx` tokens, on average over all of them; 0 where the header does not tell."""
    try:
        settings = LoadSettings(ctx)
        return memory_need(header, settings).kv_bytes // settings.cells
    except GgufError:
        return 0
