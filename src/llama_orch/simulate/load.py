"""The file that `llama-orch simulate` reads: models, agents, and what is assumed of the machine. docs/simulate.md."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import yaml
from msgspec import Meta, Struct

from llama_orch.contract.config import PoolSettings
from llama_orch.contract.models import Determinism, Priority
from llama_orch.settings import SettingsError, parse_settings
from llama_orch.strict_yaml import StrictYamlError, parse_yaml
from llama_orch.testing.cards import GIB, GIGA, Card, UnknownCard, parse_cards
from llama_orch.testing.imaginary import ImaginaryModel

FILE_BYTES_MAX = 1 << 20
TASKS_MAX = 100_000  # of all agents together
KV_BYTES_8B, KV_EXPONENT = 128 * 1024, 0.42  # of one token, by parameters

# Bits per weight of Llama 3.1 8B, from llama.cpp's table (tools/quantize/README.md).
BITS = {
    "Q2_K": 3.16, "Q3_K_M": 4.0, "IQ4_XS": 4.46, "IQ4_NL": 4.68, "Q4_0": 4.66, "Q4_K_S": 4.67, "Q4_K_M": 4.89,
    "Q5_K_S": 5.57, "Q5_K_M": 5.70, "Q6_K": 6.56, "Q8_0": 8.50, "F16": 16.0, "BF16": 16.0, "MXFP4": 4.25,
}  # fmt: skip

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
Above0 = Annotated[float, Meta(gt=0, le=1e9)]
AtLeast0 = Annotated[float, Meta(ge=0, le=1e9)]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]


class LoadError(Exception):
    """The file cannot be used. `problems` are sentences for the user."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class ModelLoad(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One model: its size, or parameters and quantisation."""

    name: Name
    size_gb: Above0 | None = None
    parameters_b: Above0 | None = None
    quantization: str = "Q4_K_M"
    active_b: Above0 | None = None  # parameters that one token needs, of a mixture of experts
    ctx: Annotated[int, Meta(ge=64, le=1_000_000)] = 8192
    kv_kib_per_token: Above0 | None = None


class AgentLoad(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One agent, or several equal ones: prompt, answer, think, again. Lengths and times are means."""

    name: Name
    model: Name
    count: Annotated[int, Meta(ge=1, le=1000)] = 1
    tasks: Count = 10
    think_s: AtLeast0 = 0.0
    prompt_tokens: Count = 1000
    answer_tokens: Count = 300
    priority: Priority = Priority.INTERACTIVE
    determinism: Determinism = Determinism.STRICT


class Assumptions(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What is taken for true of the machine."""

    disk_gb_s: Above0 = 2.0
    slots: Annotated[int, Meta(ge=1, le=64)] = 4
    batch_slowdown: AtLeast0 = 0.1
    min_residency_s: AtLeast0 = 30.0
    spread: Annotated[float, Meta(ge=0, lt=1)] = 0.5  # lengths and pauses are drawn from this much around their means


class CardLoad(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A card that is not known, or that was measured otherwise."""

    name: Name
    memory_gb: Above0
    bandwidth_gb_s: Above0
    decode_efficiency: Annotated[float, Meta(gt=0, le=1)] | None = None
    prompt_tflops: Above0 | None = None


class _File(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    models: Annotated[list[ModelLoad], Meta(min_length=1)]
    agents: Annotated[list[AgentLoad], Meta(min_length=1)]
    pools: list[dict[str, Any]] = []
    assume: Assumptions = Assumptions()
    cards: list[CardLoad] = []


class Load(Struct, frozen=True):
    """A checked file. `ctx` is by model."""

    models: dict[str, ImaginaryModel]
    ctx: dict[str, int]
    agents: list[AgentLoad]
    pools: list[PoolSettings]
    assume: Assumptions
    cards: dict[str, Card]

    def host(self, text: str) -> list[Card]:
        """The cards of `--devices`, with what the file says of them."""
        try:
            known = parse_cards(",".join(self._described(part) for part in text.split(",")))
        except UnknownCard as error:
            raise LoadError([f"--devices: {error}"]) from error
        return [replace(self.cards.get(_kind(card), card), device_id=card.device_id) for card in known]

    def _described(self, name: str) -> str:
        card = self.cards.get(name.strip().lower())
        if card is None:
            return name
        return f"{name.strip().lower()}:{card.vram_bytes / GIB:g}:{card.bandwidth / GIGA:g}"


def _kind(card: Card) -> str:
    """Its name without the number of a second one."""
    name, _, number = card.device_id.rpartition("-")
    return name if name and number.isdigit() and int(number) < 16 else card.device_id


def read_load(path: Path) -> Load:
    try:
        content = path.read_bytes()
        if len(content) > FILE_BYTES_MAX:
            raise LoadError([f"{path}: the file is larger than {FILE_BYTES_MAX} bytes"])
        return parse_load(content.decode("utf-8-sig"), str(path))
    except OSError as error:
        raise LoadError([f"{path}: cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise LoadError([f"{path}: is not UTF-8 text (byte {error.start})"]) from error


def parse_load(text: str, name: str) -> Load:
    """The checked load of a YAML text; `name` is what problems call it."""
    try:
        file = msgspec.convert(parse_yaml(text) or {}, _File)
    except StrictYamlError as error:
        where = name if error.line is None else f"{name}:{error.line}"
        raise LoadError([f"{where}: {error}"]) from error
    except msgspec.ValidationError as error:
        raise LoadError([f"{name}: {error}"]) from error
    if problems := list(_problems(file)):
        raise LoadError([f"{name}: {problem}" for problem in problems])
    models = {one.name: _model(one) for one in file.models}
    return Load(
        models=models,
        ctx={one.name: one.ctx for one in file.models},
        agents=file.agents,
        pools=_pools(file, name),
        assume=file.assume,
        cards={one.name.lower(): _card(one) for one in file.cards},
    )


def _problems(file: _File) -> list[str]:
    problems = []
    names = [model.name for model in file.models]
    for section, given in (("models", names), ("agents", [agent.name for agent in file.agents])):
        problems += [
            f"{section}: {one!r} is given more than once" for one in sorted(set(given)) if given.count(one) > 1
        ]
    for model in file.models:
        if (model.size_gb is None) == (model.parameters_b is None):
            problems.append(f"models: {model.name}: give either size_gb or parameters_b")
        if model.quantization.upper() not in BITS:
            problems.append(f"models: {model.name}: quantization is one of {', '.join(BITS)}")
    for agent in file.agents:
        if agent.model not in names:
            problems.append(f"agents: {agent.name}: there is no model {agent.model!r}; the models: {', '.join(names)}")
            continue
        ctx = next(model.ctx for model in file.models if model.name == agent.model)
        most = (agent.prompt_tokens + agent.answer_tokens) * (1 + file.assume.spread)
        if most > ctx:
            problems.append(f"agents: {agent.name}: prompt and answer are up to {most:.0f} tokens, but ctx is {ctx}")
    total = sum(agent.tasks * agent.count for agent in file.agents)
    if total > TASKS_MAX:
        problems.append(f"agents: {total} tasks in all; at most {TASKS_MAX}")
    return problems


def _model(given: ModelLoad) -> ImaginaryModel:
    bits = BITS[given.quantization.upper()]
    if given.parameters_b is not None:
        parameters, weights = given.parameters_b * GIGA, given.parameters_b * GIGA * bits / 8
    else:
        weights = (given.size_gb or 0.0) * GIGA
        parameters = weights * 8 / bits
    active = 1.0 if given.active_b is None else min(1.0, given.active_b * GIGA / parameters)
    kv = given.kv_kib_per_token
    kv_bytes = KV_BYTES_8B * (parameters / 8e9) ** KV_EXPONENT if kv is None else kv * 1024
    return ImaginaryModel(given.name, round(weights), round(kv_bytes), parameters, active, ctx_trained=None)


def _card(given: CardLoad) -> Card:
    card = Card(given.name.lower(), round(given.memory_gb * GIB), given.bandwidth_gb_s * GIGA)
    if given.decode_efficiency is not None:
        card = replace(card, decode_efficiency=given.decode_efficiency)
    return card if given.prompt_tflops is None else replace(card, prompt_flops=given.prompt_tflops * 1e12)


def _pools(file: _File, name: str) -> list[PoolSettings]:
    """As the configuration has them, but for the models, which are the file's own, and the devices, which are the
    host's."""
    known = {model.name: model.ctx for model in file.models}
    given = []
    for number, pool in enumerate(file.pools):
        model = pool.get("model")
        if model not in known:
            raise LoadError(
                [f"{name}: pools[{number}].model: there is no model {model!r}; the models: {', '.join(known)}"]
            )
        own = {"ctx": known[model], "max_tokens": min(256, known[model])}
        given.append({**own, **pool, "model": f"builtin:{model}", "engine": "simulated"})
    if not given:
        return []
    try:
        return list(parse_settings(yaml.safe_dump({"pools": given}), name).pools)
    except SettingsError as error:
        raise LoadError(error.problems) from error
