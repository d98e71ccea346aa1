"""A model file as it is seen without reading it as a whole."""

from __future__ import annotations

from pathlib import Path

from llama_orch.contract.config import Settings
from llama_orch.contract.models import GgufInfo
from llama_orch.models.catalog import Sight
from llama_orch.models.gguf import GgufError, GgufHeader, read_gguf_header
from llama_orch.models.memory import LoadSettings, memory_need
from llama_orch.models.references import ModelNotFound
from llama_orch.runtime.on_demand import CTX_AUTO_MAX, CTX_AUTO_MIN

TEXT_MAX = 128  # of what a header may have put where a name belongs


def sight_of(path: Path, settings: Settings) -> Sight:
    """Raises ModelNotFound where the file cannot be read. Takes some milliseconds."""
    try:
        size_bytes = path.stat().st_size
        return Sight(size_bytes=size_bytes, gguf=_about(read_gguf_header(path), settings))
    except GgufError:  # an engine may take it all the same
        return Sight(size_bytes=size_bytes, gguf=None)
    except OSError as error:
        raise ModelNotFound(f"the file cannot be read: {error.strerror}") from error


def _about(header: GgufHeader, settings: Settings) -> GgufInfo:
    return GgufInfo(
        architecture=header.architecture[:TEXT_MAX],
        context_length=header.context_length or None,
        quantisation=header.file_type,
        vram_bytes=_vram_bytes(header, settings),
    )


def _vram_bytes(header: GgufHeader, settings: Settings) -> int | None:
    ctx = min(header.context_length or CTX_AUTO_MIN, CTX_AUTO_MAX)
    try:
        return memory_need(header, LoadSettings(ctx, settings.on_demand.slots, backend="cuda")).total_bytes
    except (GgufError, ValueError):
        return None
