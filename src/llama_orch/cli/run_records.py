"""What `llama-orch run` remembers of its runs, so that `--repeat` can ask the same again: the request, the answer, and
what it depended on. The service forgets prompts once a task has ended.

Records are files of this user's alone (0600) below LLORCH_HOME/runs, of which the last RUNS_MAX are kept. They are a
convenience: one that cannot be written costs a line on stderr and not the run.
"""

from __future__ import annotations

import os
import secrets
import uuid
from collections.abc import Iterator
from contextlib import suppress

import msgspec
from msgspec import Struct

from llama_orch.cli.output import UsageError, note
from llama_orch.contract.models import Determinism, EndFrame, SamplerProfile, TaskRequest
from llama_orch.settings import Home, SettingsError

RUNS_MAX = 100
RECORD_BYTES_MAX = 8 << 20
_SUFFIX = ".json"


class Record(Struct, kw_only=True, frozen=True):
    """One run that came to its end. `profile` has the figures of the sampler profile; None where it was not told."""

    request: TaskRequest
    text: str
    end: EndFrame
    profile: SamplerProfile | None = None

    def again(self, task_id: str) -> TaskRequest:
        """The same request under another id, with the seed that was used. Without its session: that is a matter of the
        KV cache, and the turn has been taken."""
        return msgspec.structs.replace(
            self.request, task_id=task_id, seed=self.end.seed, session_id=None, kv_hint=None, deadline_ms=None
        )


class Records:
    """The records of one home folder."""

    def __init__(self, home: Home) -> None:
        self._folder = home.path / "runs"

    def get(self, task_id: str) -> Record:
        """UsageError when there is none of this task; SettingsError when it cannot be read."""
        try:
            path = self._folder / f"{uuid.UUID(task_id)}{_SUFFIX}"
        except ValueError as error:
            raise UsageError(f"{task_id!r} is no task's id") from error
        try:
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                return msgspec.json.decode(file.read(RECORD_BYTES_MAX + 1), type=Record)
        except FileNotFoundError as error:
            kept = f"the last {RUNS_MAX} runs of this program are kept, in {self._folder}"
            raise UsageError(f"there is no record of task {task_id}: {kept}") from error
        except OSError as error:
            raise SettingsError([f"{path}: cannot be read: {error.strerror}"]) from error
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise SettingsError([f"{path}: is not a record of this version's: {error}"]) from error

    def put(self, record: Record) -> bool:
        """Whether it was kept; if not, stderr has the reason."""
        content = msgspec.json.encode(record)
        if len(content) > RECORD_BYTES_MAX:
            note(f"the run is too large to be kept for --repeat: {len(content)} bytes, of at most {RECORD_BYTES_MAX}")
            return False
        try:
            self._write(f"{record.request.task_id}{_SUFFIX}", content)
            self._prune()
        except OSError as error:
            note(f"the run is not kept for --repeat: {self._folder}: {error.strerror or error}")
            return False
        return True

    def _write(self, name: str, content: bytes) -> None:
        """Whole or not at all."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = self._folder / f".{secrets.token_hex(8)}"
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            try:
                file.write(content)
                file.flush()
                draft.rename(self._folder / name)
            except OSError:
                draft.unlink()
                raise

    def _prune(self) -> None:
        """Forget the oldest. Another command may be at the same."""
        found = []
        for path in self._folder.glob(f"*{_SUFFIX}"):
            with suppress(FileNotFoundError):
                found.append((path.stat().st_mtime_ns, path))
        for _, path in sorted(found)[:-RUNS_MAX]:
            path.unlink(missing_ok=True)


def changes(then: Record, now: Record) -> Iterator[str]:
    """What differs of that which an answer depends on, a line each."""
    pairs = [
        ("model digest", then.end.model_digest, now.end.model_digest),
        ("engine", then.end.engine, now.end.engine),
        ("engine version", then.end.engine_version, now.end.engine_version),
        ("sampler profile", then.end.sampler_profile_version, now.end.sampler_profile_version),
        ("seed", then.end.seed, now.end.seed),
        ("prompt, by tokenizer and chat template", f"{then.end.tokens_in} tokens", f"{now.end.tokens_in} tokens"),
    ]
    yield from (f"{name}: {before} then, {after} now" for name, before, after in pairs if before != after)
    before, after = then.profile, now.profile
    if before is not None and after is not None and before.version == after.version and before != after:
        figures = zip(msgspec.structs.asdict(before).items(), msgspec.structs.asdict(after).values(), strict=True)
        moved = ", ".join(f"{name} {old} then, {new} now" for (name, old), new in figures if old != new)
        yield f"sampler profile {before.version} has other figures under the same name: {moved}"


def compare(then: Record, now: Record) -> bool:
    """Say on stderr whether the bytes agree, and where not, what changed."""
    before, after = then.text.encode(), now.text.encode()
    found = list(changes(then, now))
    if before == after:
        note(f"the bytes agree: {len(after)} of {len(before)}")
    else:
        pairs = enumerate(zip(before, after, strict=False))
        first = next((at for at, (one, other) in pairs if one != other), min(len(before), len(after)))
        note(f"the bytes differ, from byte {first} on: {len(before)} then, {len(after)} now")
        found = found or list(_guesses(then, now))
    for line in found:
        note(f"  {line}")
    return before == after


def _guesses(then: Record, now: Record) -> Iterator[str]:
    """What can be behind it where nothing that is told has changed."""
    yield "none of model digest, engine, engine version, sampler profile, seed and prompt has changed"
    if then.request.determinism is Determinism.BEST_EFFORT:
        yield "the task is best_effort: its bytes may depend on what ran beside it"
    is_cut = then.text.startswith(now.text) or now.text.startswith(then.text)
    if is_cut and then.request.max_tokens is None:
        counts = f"{then.end.tokens_out} tokens then, {now.end.tokens_out} now"
        yield f"the request had no max_tokens, so that the pool's counts: {counts}"


def figures_of(profiles: list[SamplerProfile], version: str) -> SamplerProfile | None:
    return next((profile for profile in profiles if profile.version == version), None)
