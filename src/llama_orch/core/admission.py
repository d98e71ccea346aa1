"""The guardrails before the queue (HP-ADM-7): what a request may ask of a pool. Plain functions that raise refusals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec import UNSET

from llama_orch.contract.models import Determinism, KvHint, Sampling, TaskRequest, Workload
from llama_orch.core.gbnf import GrammarError, check_grammar
from llama_orch.core.json_schema import json_schema_to_gbnf
from llama_orch.core.pool import Pool, PoolSpec
from llama_orch.core.task import Task
from llama_orch.core.tooling import check_tools, fields_about_tools
from llama_orch.errors import InvalidParams, LlorchError, NotFound, PoolUnready
from llama_orch.policy.urls import without_query

# A token covers at least one byte of text; this many more may be put around it (start of text, a leading space).
EXTRA_TOKENS = 8
# The longest tokens of known vocabularies are runs of 128 blanks; a text of more characters per token fits nowhere.
TOKEN_CHARS_MAX = 256
CHANCES_MAX = 1 << 18  # that an answer may tell: some 20 MB

_FORMS: dict[Workload, tuple[str, ...]] = {
    Workload.COMPLETION: ("prompt", "inputs", "messages"),
    Workload.EMBEDDING: ("prompt", "inputs"),
    Workload.RERANK: ("inputs",),
}
_REMEDIES = {
    Workload.EMBEDDING: "add one on llamacpp whose model was made to embed, or one on ctransformers",
    Workload.RERANK: "add one on llamacpp whose model was made to rank (pooling type `rank`)",
}


def matching_pools(pools: Sequence[Pool], request: TaskRequest, everybody: Iterable[Pool] | None = None) -> list[Pool]:
    """Those of the pools that can do what the request asks, in their order; a refusal when there is none, which names
    who of `everybody` could."""
    found = [pool for pool in pools if pool.serves(request.model_ref) and not _is_too_small(pool.spec, request)]
    if not found:
        served = ", ".join(sorted({without_query(pool.spec.model) for pool in pools}))
        raise NotFound(f"no pool serves model {without_query(request.model_ref)!r}; name one of: {served}")
    if request.engine is not None:
        engines = sorted({pool.spec.engine for pool in found})
        found = [pool for pool in found if pool.spec.engine == request.engine]
        if not found:
            raise InvalidParams(
                f"engine {request.engine!r} does not serve {without_query(request.model_ref)!r}; leave `engine` out or "
                "name one of: " + ", ".join(engines)
            )
    able = [pool for pool in found if incapacity(pool.spec, request) is None]
    if not able:
        raise _incapable(found[0].spec, request, pools if everybody is None else everybody)
    return able


def _incapable(spec: PoolSpec, request: TaskRequest, everybody: Iterable[Pool]) -> LlorchError:
    """The refusal, with the pools that can where a whole workload is what is missing."""
    reason = str(incapacity(spec, request))
    if not spec.is_known:
        return PoolUnready(
            f"pool {spec.pool_id} has not reached its server yet, which may not do all of this; repeat shortly",
            engine=spec.engine,
            retry_after_ms=1000,
        )
    workload = request.workload.value
    if workload in spec.workloads:
        field = _lacking(spec, request)
        is_everybodys = field is not None and not field.startswith("sampling.")  # OpenAI's API has it under this name
        return InvalidParams(reason, engine=spec.engine, param=field if is_everybodys else None)
    others = [pool.spec for pool in everybody if workload in pool.spec.workloads]
    if others:
        advice = "; these pools can: " + ", ".join(f"{one.pool_id} ({one.engine}, {one.model})" for one in others)
    else:
        advice = f"; no pool can: {_REMEDIES.get(request.workload, 'add one with a model that writes')}"
    listed = [{"pool_id": one.pool_id, "engine": one.engine, "model_ref": one.model} for one in others]
    return InvalidParams(reason + advice, engine=spec.engine, details={"workload": workload, "pools_able": listed})


def _is_too_small(spec: PoolSpec, request: TaskRequest) -> bool:
    """A pool on demand is no bound for others: a task that needs more context gets a pool that has it."""
    return spec.is_on_demand and request.ctx is not None and request.ctx > spec.ctx


def incapacity(spec: PoolSpec, request: TaskRequest) -> str | None:
    """What the pool's engine cannot do of the request, as a sentence."""
    if request.workload.value not in spec.workloads:
        return (
            f"pool {spec.pool_id} cannot do workload {request.workload.value!r}; it does: {', '.join(spec.workloads)}"
        )
    if (field := _lacking(spec, request)) is not None:
        why = ""
        if field in fields_about_tools(request):
            why = ", since its engine, or its model's chat template, has no tools in a form that is known here"
        return f"pool {spec.pool_id} ({spec.engine}) does not offer `{field}`{why}; leave it out"
    if request.determinism is Determinism.STRICT and not spec.can_be_strict:
        return (
            f"pool {spec.pool_id} ({spec.engine}) does not offer `determinism` strict: nobody here knows what else its "
            "server runs; leave it out, or ask for best_effort"
        )
    return None


def _lacking(spec: PoolSpec, request: TaskRequest) -> str | None:
    """The field of the request that the pool has no feature for."""
    asked = [("messages", "chat")] if request.messages is not None else []
    asked += [("logprobs", "logprobs")] if request.logprobs is not None else []
    asked += [(field, "tools") for field in fields_about_tools(request)]
    if request.sampling is not UNSET:
        names = ("min_p", "json_schema", "grammar")  # each a feature of that name
        asked += [(f"sampling.{name}", name) for name in names if getattr(request.sampling, name) is not None]
    lacking = [field for field, feature in asked if feature not in spec.features]
    lacking += [name for name in spec.lacks if _asks_for(request, name)]
    return lacking[0] if lacking else None


def _asks_for(request: TaskRequest, field: str) -> bool:
    """Whether the request has the field; of `kv_hint`, the one value that takes an engine's doing."""
    if field == "kv_hint":
        return request.kv_hint is KvHint.COLD
    section, _, name = field.partition(".")
    own = getattr(request, section)
    return own is not UNSET and getattr(own, name) is not None


def writes(request: TaskRequest) -> bool:
    """Whether text comes of it: what embeds or ranks reads only."""
    return request.workload is Workload.COMPLETION


def check_request(request: TaskRequest, spec: PoolSpec, sampler_profiles: Iterable[str]) -> None:
    """Everything that can be judged without counting tokens."""
    _check_fields(request)
    if request.ctx is not None and request.ctx > spec.ctx:
        raise InvalidParams(
            f"`ctx` is {request.ctx} tokens, but pool {spec.pool_id} has {spec.ctx}; ask for at most {spec.ctx}",
            engine=spec.engine,
            details={"ctx": request.ctx, "pool_ctx": spec.ctx},
        )
    known = sorted(sampler_profiles)
    version = request.sampler_profile_version
    if version is not None and version not in known:
        raise InvalidParams(f"unknown `sampler_profile_version` {version!r}; known: {', '.join(known)}")


def _check_fields(request: TaskRequest) -> None:
    """The form of the prompt, and what has no sense for the workload."""
    forms = _FORMS[request.workload]
    given = [name for name in ("prompt", "inputs", "messages") if getattr(request, name) is not None]
    if len(given) != 1 or given[0] not in forms:
        wanted = {1: "{}", 2: "exactly one of {} and {}", 3: "exactly one of {}, {} and {}"}[len(forms)]
        wanted = wanted.format(*(f"`{form}`" for form in forms))
        where = "" if writes(request) else f" for workload {request.workload.value!r}"
        raise InvalidParams(f"give {wanted}{where}; given: {', '.join(given) or 'none'}")
    if request.workload is Workload.RERANK and len(request.inputs or ()) < 2:
        raise InvalidParams("`inputs` of workload 'rerank' are a query and at least one document; give two or more")
    if not writes(request):
        useless = [name for name in ("max_tokens", "expected_tokens", "logprobs") if getattr(request, name) is not None]
        useless += ["sampling"] if request.sampling is not UNSET else []
        if useless:
            raise InvalidParams(
                f"`{useless[0]}` is about text that is written, and workload {request.workload.value!r} writes none; "
                "leave it out"
            )
    own = request.sampling
    if own is not UNSET and own.json_schema is not None and own.grammar is not None:
        raise InvalidParams("give one of `sampling.json_schema` and `sampling.grammar`, not both")
    check_tools(request)


def is_constrained(request: TaskRequest) -> bool:
    """Whether the answer must match something."""
    own = request.sampling
    return own is not UNSET and (own.json_schema is not None or own.grammar is not None)


def grammar_of(sampling: Sampling) -> str:
    """The GBNF that the answer must match; a refusal of what is not understood, cannot be kept, or could hurt the
    engine. May take a tenth of a second."""
    schema = sampling.json_schema
    field = "grammar" if schema is None else "json_schema"
    try:
        grammar = sampling.grammar or "" if schema is None else json_schema_to_gbnf(schema)
        check_grammar(grammar)
    except GrammarError as error:
        raise InvalidParams(f"`sampling.{field}` is refused: {error}") from error
    return grammar


def check_size(request: TaskRequest, spec: PoolSpec) -> None:
    """Refuse texts that cannot fit whatever the tokenizer makes of them, before anybody counts."""
    texts = [request.prompt or "", *(request.inputs or ()), *(m.content for m in request.messages or ())]
    texts += [function.description or "" for function in (() if request.tools is UNSET else request.tools.functions)]
    longest = max(len(text) for text in texts)
    if longest > spec.ctx * TOKEN_CHARS_MAX:
        raise InvalidParams(
            f"a text of {longest} characters cannot fit the context of {spec.ctx} tokens of pool {spec.pool_id}; "
            "shorten it",
            engine=spec.engine,
            details={"characters": longest, "pool_ctx": spec.ctx},
        )


def evaluations(request: TaskRequest, counts: Sequence[int]) -> list[int]:
    """Tokens of each run on the engine, from those of each text: a document is ranked together with its query."""
    if request.workload is Workload.RERANK:
        return [counts[0] + count for count in counts[1:]]
    return list(counts)


def texts(request: TaskRequest) -> Sequence[str]:
    """The prompts that need no template; none for `messages`."""
    if request.prompt is not None:
        return [request.prompt]
    return request.inputs or []


def token_bound(text: str) -> int:
    """The most tokens that any tokenizer can make of the text."""
    return len(text.encode()) + EXTRA_TOKENS


def token_bounds(request: TaskRequest, prompts: Sequence[str]) -> list[int]:
    """The same of each run on the engine."""
    return evaluations(request, [token_bound(prompt) for prompt in prompts]) if prompts else []


def check_lengths(request: TaskRequest, spec: PoolSpec, prompt_tokens: Sequence[int]) -> int:
    """The task's max_tokens, per prompt; a refusal when a prompt and its answer do not fit the context."""
    longest = max(prompt_tokens)
    may_fill = spec.reads_whole_ctx and not writes(request)
    if longest > spec.ctx or (longest == spec.ctx and not may_fill):
        raise InvalidParams(
            f"the prompt has {longest} tokens, but pool {spec.pool_id} has a context of {spec.ctx}; shorten the prompt",
            engine=spec.engine,
            details={"prompt_tokens": longest, "pool_ctx": spec.ctx},
        )
    if not writes(request):
        return 0
    room = spec.ctx - longest
    if request.max_tokens is None:
        return min(spec.max_tokens, room)
    if request.max_tokens > room:
        raise InvalidParams(
            f"the prompt's {longest} tokens and `max_tokens` {request.max_tokens} exceed the context of {spec.ctx}; "
            f"ask for at most {room}",
            engine=spec.engine,
            details={"prompt_tokens": longest, "max_tokens": request.max_tokens, "pool_ctx": spec.ctx},
        )
    return request.max_tokens


def check_bounds(request: TaskRequest, spec: PoolSpec, token_bounds: Sequence[int]) -> int:
    """The same while nobody can count: admitted is only what fits for certain, the whole answer included (HP-ADM-7).

    An answer is not cut to what the bound leaves, or its length would depend on when the model had loaded.
    """
    max_tokens = spec.max_tokens if request.max_tokens is None else request.max_tokens
    max_tokens = max_tokens if writes(request) else 0
    if max(token_bounds) + max_tokens > spec.ctx:
        raise PoolUnready(
            f"no replica of pool {spec.pool_id} is ready to count the prompt's tokens, and the task may not fit its "
            f"context of {spec.ctx}; repeat once the pool is ready, or ask for fewer `max_tokens`",
            engine=spec.engine,
            retry_after_ms=1000,
        )
    return max_tokens


def refusal_after_all(request: TaskRequest, spec: PoolSpec, bounds: Sequence[int]) -> InvalidParams | None:
    """Why a task that was admitted before anything was known of its model cannot run on it. `bounds`: of its prompts,
    in tokens."""
    if request.engine not in (None, spec.engine):
        return InvalidParams(f"the model is served by engine {spec.engine}; leave `engine` out", engine=spec.engine)
    if (reason := incapacity(spec, request)) is not None:
        return InvalidParams(reason, engine=spec.engine)
    asked = request.max_tokens or 0 if writes(request) else 0
    needed = max(request.ctx or 0, max(bounds, default=0) + asked)
    if needed > spec.ctx:
        return InvalidParams(
            f"the model has a context of {spec.ctx} tokens, and the task may need {needed}; ask for less",
            engine=spec.engine,
            details={"ctx": needed, "pool_ctx": spec.ctx},
        )
    return None


def _check_chances(request: TaskRequest, tokens: int) -> None:
    """The stream keeps what it tells of each token until the task is forgotten."""
    if request.logprobs is not None and tokens * (request.logprobs + 1) > CHANCES_MAX:
        raise InvalidParams(
            f"`logprobs` {request.logprobs} of {tokens} tokens are more than {CHANCES_MAX} likelihoods; ask for fewer "
            "of either",
            param="logprobs",
        )


def task_of(
    request: TaskRequest,
    pool: Pool,
    prompt_tokens: Sequence[int],
    *,
    are_tokens_exact: bool,
    number: int,
    task_id: str,
    seed: int,
    correlation_id: str,
    now: float,
) -> Task:
    """The task that the request would be; a refusal where its lengths do not fit the pool."""
    check = check_lengths if are_tokens_exact else check_bounds
    max_tokens = check(request, pool.spec, prompt_tokens)
    _check_chances(request, max_tokens * len(prompt_tokens))
    return Task(
        request=request,
        task_id=task_id,
        number=number,
        pool=pool,
        seed=seed,
        max_tokens=max_tokens,
        correlation_id=correlation_id,
        created_s=now,
        deadline_s=None if request.deadline_ms is None else now + request.deadline_ms / 1000,
        tokens_in=sum(prompt_tokens) if are_tokens_exact else None,
        prompts=len(prompt_tokens),
    )
