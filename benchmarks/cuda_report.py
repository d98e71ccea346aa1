"""What cuda_split.py found, as values and as Markdown. Bytes and seconds inside, MiB and rates on the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

MIB = 1 << 20
UNKNOWN = "not told"  # neither zero nor a guess


@dataclass(frozen=True)
class Memory:
    """One replica alone on the card. `worked_bytes` is what the card lacks after tasks on every slot."""

    model: str
    ctx: int
    slots: int
    predicted_bytes: int
    reserved_bytes: int
    card_bytes: int
    process_bytes: int | None
    worked_bytes: int
    returned_s: float | None  # from the service's end until the card has its memory again


@dataclass(frozen=True)
class Speed:
    """Streams of one model at once, alone on the card."""

    model: str
    load_s: float | None
    streams: int
    first_token_s: float
    per_stream: float  # tokens per second, of the median stream
    total: float


@dataclass(frozen=True)
class Placed:
    """One replica while all pools are in service. The last two are what GET /metrics had during the tasks, at most."""

    replica_id: str
    devices: list[str]
    state: str
    last_error: str | None
    predicted_bytes: int
    reserved_bytes: int
    process_bytes: int | None
    vram_used_bytes: float | None
    gpu_utilization: float | None


@dataclass(frozen=True)
class Together:
    """All pools in service at once."""

    device_bytes: dict[str, int]
    replicas: list[Placed]
    card_bytes: int  # what the card lacks since before the start
    streams: int
    total: float  # tokens per second


@dataclass(frozen=True)
class Killed:
    """SIGKILL of one engine process while all its slots decode. Seconds from the signal; None: not seen."""

    model: str
    memory_bytes: int
    ends: dict[str, int]  # its streams by the code of their error; `end`: a whole answer
    error_s: float  # until the last of them ended
    returned_s: float | None
    ready_s: float | None
    is_other_pool_undisturbed: bool | None  # None where there is no other


@dataclass
class Figures:
    """One run."""

    machine: dict[str, str]
    memory: list[Memory] = field(default_factory=list)
    speed: list[Speed] = field(default_factory=list)
    together: Together | None = None
    killed: Killed | None = None


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. What would break a cell is replaced."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "¦").replace("\n", " ")


def mib(count: float | None) -> str:
    return UNKNOWN if count is None else f"{count / MIB:,.0f}"


def seconds(value: float | None) -> str:
    return "not seen" if value is None else f"{value:.2f}"


def percent(said: float, was: float | None) -> str:
    """How far the forecast is off, in percent of what was measured."""
    return UNKNOWN if not was else f"{100 * (said - was) / was:+.1f} %"


def memory_table(rows: Sequence[Memory]) -> str:
    header = ["model", "ctx × slots", "predicted", "reserved", "card", "process", "after tasks", "error", "returned, s"]
    return table(
        header,
        [
            [
                one.model, f"{one.ctx} × {one.slots}", mib(one.predicted_bytes), mib(one.reserved_bytes),
                mib(one.card_bytes), mib(one.process_bytes), mib(one.worked_bytes),
                percent(one.predicted_bytes, one.card_bytes), seconds(one.returned_s),
            ]
            for one in rows
        ],
    )  # fmt: skip


def speed_table(rows: Sequence[Speed]) -> str:
    return table(
        ["model", "load, s", "streams", "first token, ms", "tokens/s per stream", "tokens/s in total"],
        [
            [
                one.model, UNKNOWN if one.load_s is None else f"{one.load_s:.1f}", str(one.streams),
                f"{one.first_token_s * 1000:.0f}", f"{one.per_stream:.1f}", f"{one.total:.1f}",
            ]
            for one in rows
        ],
    )  # fmt: skip


def device_table(found: Together) -> str:
    """What the ledger gave away on each device, against its size."""
    rows = []
    for device_id, size in found.device_bytes.items():
        here = [one for one in found.replicas if device_id in one.devices and one.state == "ready"]
        taken = sum(one.reserved_bytes for one in here)
        names = ", ".join(one.replica_id for one in here) or "none"
        rows.append([device_id, mib(size), names, mib(taken), "yes" if taken <= size else "**no**"])
    return table(["device", "size", "replicas", "reserved", "within its size"], rows)


def replica_table(found: Together) -> str:
    header = ["replica", "device", "state", "predicted", "reserved", "process", "vram_used_bytes", "gpu_utilization"]
    return table(
        header,
        [
            [
                one.replica_id, ", ".join(one.devices), one.last_error or one.state, mib(one.predicted_bytes),
                mib(one.reserved_bytes), mib(one.process_bytes), mib(one.vram_used_bytes),
                UNKNOWN if one.gpu_utilization is None else f"{one.gpu_utilization:.2f}",
            ]
            for one in found.replicas
        ],
    )  # fmt: skip


def killed_table(found: Killed) -> str:
    ends = ", ".join(f"{count} × {code}" for code, count in sorted(found.ends.items()))
    undisturbed = {True: "yes", False: "**no**", None: "there was none"}[found.is_other_pool_undisturbed]
    return table(
        ["SIGKILL in mid-decode", found.model],
        [
            ["its streams ended, s", seconds(found.error_s)],
            [f"its memory, {mib(found.memory_bytes)} MiB, was returned, s", seconds(found.returned_s)],
            ["it was ready again, s", seconds(found.ready_s)],
            ["how they ended", ends],
            ["a stream of another pool went on", undisturbed],
        ],
    )


def page(figures: Figures) -> str:
    parts = [", ".join(f"{name} {value}" for name, value in figures.machine.items()) + ". Memory in MiB."]
    if figures.memory:
        parts += ["### Each model alone: memory", memory_table(figures.memory)]
    if figures.speed:
        parts += ["### Each model alone: speed", speed_table(figures.speed)]
    if figures.together is not None:
        found = figures.together
        predicted = sum(one.predicted_bytes for one in found.replicas if one.state == "ready")
        parts += [
            "### All pools at once, `devices: auto`",
            device_table(found),
            replica_table(found),
            f"All replicas: predicted {mib(predicted)}, measured on the card {mib(found.card_bytes)} "
            f"({percent(predicted, found.card_bytes)}); {found.streams} streams at once, {found.total:.1f} tokens/s.",
        ]
    if figures.killed is not None:
        parts += ["### A worker killed", killed_table(figures.killed)]
    return "\n\n".join(parts)
