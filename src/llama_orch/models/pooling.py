"""What a model is for, told from its header: to write, to embed, or to rank."""

from __future__ import annotations

from enum import StrEnum

from llama_orch.models.gguf import GgufHeader

# They read a text in both directions and write none.
_ENCODERS_NAMES = """
    bert nomic-bert nomic-bert-moe neo-bert jina-bert-v2 jina-bert-v3 modern-bert eurobert gemma-embedding t5encoder
"""
ENCODERS = frozenset(_ENCODERS_NAMES.split())
_NONE, _RANK = 0, 4
_POOLINGS = range(_RANK + 1)  # as llama.cpp counts them: none, mean, first token, last token, rank


class Purpose(StrEnum):
    """Named like the workloads."""

    COMPLETION = "completion"
    EMBEDDING = "embedding"
    RERANK = "rerank"


def purpose(header: GgufHeader) -> Purpose:
    """What the model was made for. A decoder that says how it pools its tokens was trained to embed."""
    pooling = header.kv.get(f"{header.architecture}.pooling_type", _NONE)
    if pooling == _RANK:
        return Purpose.RERANK
    return Purpose.COMPLETION if pooling == _NONE and header.architecture not in ENCODERS else Purpose.EMBEDDING


def pooling_problem(header: GgufHeader) -> str | None:
    """Why the model cannot be served whatever it is for; None where nothing is wrong."""
    key = f"{header.architecture}.pooling_type"
    pooling = header.kv.get(key, _NONE)
    if pooling not in _POOLINGS or isinstance(pooling, bool | float):
        return f"its header has {key} {pooling!r}, which is unknown"
    if pooling == _NONE and header.architecture in ENCODERS:
        return f"the model is an encoder, but its header does not say how it pools its tokens ({key})"
    return None
