"""One task's decoding: its prompts on its slot, chunks into its stream, and the figures that remain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from msgspec import UNSET

from llama_orch.contract.config import SamplerProfileSettings
from llama_orch.contract.models import FinishReason, KvHint, TaskRequest, Workload
from llama_orch.core import admission
from llama_orch.core.task import Outcome, Task
from llama_orch.engines.base import Chunk, Completion, Job, KvReuse, Reading, ReadJob, Sampling, Worker
from llama_orch.runtime import intake
from llama_orch.runtime.answer import AnswerWriter, syntax_of
from llama_orch.runtime.streams import TaskStream

# Task.inputs run one after the other; each but the first gets a seed of its own, so that equal inputs may differ.
_SEED_MAX = 2**63 - 1
WARM_TOKENS_MIN = 16  # taken over, or half of a shorter prompt: then a run counts as warm


@dataclass(frozen=True, slots=True)
class Assignment:
    """What decoding needs besides the task itself."""

    worker: Worker
    prompts: Sequence[str]
    sampling: Sampling
    idle_timeout_s: float


def sampling_of(request: TaskRequest, profile: SamplerProfileSettings, grammar: str | None = None) -> Sampling:
    """The profile's settings with the task's own over them. `grammar`: what came of the task's own at admission."""
    own = request.sampling

    def chosen(name: str) -> float:
        value: float | None = None if own is UNSET else getattr(own, name)
        return float(getattr(profile, name) if value is None else value)

    return Sampling(
        temperature=chosen("temperature"),
        top_k=int(chosen("top_k")),
        top_p=chosen("top_p"),
        min_p=chosen("min_p"),
        repeat_penalty=chosen("repeat_penalty"),
        stop=() if own is UNSET or own.stop is None else tuple(own.stop),
        grammar=grammar,
        json_schema=None if own is UNSET else own.json_schema,
    )


def kv_reuse(task: Task) -> KvReuse:
    """A warm prefix may change the numbers; a strict task takes over only what does not (HP-DET-1, HP-SES-3)."""
    hint = task.request.kv_hint
    if hint is KvHint.COLD or (hint is None and task.request.session_id is None):
        return "none"
    return "exact" if task.is_strict else "any"


async def decode(task: Task, given: Assignment, stream: TaskStream, progressed: Callable[[int], None]) -> Outcome:
    """Run the task's prompts in order. `progressed` hears of each chunk's token count before its frame is written."""
    if not admission.writes(task.request):
        return await _read(task, given)
    done: list[Completion] = []
    for number, prompt in enumerate(given.prompts):
        job = _job(task, prompt, number, given)
        answer = AnswerWriter(task, stream)
        async with aclosing(given.worker.generate(job)) as items:
            async for item in items:
                if isinstance(item, Chunk):
                    progressed(item.tokens)
                    answer.write(item)
                else:
                    done.append(item)
        answer.end()
    return _outcome(done)


async def _read(task: Task, given: Assignment) -> Outcome:
    """One text after the other: how texts share a batch can change the numbers (HP-DET-1)."""
    is_ranking = task.request.workload is Workload.RERANK
    query = given.prompts[0] if is_ranking else None
    done: list[Reading] = []
    for text in given.prompts[1:] if is_ranking else given.prompts:
        job = ReadJob(text, _slot(task), query, idle_timeout_s=given.idle_timeout_s)
        done.append(await given.worker.read(job))
    return Outcome(
        tokens_in=sum(one.tokens_in for one in done),
        tokens_out=0,
        decode_ms=0,
        finish_reason=FinishReason.STOP,
        is_kv_warm=False,
        prefill_ms=sum(one.ms for one in done),
        embeddings=None if is_ranking else [one.vector for one in done],
        scores=[one.score for one in done] if is_ranking else None,
    )


def _slot(task: Task) -> int:
    if task.lease is None:
        raise RuntimeError(f"task {task.task_id} is at work without a lease")
    return task.lease.slots[0]


def _job(task: Task, prompt: str, number: int, given: Assignment) -> Job:
    return Job(
        task_id=task.task_id,
        prompt=prompt,
        max_tokens=task.max_tokens,
        seed=(task.seed + number) & _SEED_MAX,
        sampling=given.sampling,
        slot=_slot(task),
        kv_reuse=kv_reuse(task),
        idle_timeout_s=given.idle_timeout_s,
        logprobs=task.request.logprobs,
        kept_tokens=() if (syntax := syntax_of(task)) is None else syntax.kept,
        messages=() if task.request.messages is None else tuple(intake.plain(task.request.messages)),
    )


def _is_warm(done: Completion) -> bool:
    """Any two prompts share a token or two at their beginning: that is not a session's context."""
    return done.tokens_cached >= max(1, min(WARM_TOKENS_MIN, done.tokens_in // 2))


def _outcome(done: list[Completion]) -> Outcome:
    return Outcome(
        tokens_in=sum(one.tokens_in for one in done),
        tokens_out=sum(one.tokens_out for one in done),
        decode_ms=round(sum(one.decode_ms for one in done)),
        finish_reason=FinishReason(done[-1].finish_reason),
        is_kv_warm=any(_is_warm(one) for one in done),
        prefill_ms=sum(one.prefill_ms for one in done),
        tokens_cached=sum(one.tokens_cached for one in done),
    )
