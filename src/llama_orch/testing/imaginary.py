"""Models that exist only in figures, and the library that knows them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from llama_orch.engines.simulated import ServiceModel
from llama_orch.models.references import ModelNotFound
from llama_orch.runtime.library import Model
from llama_orch.testing.cards import GIB, GIGA, Card

MIB = 2**20
SCRATCH_BYTES = 300 * MIB  # an engine's buffers besides weights and cache
CUDA_CONTEXT_BYTES = 450 * MIB  # as models.memory assumes it of every process on a card
LOAD_BYTES_PER_S = 2.0 * GIGA  # an NVMe disk
LOAD_OVERHEAD_S = 0.5  # the start of the process
_FOLDER = Path("/imaginary")


@dataclass(frozen=True, slots=True)
class ImaginaryModel:
    """Sizes of a model. `active`: the part of its weights that one token needs, below 1 for a mixture of experts."""

    name: str
    weights_bytes: int
    kv_bytes_per_token: int = 128 * 1024
    parameters: float = 8e9
    active: float = 1.0
    ctx_trained: int | None = 131_072

    @property
    def reference(self) -> str:
        """What pools and tasks call it. Of the kind that a configuration may name without a file."""
        return f"builtin:{self.name}"

    @property
    def path(self) -> Path:
        return _FOLDER / self.name

    def need(self, ctx: int, slots: int, backend: str) -> int:
        """Bytes that a worker takes."""
        context = 0 if backend == "cpu" else CUDA_CONTEXT_BYTES
        return self.weights_bytes + ctx * slots * self.kv_bytes_per_token + SCRATCH_BYTES + context


class ImaginaryLibrary:
    """The library of a simulation: nothing but these models, and anybody may name them."""

    def __init__(self, models: Iterable[ImaginaryModel]) -> None:
        self._models = {model.reference: model for model in models}
        self._by_path = {model.path: model for model in self._models.values()}

    def look(self, reference: str) -> Model:
        try:
            model = self._models[reference]
        except KeyError:
            known = ", ".join(self._models)
            raise ModelNotFound(f"there is no {reference!r}; the models here are: {known}") from None
        return Model(reference, model.path, model.ctx_trained, model.need)

    def is_open(self, reference: str) -> bool:
        return True

    def at(self, path: Path) -> ImaginaryModel:
        """The model that a worker was told to load."""
        return self._by_path[path]


Pace = Callable[[ImaginaryModel, list[Card]], ServiceModel]
"""How fast a model runs on these cards, which share it."""


def physical_pace(
    *,
    load_bytes_per_s: float = LOAD_BYTES_PER_S,
    batch_slowdown: float = 0.1,
    card_slowdown: float = 1.0,
    chunk_tokens: int = 8,
) -> Pace:
    """Decoding reads all active weights for each token; a prompt costs two operations per active parameter and token;
    a load reads the file. docs/simulate.md says where the figures come from."""

    def pace(model: ImaginaryModel, cards: list[Card]) -> ServiceModel:
        share = 1 / len(cards)  # a split model is read one card after the other
        decode_s = sum(model.weights_bytes * model.active * share / card.decode_bytes_per_s for card in cards)
        prompt_s = sum(2 * model.parameters * model.active * share / card.prompt_flops_per_s for card in cards)
        return ServiceModel(
            load_s=LOAD_OVERHEAD_S + model.weights_bytes / load_bytes_per_s,
            prefill_s_per_token=prompt_s,
            decode_s_per_token=decode_s,
            cancel_s=0.05,
            unload_s=0.3,
            batch_slowdown=batch_slowdown,
            card_slowdown=card_slowdown,
            chunk_tokens=chunk_tokens,
        )

    return pace


def a_model(name: str = "8b", *, gib: float = 4.6, **fields: float) -> ImaginaryModel:
    """A model of this size; 8B parameters at 4 to 5 bits unless told."""
    return ImaginaryModel(name, round(gib * GIB), **fields)  # type: ignore[arg-type]
