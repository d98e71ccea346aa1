"""What the command line's client says to the service and what it needs to hear: one test, one interaction.

A test's name is its interaction's description. tests/pact/states.py holds what `given` names.
"""

from __future__ import annotations

import hashlib

import msgspec
import pytest
from msgspec import UNSET

from llama_orch.client import ApiError, Client, Frame
from llama_orch.contract.models import (
    Artifact,
    ArtifactKind,
    CatalogModelRequest,
    Determinism,
    DrainRequest,
    EndFrame,
    Error,
    ErrorCode,
    FetchRequest,
    FetchState,
    FinishReason,
    MetricsFrame,
    ModelState,
    ModelStateRequest,
    OutboundCheck,
    Priority,
    ReloadRequest,
    Sampling,
    StartedFrame,
    TaskRequest,
    TaskState,
    TokenFrame,
    VerificationOutcome,
    VerificationState,
    Workload,
)
from pact import match
from tests.pact.exchange import (
    BACKOFF_HEADERS,
    CORRELATION_ID,
    COUNT,
    DIGEST,
    METRICS,
    STARTED,
    TOKEN_FRAME,
    Exchange,
    any_of,
    backoff,
    digest,
    error,
    frame,
    sse,
    stream_of,
    timestamp,
    uuid_text,
)

pytestmark = pytest.mark.spec("HP-ALN-2")

TASK_ID = "3f2b8c1e-9d5a-4c57-8a43-0c7d5b1f2e90"
SESSION_ID = "7a1d0f3c-5b2e-4f6a-8c9d-1e2f3a4b5c6d"
SECOND_ID = "8d0e7a52-41c6-4b0f-b3d9-6f1a2c7e5b84"
MODEL = "builtin:tiny"
ELSEWHERE = "openai:box/org/model"
TASK = TaskRequest(task_id=TASK_ID, model_ref=MODEL, prompt="Once upon a time", max_tokens=8, seed=7)
ON_LLAMACPP = msgspec.structs.replace(
    TASK, engine="llamacpp", determinism=Determinism.STRICT, sampler_profile_version="greedy-v1"
)
EMBEDDING = TaskRequest(
    task_id=TASK_ID, model_ref=MODEL, workload=Workload.EMBEDDING, inputs=["a red fox", "an old dog"], seed=7
)
RANKING = TaskRequest(
    task_id=TASK_ID, model_ref=MODEL, workload=Workload.RERANK, inputs=["red fox", "a red fox", "an old dog"], seed=7
)
PATH = f"/v1/tasks/{TASK_ID}"


def fields_of(request: TaskRequest) -> dict[str, object]:
    """Those that say something, for a state that submits the task."""
    return {name: value for name, value in msgspec.to_builtins(request).items() if value is not None}


class Misspelt(TaskRequest, frozen=True, kw_only=True):
    """What a client of another version may send."""

    max_token: int


def admission(**fields: object) -> dict[str, object]:
    """The verdict over TASK; by default it has started."""
    started = {"queue_position": 0, "predicted_start_ms": 0, "backoff_ms": 0}
    return {"task_id": TASK_ID, "pool_id": "default", "seed": 7, **started, **fields}


def refusal(client: Client, request: TaskRequest = TASK) -> ApiError:
    with pytest.raises(ApiError) as caught:
        client.submit(request)
    return caught.value


# -- admission -------------------------------------------------------------------------------------------------------


def test_a_task_starts_at_once_on_an_idle_pool(exchange: Exchange) -> None:
    """Position and prediction are 0, there is no wait, and the seed is the one that was asked for."""
    exchange.given("an idle pool")
    exchange.asks("POST", "/v1/tasks", body=TASK)
    exchange.gets(202, admission())
    with exchange.client() as client:
        verdict = client.submit(TASK)
    assert (verdict.queue_position, verdict.predicted_start_ms, verdict.backoff_ms, verdict.seed) == (0, 0, 0, 7)


def test_a_task_without_a_seed_is_told_its_seed(exchange: Exchange) -> None:
    """The service chooses one and reports it."""
    unseeded = msgspec.structs.replace(TASK, seed=None)
    exchange.given("an idle pool")
    exchange.asks("POST", "/v1/tasks", body=unseeded)
    exchange.gets(202, admission(seed=match.int(1234567)))
    with exchange.client() as client:
        assert client.submit(unseeded).seed == 1234567


def test_nothing_is_predicted_before_anything_was_measured(exchange: Exchange) -> None:
    """A task that has to wait on a cold start is told its position, and null for the start."""
    exchange.given("a busy pool")
    exchange.asks("POST", "/v1/tasks", body=TASK)
    exchange.gets(202, admission(predicted_start_ms=None))
    with exchange.client() as client:
        verdict = client.submit(TASK)
    assert (verdict.queue_position, verdict.predicted_start_ms) == (0, None)


FETCHED = msgspec.structs.replace(TASK, model_ref="hf:org/repo/story.gguf")


def test_a_task_waits_for_a_model_that_is_fetched_for_it(exchange: Exchange) -> None:
    """It is admitted with its position, and null for the start."""
    exchange.given("a hub that is slow")
    exchange.asks("POST", "/v1/tasks", body=FETCHED)
    exchange.gets(202, admission(predicted_start_ms=None, pool_id=match.str("on-demand-story")))
    with exchange.client() as client:
        verdict = client.submit(FETCHED)
    assert (verdict.queue_position, verdict.predicted_start_ms) == (0, None)


def test_a_model_that_may_not_be_fetched_is_refused(exchange: Exchange) -> None:
    """403 POLICY_DENIED, with the rule."""
    exchange.given("a hub that may not be called")
    exchange.asks("POST", "/v1/tasks", body=FETCHED)
    denied = error("POLICY_DENIED", policy_label="address", details={"audit_id": uuid_text})
    exchange.gets(403, denied)
    with exchange.client() as client:
        assert refusal(client, FETCHED).error.policy_label == "address"


def test_a_start_is_predicted_from_what_was_measured(exchange: Exchange) -> None:
    """A task that has to wait is told when it will start, in milliseconds."""
    exchange.given("a busy pool of known speed")
    exchange.asks("POST", "/v1/tasks", body=TASK)
    exchange.gets(202, admission(predicted_start_ms=match.int(420)))
    with exchange.client() as client:
        assert client.submit(TASK).predicted_start_ms == 420


def test_a_short_prompt_may_wait_for_a_pool_that_loads(exchange: Exchange) -> None:
    """What certainly fits is admitted before there is a tokenizer to ask."""
    exchange.given("a pool that loads its model")
    exchange.asks("POST", "/v1/tasks", body=TASK)
    exchange.gets(202, admission(predicted_start_ms=None))
    with exchange.client() as client:
        assert client.submit(TASK).predicted_start_ms is None


def test_a_newcomer_takes_the_place_of_the_oldest_under_drop_lru(exchange: Exchange) -> None:
    """It is admitted, and asked to wait before it submits more."""
    exchange.given("a full queue", full_policy="drop-lru")
    exchange.asks("POST", "/v1/tasks", body=TASK)
    exchange.gets(202, admission(predicted_start_ms=None, backoff_ms=match.int(500)))
    with exchange.client() as client:
        assert client.submit(TASK).backoff_ms == 500


def test_a_repeated_submission_is_the_same_task(exchange: Exchange) -> None:
    """The same ID with the same body is answered as before, and nothing is run twice."""
    exchange.given("a task waits", **fields_of(TASK))
    exchange.asks("POST", "/v1/tasks", body=TASK)
    exchange.gets(202, admission(predicted_start_ms=None))
    with exchange.client() as client:
        assert client.submit(TASK).task_id == TASK_ID


def test_a_strict_task_names_seed_determinism_and_sampler_profile(exchange: Exchange) -> None:
    """All that a repeatable run depends on can be asked for, and llama.cpp takes it."""
    exchange.given("an idle pool on llamacpp")
    exchange.asks("POST", "/v1/tasks", body=ON_LLAMACPP)
    exchange.gets(202, admission())
    with exchange.client() as client:
        assert client.submit(ON_LLAMACPP).seed == 7


# -- refusals --------------------------------------------------------------------------------------------------------


def test_an_unknown_field_is_refused(exchange: Exchange) -> None:
    """400, with the nearest field that is known."""
    misspelt = Misspelt(task_id=TASK_ID, model_ref=MODEL, prompt="Once upon a time", max_token=8)
    exchange.given("an idle pool")
    exchange.asks("POST", "/v1/tasks", body=misspelt)
    hint = match.regex("unknown field `max_token`; did you mean `max_tokens`?", regex=r".*max_tokens.*")
    exchange.gets(400, error("INVALID_PARAMS", message=hint))
    with exchange.client() as client:
        assert "max_tokens" in refusal(client, misspelt).error.message


def test_a_prompt_over_the_context_is_refused(exchange: Exchange) -> None:
    """400 with both figures, as the model's own tokenizer counts."""
    long = msgspec.structs.replace(ON_LLAMACPP, prompt="fox " * 400)
    exchange.given("an idle pool on llamacpp", ctx=256)
    exchange.asks("POST", "/v1/tasks", body=long)
    details = {"prompt_tokens": match.int(402), "pool_ctx": 256}
    exchange.gets(400, error("INVALID_PARAMS", engine="llamacpp", details=details))
    with exchange.client() as client:
        assert refusal(client, long).error.details == {"prompt_tokens": 402, "pool_ctx": 256}


def test_a_workload_that_no_pool_can_do_is_refused(exchange: Exchange) -> None:
    """400 with the pools that can, of which there are none here."""
    ranking = msgspec.structs.replace(RANKING, engine="llamacpp")
    exchange.given("an idle pool on llamacpp")
    exchange.asks("POST", "/v1/tasks", body=ranking)
    details = {"workload": "rerank", "pools_able": []}
    exchange.gets(400, error("INVALID_PARAMS", engine="llamacpp", details=details))
    with exchange.client() as client:
        assert refusal(client, ranking).error.details == details


def test_what_an_embedding_has_no_use_of_is_refused(exchange: Exchange) -> None:
    """400, and the field's name."""
    limited = msgspec.structs.replace(EMBEDDING, max_tokens=8)
    exchange.given("an idle pool")
    exchange.asks("POST", "/v1/tasks", body=limited)
    hint = match.regex("`max_tokens` is about text that is written; leave it out", regex=r".*`max_tokens`.*")
    exchange.gets(400, error("INVALID_PARAMS", message=hint))
    with exchange.client() as client:
        assert "max_tokens" in refusal(client, limited).error.message


def test_a_schema_that_cannot_be_kept_is_refused(exchange: Exchange) -> None:
    """400 with the keyword and its place."""
    asked = msgspec.structs.replace(ON_LLAMACPP, sampling=Sampling(json_schema={"not": {"type": "string"}}))
    exchange.given("an idle pool on llamacpp")
    exchange.asks("POST", "/v1/tasks", body=asked)
    hint = match.regex("`sampling.json_schema` is refused: at # there is 'not'", regex=r".*json_schema.* 'not'.*")
    exchange.gets(400, error("INVALID_PARAMS", message=hint, engine=match.type(None)))
    with exchange.client() as client:
        assert "'not'" in refusal(client, asked).error.message


def test_a_strict_task_is_refused_where_the_engine_cannot_be(exchange: Exchange) -> None:
    """400: what is asked for by name is kept or refused, also on a server elsewhere."""
    asked = msgspec.structs.replace(ON_LLAMACPP, model_ref=ELSEWHERE, engine=None, determinism=Determinism.STRICT)
    exchange.given("an idle pool on a server elsewhere")
    exchange.asks("POST", "/v1/tasks", body=asked)
    hint = match.regex("pool default does not offer `determinism` strict; leave it out", regex=r".*`determinism`.*")
    exchange.gets(400, error("INVALID_PARAMS", message=hint, engine="openai"))
    with exchange.client() as client:
        assert "`determinism`" in refusal(client, asked).error.message


def test_a_wrong_token_is_refused(exchange: Exchange) -> None:
    """401, and the scheme to authenticate with."""
    exchange.given("an idle pool")
    exchange.asks("POST", "/v1/tasks", body=TASK, token="wrong")
    exchange.gets(401, error("UNAUTHORIZED"), headers={"WWW-Authenticate": "Bearer"})
    with exchange.client(token="wrong") as client:
        assert refusal(client).status == 401


def test_an_unknown_model_is_not_found(exchange: Exchange) -> None:
    """404: no pool serves it."""
    unknown = msgspec.structs.replace(TASK, model_ref="builtin:none")
    exchange.given("an idle pool")
    exchange.asks("POST", "/v1/tasks", body=unknown)
    exchange.gets(404, error("NOT_FOUND"))
    with exchange.client() as client:
        assert refusal(client, unknown).status == 404


def test_a_task_id_stands_for_one_body(exchange: Exchange) -> None:
    """409 when it comes again with another one."""
    exchange.given("a task waits", task_id=TASK_ID, prompt="Something else")
    exchange.asks("POST", "/v1/tasks", body=TASK)
    exchange.gets(409, error("CONFLICT"))
    with exchange.client() as client:
        assert refusal(client).error.code is ErrorCode.CONFLICT


def test_a_full_queue_refuses_under_reject(exchange: Exchange) -> None:
    """429 with the policy's name; the client waits for as long as the answer says before it asks again."""
    exchange.given("a full queue", full_policy="reject")
    exchange.asks("POST", "/v1/tasks", body=TASK)
    exchange.gets(429, backoff("ADMISSION_REJECT", policy_label="reject"), headers=BACKOFF_HEADERS)
    with exchange.client() as client:
        refused = refusal(client)
    assert refused.error.policy_label == "reject"
    assert exchange.waits == [1.2]


def test_a_full_queue_refuses_lower_priorities_under_drop_lru(exchange: Exchange) -> None:
    """429 with the policy's name for a `batch` task while only `interactive` ones wait."""
    batch = msgspec.structs.replace(TASK, priority=Priority.BATCH)
    exchange.given("a full queue", full_policy="drop-lru")
    exchange.asks("POST", "/v1/tasks", body=batch)
    exchange.gets(429, backoff("ADMISSION_REJECT", policy_label="drop-lru"), headers=BACKOFF_HEADERS)
    with exchange.client() as client:
        refused = refusal(client, batch)
    assert refused.error.policy_label == "drop-lru"
    assert exchange.waits == [1.2]


def test_a_deadline_that_cannot_be_met_is_refused(exchange: Exchange) -> None:
    """429 at once, rather than a task that is bound to fail."""
    hurried = msgspec.structs.replace(TASK, deadline_ms=1)
    exchange.given("a busy pool of known speed")
    exchange.asks("POST", "/v1/tasks", body=hurried)
    exchange.gets(429, backoff("DEADLINE_UNMET", policy_label="deadline"), headers=BACKOFF_HEADERS)
    with exchange.client() as client:
        assert refusal(client, hurried).error.code is ErrorCode.DEADLINE_UNMET


def test_a_session_has_its_turns(exchange: Exchange) -> None:
    """409 to the task behind the last one."""
    told = msgspec.structs.replace(TASK, session_id=SESSION_ID)
    exchange.given("a session", session_id=SESSION_ID, max_turns=1)
    exchange.asks("POST", "/v1/tasks", body=told)
    exchange.gets(409, error("SESSION_EXPIRED"))
    with exchange.client() as client:
        assert refusal(client, told).error.code is ErrorCode.SESSION_EXPIRED


def test_a_session_has_its_budget(exchange: Exchange) -> None:
    """429 before it is queued, with what is left in a header, and no word of a repeat."""
    told = msgspec.structs.replace(TASK, session_id=SESSION_ID, max_tokens=1000)
    left = {"X-Budget-Tokens-Remaining": match.regex("87", regex=r"\d+")}
    exchange.given("a session", session_id=SESSION_ID, budget_tokens=100)
    exchange.asks("POST", "/v1/tasks", body=told)
    exchange.gets(
        429, backoff("BUDGET_EXHAUSTED", policy_label="budget", retriable=False), headers={**BACKOFF_HEADERS, **left}
    )
    with exchange.client() as client:
        assert refusal(client, told).error.policy_label == "budget"
    assert exchange.waits == []


def test_a_task_is_told_what_its_session_has_left(exchange: Exchange) -> None:
    """In a header of the admission."""
    told = msgspec.structs.replace(TASK, session_id=SESSION_ID)
    exchange.given("a session", session_id=SESSION_ID, budget_tokens=1000)
    exchange.asks("POST", "/v1/tasks", body=told)
    exchange.gets(202, admission(), headers={"X-Budget-Tokens-Remaining": match.regex("974", regex=r"\d+")})
    with exchange.client() as client:
        assert client.submit(told).task_id == TASK_ID


def test_a_session_is_read(exchange: Exchange) -> None:
    """How long it lasts, and what its tasks may still use."""
    exchange.given("a session", session_id=SESSION_ID, budget_tokens=1000)
    exchange.asks("GET", f"/v1/sessions/{SESSION_ID}")
    exchange.gets(
        200,
        {
            "ttl_ms_remaining": match.int(598200),
            "turns": match.int(1),
            "kv_bytes": match.int(0),
            "kv_warmth": match.bool(True),
            "tokens_budget_remaining": match.int(987),
            "time_budget_remaining_ms": None,
            "cost_budget_remaining": None,
        },
    )
    with exchange.client() as client:
        session = client.session(SESSION_ID)
    assert (session.turns, session.kv_warmth, session.time_budget_remaining_ms) == (1, True, None)


def test_an_unknown_session_is_not_found(exchange: Exchange) -> None:
    """404: no task has named it, or it has ended."""
    exchange.given("an idle pool")
    exchange.asks("GET", f"/v1/sessions/{SESSION_ID}")
    exchange.gets(404, error("NOT_FOUND"))
    with exchange.client() as client, pytest.raises(ApiError) as caught:
        client.session(SESSION_ID)
    assert caught.value.status == 404


def test_a_session_is_ended(exchange: Exchange) -> None:
    """204 without a body."""
    exchange.given("a session", session_id=SESSION_ID)
    exchange.asks("DELETE", f"/v1/sessions/{SESSION_ID}")
    exchange.gets(204)
    with exchange.client() as client:
        client.delete_session(SESSION_ID)


def test_a_session_that_is_not_there_is_ended(exchange: Exchange) -> None:
    """204 as well."""
    exchange.given("an idle pool")
    exchange.asks("DELETE", f"/v1/sessions/{SESSION_ID}")
    exchange.gets(204)
    with exchange.client() as client:
        client.delete_session(SESSION_ID)


def test_a_long_prompt_cannot_wait_for_a_pool_that_loads(exchange: Exchange) -> None:
    """503 while nobody can count its tokens, and when to come back."""
    long = msgspec.structs.replace(TASK, prompt="fox " * 600)
    exchange.given("a pool that loads its model")
    exchange.asks("POST", "/v1/tasks", body=long)
    exchange.gets(503, backoff("POOL_UNREADY"), headers=BACKOFF_HEADERS)
    with exchange.client() as client:
        assert refusal(client, long).error.code is ErrorCode.POOL_UNREADY
    assert exchange.waits == [1.2]


def test_a_service_that_ends_takes_no_more_tasks(exchange: Exchange) -> None:
    """503, and when it may be back."""
    exchange.given("a service that is ending")
    exchange.asks("POST", "/v1/tasks", body=TASK)
    exchange.gets(503, backoff("POOL_UNAVAILABLE"), headers=BACKOFF_HEADERS)
    with exchange.client() as client:
        assert refusal(client).can_pass


# -- streams ---------------------------------------------------------------------------------------------------------

STARTED_FRAME = StartedFrame(task_id=TASK_ID, queue_position=0, predicted_start_ms=0)
METRICS_FRAME = MetricsFrame(
    queue_depth=0,
    queue_position=None,
    predicted_start_ms=None,
    tokens_in=5,
    tokens_out=2,
    on_time_probability=None,
    kv_warmth=False,
    tokens_budget_remaining=None,
    time_budget_remaining_ms=None,
    cost_budget_remaining=None,
)
END_FRAME = EndFrame(
    tokens_in=5,
    tokens_out=8,
    decode_time_ms=160,
    finish_reason=FinishReason.LENGTH,
    seed=7,
    model_digest=DIGEST,
    engine="llamacpp",
    engine_version="2026.10.11549",
    sampler_profile_version="greedy-v1",
    kv_warmth=False,
)
STORY: list[Frame] = [STARTED_FRAME, TokenFrame(t=" there", i=0), TokenFrame(t=" was", i=1), METRICS_FRAME, END_FRAME]


def end(**fields: str) -> str:
    return frame("end", tokens_in=r"[1-9]\d*", decode_time_ms=COUNT, kv_warmth="false", **fields)


def streams(exchange: Exchange, example: list[Frame], pattern: str, *, after: int | None = None) -> list[Frame]:
    """Let the client read the example from its start, or from behind frame `after`."""
    headers = {"Accept": "text/event-stream"} | ({} if after is None else {"Last-Event-ID": str(after)})
    exchange.asks("GET", f"{PATH}/stream", headers=headers)
    first = 0 if after is None else after + 1
    exchange.gets_text("text/event-stream", sse(*example[first:], first=first), pattern)
    with exchange.client() as client:
        return list(client.stream(TASK_ID, "" if after is None else str(after)))


def fails(
    exchange: Exchange,
    code: str,
    *,
    retry_after_ms: int | None = None,
    policy_label: str | None = None,
) -> Error:
    """A stream that ends in an `error` frame, which the client hands out as the last one."""
    example = Error(
        code=ErrorCode(code),
        message="What to do next.",
        engine="llamacpp",
        correlation_id="c-1",
        retriable=retry_after_ms is not None,
        retry_after_ms=UNSET if retry_after_ms is None else retry_after_ms,
        policy_label=UNSET if policy_label is None else policy_label,
    )
    fields = {"code": f'"{code}"', "message": r'"[^\n]+"', "engine": r'"[^"]+"', "correlation_id": r'"[^"]+"'}
    fields |= {"retriable": "false"} if retry_after_ms is None else {"retriable": "true", "retry_after_ms": r"[1-9]\d*"}
    fields |= {} if policy_label is None else {"policy_label": f'"{policy_label}"'}
    pattern = stream_of(STARTED, METRICS, frame("error", **fields))
    last = streams(exchange, [STARTED_FRAME, METRICS_FRAME, example], pattern)[-1]
    assert isinstance(last, Error)
    return last


def test_a_stream_has_started_tokens_metrics_and_end(exchange: Exchange) -> None:
    """`started` first, `token` and `metrics` in between, `end` last, each with all of its fields."""
    exchange.given("a task has succeeded", **fields_of(TASK))
    last = end(tokens_out="8", finish_reason='"length"', seed="7", sampler_profile_version='"v1"')
    frames = streams(exchange, STORY, stream_of(STARTED, any_of(TOKEN_FRAME, METRICS), METRICS, last))
    assert frames == STORY


def test_a_live_stream_of_llamacpp_names_what_repeats_the_run(exchange: Exchange) -> None:
    """The model's words, and in `end`: seed, digest, engine, its version and the sampler profile."""
    exchange.given("a task was submitted to llamacpp", **fields_of(ON_LLAMACPP))
    word = frame("token", t='" [a-z]+"', i=COUNT)  # the model tells stories
    last = end(
        tokens_out="8",
        finish_reason='"length"',
        seed="7",
        model_digest='"sha256:[0-9a-f]{64}"',
        engine='"llamacpp"',
        engine_version=r'"[^"]*\d[^"]*"',
        sampler_profile_version='"greedy-v1"',
    )
    frames = any_of(TOKEN_FRAME, METRICS)
    assert streams(exchange, STORY, stream_of(STARTED, frames, word, frames, last))[-1] == END_FRAME


def test_an_embeddings_vectors_are_on_its_end(exchange: Exchange) -> None:
    """One for each input, and no tokens."""
    exchange.given("a task has succeeded", **fields_of(EMBEDDING))
    numbers = r"-?\d[^\],]*(,-?\d[^\],]*)*"
    last = end(tokens_out="0", finish_reason='"stop"', embeddings=rf"\[\[{numbers}\],\[{numbers}\]\]")
    done = msgspec.structs.replace(END_FRAME, tokens_out=0, finish_reason=FinishReason.STOP, decode_time_ms=0)
    done = msgspec.structs.replace(done, embeddings=[[0.6, -0.8], [1.0, 0.0]])
    frames = streams(exchange, [STARTED_FRAME, METRICS_FRAME, done], stream_of(STARTED, METRICS, last))
    assert frames == [STARTED_FRAME, METRICS_FRAME, done]


def test_a_rankings_scores_are_on_its_end(exchange: Exchange) -> None:
    """One for each document, which are the inputs behind the query."""
    exchange.given("a task has succeeded", **fields_of(RANKING))
    last = end(tokens_out="0", finish_reason='"stop"', scores=r"\[-?\d[^\],]*,-?\d[^\],]*\]")
    done = msgspec.structs.replace(END_FRAME, tokens_out=0, finish_reason=FinishReason.STOP, decode_time_ms=0)
    done = msgspec.structs.replace(done, scores=[1.0, 0.25])
    frames = streams(exchange, [STARTED_FRAME, METRICS_FRAME, done], stream_of(STARTED, METRICS, last))
    assert frames == [STARTED_FRAME, METRICS_FRAME, done]


def test_an_answer_matches_its_schema(exchange: Exchange) -> None:
    """Real words of a real model, in the form that was asked for."""
    schema = {"enum": ["yes", "no"]}
    asked = msgspec.structs.replace(ON_LLAMACPP, max_tokens=None, sampling=Sampling(json_schema=schema))
    exchange.given("a task was submitted to llamacpp", **fields_of(asked))
    word = frame("token", t=r'"[\\\"yeno]+"', i=COUNT)
    example: list[Frame] = [STARTED_FRAME, TokenFrame(t='"yes"', i=0), METRICS_FRAME]
    example.append(msgspec.structs.replace(END_FRAME, finish_reason=FinishReason.STOP))
    frames = streams(exchange, example, stream_of(STARTED, any_of(word, METRICS), METRICS, end(finish_reason='"stop"')))
    assert frames == example


def test_a_stream_goes_on_behind_the_last_frame_that_came(exchange: Exchange) -> None:
    """`Last-Event-ID` leaves out what the client has."""
    exchange.given("a task has succeeded", **fields_of(TASK))
    number = r"(1\d|[2-9])"
    token = frame("token", number=number, t=r'"[^\n]+"', i=COUNT)
    metrics = frame("metrics", number=number, tokens_out=COUNT)
    frames = streams(exchange, STORY, stream_of(any_of(token, metrics), end(seed="7")), after=1)
    assert frames == STORY[2:]


def test_a_canceled_stream_ends_in_an_error(exchange: Exchange) -> None:
    """CANCELED, which a repeat would not help."""
    exchange.given("a task was canceled", task_id=TASK_ID)
    assert fails(exchange, "CANCELED").code is ErrorCode.CANCELED


def test_a_stream_ends_in_an_error_when_the_worker_dies(exchange: Exchange) -> None:
    """WORKER_RESET, and when to submit the task again."""
    exchange.given("a task lost its worker", task_id=TASK_ID)
    assert fails(exchange, "WORKER_RESET", retry_after_ms=1000).retriable


def test_a_stream_ends_in_an_error_when_the_deadline_passes(exchange: Exchange) -> None:
    """DEADLINE_UNMET with its policy label."""
    exchange.given("a task missed its deadline", task_id=TASK_ID)
    last = fails(exchange, "DEADLINE_UNMET", retry_after_ms=1000, policy_label="deadline")
    assert last.policy_label == "deadline"


def test_a_dropped_tasks_stream_ends_in_an_error(exchange: Exchange) -> None:
    """QUEUE_FULL_DROP_LRU with the policy's name and when to submit the task again."""
    exchange.given("a task was dropped from a full queue", task_id=TASK_ID)
    last = fails(exchange, "QUEUE_FULL_DROP_LRU", retry_after_ms=1200, policy_label="drop-lru")
    assert last.policy_label == "drop-lru"


def test_an_unknown_task_has_no_stream(exchange: Exchange) -> None:
    """404, before any frame."""
    exchange.given("an idle pool")
    exchange.asks("GET", f"{PATH}/stream", headers={"Accept": "text/event-stream"})
    exchange.gets(404, error("NOT_FOUND"))
    with exchange.client() as client, pytest.raises(ApiError, match="What happened"):
        next(client.stream(TASK_ID))


# -- cancel ----------------------------------------------------------------------------------------------------------


def test_a_running_task_is_canceled(exchange: Exchange) -> None:
    """204 without a body."""
    exchange.given("a task runs", task_id=TASK_ID)
    exchange.asks("POST", f"{PATH}/cancel")
    exchange.gets(204)
    with exchange.client() as client:
        client.cancel(TASK_ID)


def test_a_task_that_has_ended_is_left_as_it_is(exchange: Exchange) -> None:
    """To cancel it is no error."""
    exchange.given("a task has succeeded", task_id=TASK_ID)
    exchange.asks("POST", f"{PATH}/cancel")
    exchange.gets(204)
    with exchange.client() as client:
        client.cancel(TASK_ID)


def test_an_unknown_task_is_not_canceled(exchange: Exchange) -> None:
    """404."""
    exchange.given("an idle pool")
    exchange.asks("POST", f"{PATH}/cancel")
    exchange.gets(404, error("NOT_FOUND"))
    with exchange.client() as client, pytest.raises(ApiError, match="What happened"):
        client.cancel(TASK_ID)


# -- tasks -----------------------------------------------------------------------------------------------------------


def status(state: str, **fields: object) -> dict[str, object]:
    """A task that waits, in every field; `fields` are what differs."""
    waiting = {
        "task_id": TASK_ID,
        "session_id": None,
        "state": state,
        "priority": "interactive",
        "engine": match.str("llamacpp"),
        "pool_id": "default",
        "replica_id": None,
        "queue_position": None,
        "predicted_start_ms": None,
        "created_at": timestamp,
        "started_at": None,
        "ended_at": None,
        "tokens_in": match.int(5),
        "tokens_out": match.int(0),
        "seed": match.int(7),
        "placement": None,
        "error": None,
        "text": None,
    }
    return waiting | fields


PLACED = {"replica_id": "default-0", "placement": match.str("default-0 chosen of 1"), "started_at": timestamp}
ENDED = PLACED | {"ended_at": timestamp, "tokens_out": 8, "text": match.regex(" there was a fox", regex=r"[\s\S]+")}


def test_a_waiting_task_is_read(exchange: Exchange) -> None:
    """Its place in the queue, and no replica yet."""
    exchange.given("a task waits", task_id=TASK_ID)
    exchange.asks("GET", PATH)
    exchange.gets(200, status("queued", queue_position=0))
    with exchange.client() as client:
        assert client.get_task(TASK_ID).queue_position == 0


def test_a_running_task_is_read(exchange: Exchange) -> None:
    """Where it runs and why there."""
    exchange.given("a task runs", task_id=TASK_ID)
    exchange.asks("GET", PATH)
    exchange.gets(200, status("running", **PLACED))
    with exchange.client() as client:
        assert client.get_task(TASK_ID).state is TaskState.RUNNING


def test_a_task_that_succeeded_is_read(exchange: Exchange) -> None:
    """With its whole text."""
    exchange.given("a task has succeeded", **fields_of(TASK))
    exchange.asks("GET", PATH)
    exchange.gets(200, status("succeeded", **ENDED, seed=7))
    with exchange.client() as client:
        assert client.get_task(TASK_ID).text == " there was a fox"


def test_a_task_that_failed_is_read(exchange: Exchange) -> None:
    """With the error of its stream."""
    exchange.given("a task lost its worker", task_id=TASK_ID)
    exchange.asks("GET", PATH)
    reset = backoff("WORKER_RESET", correlation_id=match.str("c-1"))
    exchange.gets(200, status("failed", **PLACED, ended_at=timestamp, text="", error=reset))
    with exchange.client() as client:
        found = client.get_task(TASK_ID).error
    assert found is not None
    assert found.code is ErrorCode.WORKER_RESET


def test_an_unknown_task_is_not_found(exchange: Exchange) -> None:
    """404."""
    exchange.given("an idle pool")
    exchange.asks("GET", PATH)
    exchange.gets(404, error("NOT_FOUND"))
    with exchange.client() as client, pytest.raises(ApiError, match="What happened"):
        client.get_task(TASK_ID)


def test_tasks_are_listed_newest_first(exchange: Exchange) -> None:
    """One page of those in a state, and the way to the next page."""
    exchange.given("a task has succeeded", task_id=SECOND_ID)
    exchange.given("a task has succeeded", task_id=TASK_ID)
    exchange.asks("GET", "/v1/tasks", query={"state": "succeeded", "limit": "1"})
    exchange.gets(200, {"items": [status("succeeded", **ENDED)], "next_cursor": match.str("2")})
    with exchange.client() as client:
        page = client.list_tasks(state=TaskState.SUCCEEDED, limit=1)
    assert [task.task_id for task in page.items] == [TASK_ID]
    assert page.next_cursor == "2"


# -- the installation ------------------------------------------------------------------------------------------------

POLICY = match.regex("reject", regex="reject|drop-lru")
NAMES = match.each_like(match.str("chat"), min=1)
ENGINE = {
    "engine": match.str("llamacpp"),
    "version": match.str("2026.10.11549"),
    "workloads": match.each_like("completion", min=1),
    "ctx_max": match.int(2048),
    "determinism": match.str("strict: the same bytes for the same seed"),
    "features": NAMES,
}
POOL_CAPABILITY = {
    "id": match.str("default"),
    "engine": match.str("llamacpp"),
    "model": match.str(MODEL),
    "workloads": match.each_like("completion", min=1),
    "ctx": match.int(2048),
    "slots": match.int(4),
    "max_tokens": match.int(256),
    "recommended_concurrency": match.int(1),
    "sampler_profile_version": match.str("v1"),
}
DEVICE = {
    "id": match.str("gpu0"),
    "name": match.str("NVIDIA GeForce RTX 3090"),
    "backend": match.regex("cuda", regex="cuda|cpu|simulated"),
    "vram_total_bytes": match.int(25769803776),
    "vram_free_bytes": match.int(20000000000),
    "vram_reserved_bytes": match.int(5000000000),
    "problem": None,
}
PROFILE = {
    "version": match.str("v1"),
    "temperature": match.number(0.8),
    "top_k": match.int(40),
    "top_p": match.number(0.95),
    "min_p": match.number(0.05),
    "repeat_penalty": match.number(1.0),
}
CAPABILITIES = {
    "api_version": match.regex("2.3.0", regex=r"\d+\.\d+\.\d+"),
    "engines": match.each_like(ENGINE, min=1),
    "pools": match.each_like(POOL_CAPABILITY, min=1),
    "devices": match.each_like(DEVICE, min=1),
    "concurrency": {"recommended": match.int(1), "slots": match.int(4)},
    "queue": {"capacity": match.int(64), "full_policy": POLICY},
    "rate_limits": {"requests_per_second": None, "streams": match.int(1024), "body_bytes": match.int(8388608)},
    "sampler_profiles": match.each_like(PROFILE, min=1),
    "features": NAMES,
}
POOL = {
    "id": "default",
    "engine": match.str("llamacpp"),
    "engine_version": match.str("2026.10.11549"),
    "model": MODEL,
    "model_digest": digest,
    "ctx": match.int(2048),
    "slots": match.int(4),
    "slots_total": match.int(4),
    "max_tokens": match.int(256),
    "sampler_profile_version": match.str("v1"),
    "queue": {"capacity": match.int(64), "full_policy": POLICY},
    "queue_depth": {"interactive": 0, "batch": 0},
    "ready": True,
    "on_demand": False,
    "keep_alive_ms": None,
}


def health(replica: dict[str, object], **fields: object) -> dict[str, object]:
    """A pool of one replica that serves; the arguments are what differs."""
    sound = {"id": "default-0", "devices": match.each_like("gpu0", min=1), "state": "ready", "slots_busy": 0}
    sound |= {"slots_total": match.int(4), "restarts": 0, "last_error": None}
    sound |= {"vram_reserved_bytes": match.int(513145088)}
    counts = {"queue_depth": 0, "tokens_in": match.int(0), "tokens_out": match.int(0), "tokens_per_second": None}
    pool = {"live": True, "ready": True, "draining": False, "last_error": None, "last_reload": None}
    return {**pool, "replicas": [sound | replica], "metrics": counts, **fields}


def test_capabilities_are_read(exchange: Exchange) -> None:
    """Engines, pools, devices, concurrency, queue, limits and sampler profiles."""
    exchange.given("an idle pool")
    exchange.asks("GET", "/v1/capabilities")
    exchange.gets(200, CAPABILITIES)
    with exchange.client() as client:
        assert client.capabilities().concurrency.recommended == 1


def test_pools_are_listed(exchange: Exchange) -> None:
    """All on one page."""
    exchange.given("an idle pool")
    exchange.asks("GET", "/v1/pools")
    exchange.gets(200, {"items": [POOL], "next_cursor": None})
    with exchange.client() as client:
        assert [pool.id for pool in client.pools().items] == ["default"]


def test_a_pool_is_read(exchange: Exchange) -> None:
    """Its model with the digest, its queue and its slots."""
    exchange.given("an idle pool")
    exchange.asks("GET", "/v1/pools/default")
    exchange.gets(200, POOL)
    with exchange.client() as client:
        assert client.pool("default").ready


def test_a_pool_on_a_server_elsewhere_is_read(exchange: Exchange) -> None:
    """Nobody here knows the digest of its model."""
    exchange.given("an idle pool on a server elsewhere")
    exchange.asks("GET", "/v1/pools/default")
    exchange.gets(200, POOL | {"engine": "openai", "model": ELSEWHERE, "model_digest": None})
    with exchange.client() as client:
        assert client.pool("default").model_digest is None


def test_an_unknown_pool_is_not_found(exchange: Exchange) -> None:
    """404."""
    exchange.given("an idle pool")
    exchange.asks("GET", "/v1/pools/nowhere")
    exchange.gets(404, error("NOT_FOUND"))
    with exchange.client() as client, pytest.raises(ApiError, match="What happened"):
        client.pool("nowhere")


def test_a_sound_pools_health_is_read(exchange: Exchange) -> None:
    """Live, ready, and each replica."""
    exchange.given("an idle pool")
    exchange.asks("GET", "/v1/pools/default/health")
    exchange.gets(200, health({}))
    with exchange.client() as client:
        assert client.pool_health("default").ready


def test_the_health_of_a_pool_on_a_server_elsewhere_is_read(exchange: Exchange) -> None:
    """Its replica has no device and no memory here."""
    exchange.given("an idle pool on a server elsewhere")
    exchange.asks("GET", "/v1/pools/default/health")
    exchange.gets(200, health({"devices": [], "vram_reserved_bytes": 0}))
    with exchange.client() as client:
        assert client.pool_health("default").replicas[0].devices == []


def test_a_pools_health_says_why_it_cannot_load(exchange: Exchange) -> None:
    """Live, since it will be tried again, but not ready, and with the worker's reason."""
    reason = match.regex("the model file is damaged", regex=".+")
    exchange.given("a pool whose model cannot be loaded")
    exchange.asks("GET", "/v1/pools/default/health")
    trouble = {"state": match.regex("backoff", regex="backoff|loading"), "restarts": match.int(1), "last_error": reason}
    exchange.gets(200, health(trouble, ready=False, last_error=reason))
    with exchange.client() as client:
        assert client.pool_health("default").last_error == "the model file is damaged"


def test_an_unknown_pool_has_no_health(exchange: Exchange) -> None:
    """404."""
    exchange.given("an idle pool")
    exchange.asks("GET", "/v1/pools/nowhere/health")
    exchange.gets(404, error("NOT_FOUND"))
    with exchange.client() as client, pytest.raises(ApiError, match="What happened"):
        client.pool_health("nowhere")


def test_a_pool_is_drained(exchange: Exchange) -> None:
    """202 with its health: it is draining, and what runs goes on."""
    exchange.given("a busy pool")
    exchange.asks("POST", "/v1/pools/default/drain", body=DrainRequest(deadline_ms=30_000))
    exchange.gets(202, health({"slots_busy": 1}, draining=True))
    with exchange.client() as client:
        assert client.drain_pool("default", 30_000).draining


def test_an_unknown_pool_is_not_drained(exchange: Exchange) -> None:
    """404."""
    exchange.given("an idle pool")
    exchange.asks("POST", "/v1/pools/nowhere/drain", body=DrainRequest(deadline_ms=0))
    exchange.gets(404, error("NOT_FOUND"))
    with exchange.client() as client, pytest.raises(ApiError, match="What happened"):
        client.drain_pool("nowhere", 0)


def test_a_drained_pool_has_unloaded_its_model(exchange: Exchange) -> None:
    """Its replica holds no memory and waits to be loaded again."""
    exchange.given("a drained pool")
    exchange.asks("GET", "/v1/pools/default/health")
    exchange.gets(200, health({"state": "unloaded", "vram_reserved_bytes": 0}, ready=False, draining=True))
    with exchange.client() as client:
        assert client.pool_health("default").replicas[0].vram_reserved_bytes == 0


def test_a_drained_pool_takes_no_new_tasks(exchange: Exchange) -> None:
    """503 POOL_UNAVAILABLE with a wait."""
    exchange.given("a drained pool")
    exchange.asks("POST", "/v1/tasks", body=TASK)
    exchange.gets(503, backoff("POOL_UNAVAILABLE"), headers=BACKOFF_HEADERS)
    with exchange.client() as client:
        assert refusal(client).error.code is ErrorCode.POOL_UNAVAILABLE


def test_a_pool_is_reloaded(exchange: Exchange) -> None:
    """202 with its health: the new model loads beside the old one, which goes on serving."""
    exchange.given("an idle pool")
    exchange.asks("POST", "/v1/pools/default/reload", body=ReloadRequest(new_model_ref=MODEL))
    loading = match.regex("loading builtin:tiny beside builtin:tiny", regex="loading .+")
    sound = health({})["replicas"]
    new = {**sound[0], "id": match.str("default-1"), "state": "loading"}  # type: ignore[index]
    exchange.gets(202, health({}, last_reload=loading, replicas=[sound[0], new]))  # type: ignore[index]
    with exchange.client() as client:
        assert (client.reload_pool("default", MODEL).last_reload or "").startswith("loading")


def test_a_reloads_outcome_is_on_the_health(exchange: Exchange) -> None:
    """`done:` and the models; the old replica is gone."""
    exchange.given("a pool that was reloaded")
    exchange.asks("GET", "/v1/pools/default/health")
    done = match.regex("done: builtin:tiny serves in place of builtin:tiny", regex="done: .+")
    exchange.gets(200, health({"id": match.str("default-1")}, last_reload=done))
    with exchange.client() as client:
        assert (client.pool_health("default").last_reload or "").startswith("done: ")


def test_a_pool_is_reloaded_once_at_a_time(exchange: Exchange) -> None:
    """409 while a reload is under way."""
    exchange.given("a pool that is being reloaded")
    exchange.asks("POST", "/v1/pools/default/reload", body=ReloadRequest(new_model_ref=MODEL))
    exchange.gets(409, error("CONFLICT"))
    with exchange.client() as client, pytest.raises(ApiError, match="What happened"):
        client.reload_pool("default", MODEL)


def test_a_model_that_is_not_there_is_not_loaded(exchange: Exchange) -> None:
    """404, and the pool stays as it is."""
    exchange.given("an idle pool")
    exchange.asks("POST", "/v1/pools/default/reload", body=ReloadRequest(new_model_ref="builtin:none"))
    exchange.gets(404, error("NOT_FOUND"))
    with exchange.client() as client, pytest.raises(ApiError, match="What happened"):
        client.reload_pool("default", "builtin:none")


# -- the catalog -----------------------------------------------------------------------------------------------------

ENTRY = CatalogModelRequest(id="story", source_url=MODEL, tags=["small"])
WRONG_DIGEST = "sha256:" + "00" * 32
UNVERIFIED = {
    "state": "unverified",
    "outcome": None,
    "digest": None,
    "warnings": [],
    "problems": [],
    "read_bytes": None,
    "total_bytes": None,
    "verified_at": None,
}
POLICY = {"mode": "permissive", "allowed_registries": [], "require_signature": False, "require_sbom": False}
GGUF = {
    "architecture": "llama",
    "context_length": match.int(2048),
    "quantisation": match.str("F32"),
    "vram_bytes": match.int(514_000_000),
}


def model(**fields: object) -> dict[str, object]:
    """A model of the catalog as it was entered."""
    said = {"id": "story", "digest": None, "source_url": MODEL, "tags": [], "manifests": [], "signatures": []}
    kept = {"sbom": None, "trust_policy": POLICY, "state": "Active", "size_bytes": match.int(1_185_376)}
    return {**said, **kept, "verification": UNVERIFIED, "gguf": GGUF, "fetch": None, "created_at": timestamp, **fields}


def test_a_model_is_entered(exchange: Exchange) -> None:
    """201 with the whole entry: Active, not verified, and with what its header says."""
    exchange.given("an idle pool")
    exchange.asks("POST", "/v1/catalog/models", body=ENTRY)
    exchange.gets(201, model(tags=["small"]))
    with exchange.client() as client:
        assert client.create_model(ENTRY).state is ModelState.ACTIVE


def test_a_model_is_entered_again(exchange: Exchange) -> None:
    """200 and the entry that is there."""
    again = CatalogModelRequest(id="story", source_url=MODEL)
    exchange.given("a model in the catalog", model_id="story")
    exchange.asks("POST", "/v1/catalog/models", body=again)
    exchange.gets(200, model())
    with exchange.client() as client:
        assert client.create_model(again).id == "story"


def test_another_model_under_the_same_id_is_in_conflict(exchange: Exchange) -> None:
    """409."""
    exchange.given("a model in the catalog", model_id="story")
    exchange.asks("POST", "/v1/catalog/models", body=ENTRY)
    exchange.gets(409, error("CONFLICT"))
    with exchange.client() as client, pytest.raises(ApiError, match="What happened"):
        client.create_model(ENTRY)


def test_a_file_that_is_not_open_cannot_be_entered(exchange: Exchange) -> None:
    """403 POLICY_DENIED for one that is below none of the roots."""
    closed = CatalogModelRequest(id="closed", source_url="file:/etc/hostname")
    exchange.given("an idle pool")
    exchange.asks("POST", "/v1/catalog/models", body=closed)
    exchange.gets(403, error("POLICY_DENIED"))
    with exchange.client() as client, pytest.raises(ApiError, match="What happened"):
        client.create_model(closed)


def test_models_are_listed(exchange: Exchange) -> None:
    """One page, and null for the next."""
    exchange.given("a model in the catalog", model_id="story")
    exchange.asks("GET", "/v1/catalog/models")
    exchange.gets(200, {"items": [model()], "next_cursor": None})
    with exchange.client() as client:
        assert [one.id for one in client.models().items] == ["story"]


def test_an_unknown_model_is_not_in_the_catalog(exchange: Exchange) -> None:
    """404."""
    exchange.given("an idle pool")
    exchange.asks("GET", "/v1/catalog/models/nowhere")
    exchange.gets(404, error("NOT_FOUND"))
    with exchange.client() as client, pytest.raises(ApiError, match="What happened"):
        client.model("nowhere")


def test_a_verification_is_begun(exchange: Exchange) -> None:
    """202 with its state."""
    exchange.given("a model in the catalog", model_id="story")
    exchange.asks("POST", "/v1/catalog/models/story/verify")
    state = match.regex("queued", regex="queued|running")
    exchange.gets(202, {**UNVERIFIED, "state": state, "read_bytes": match.int(0), "total_bytes": match.int(1_185_376)})
    with exchange.client() as client:
        assert client.verify_model("story").state is VerificationState.QUEUED


def test_the_outcome_of_a_verification_is_on_the_model(exchange: Exchange) -> None:
    """Passed, with the digest that was found and what is missing."""
    exchange.given("a verified model", model_id="story")
    exchange.asks("GET", "/v1/catalog/models/story")
    found = {"state": "done", "outcome": "passed", "digest": digest, "verified_at": timestamp}
    warnings = match.each_like(match.str("no signature was declared"), min=1)
    exchange.gets(200, model(digest=digest, verification={**UNVERIFIED, **found, "warnings": warnings}))
    with exchange.client() as client:
        assert client.model("story").verification.outcome is VerificationOutcome.PASSED


def test_a_file_that_is_not_what_was_declared_is_not_served(exchange: Exchange) -> None:
    """403 UNTRUSTED_ARTIFACT for a task that names it."""
    exchange.given("a verified model", model_id="story", digest=WRONG_DIGEST)
    task = msgspec.structs.replace(TASK, model_ref="story")
    exchange.asks("POST", "/v1/tasks", body=task)
    exchange.gets(403, error("UNTRUSTED_ARTIFACT"))
    with exchange.client() as client:
        assert refusal(client, task).error.code is ErrorCode.UNTRUSTED_ARTIFACT


def test_a_model_is_retired(exchange: Exchange) -> None:
    """202 with the model in its new state."""
    exchange.given("a model in the catalog", model_id="story")
    body = ModelStateRequest(state=ModelState.RETIRED, deadline_ms=30_000)
    exchange.asks("POST", "/v1/catalog/models/story/state", body=body)
    exchange.gets(202, model(state="Retired"))
    with exchange.client() as client:
        assert client.put_model_in_state("story", ModelState.RETIRED, deadline_ms=30_000).state is ModelState.RETIRED


def test_a_retired_model_takes_no_new_tasks(exchange: Exchange) -> None:
    """409 MODEL_DEPRECATED, also by the name that its pool has for it."""
    exchange.given("a retired model", model_id="story")
    exchange.asks("POST", "/v1/tasks", body=TASK)
    exchange.gets(409, error("MODEL_DEPRECATED", engine=match.str("llamacpp")))
    with exchange.client() as client:
        assert refusal(client).error.code is ErrorCode.MODEL_DEPRECATED


def test_a_model_whose_file_is_here_need_not_be_fetched(exchange: Exchange) -> None:
    """202, and it is done."""
    exchange.given("a model in the catalog", model_id="story")
    exchange.asks("POST", "/v1/catalog/models/story/fetch")
    exchange.gets(202, {"state": "done", "received_bytes": match.int(7), "total_bytes": match.int(7), "error": None})
    with exchange.client() as client:
        assert client.fetch_model("story").state is FetchState.DONE


def test_a_fetch_is_looked_on_at(exchange: Exchange) -> None:
    """An event with the state as it is; the stream ends when nothing is under way."""
    exchange.given("a model in the catalog", model_id="story")
    exchange.asks("GET", "/v1/catalog/models/story/fetch")
    event = 'id: 0\nevent: progress\ndata: {"state":"done","received_bytes":7,"total_bytes":7,"error":null}\n\n'
    pattern = (
        r'id: 0\nevent: progress\ndata: \{"state":"done","received_bytes":\d+,"total_bytes":\d+,"error":null\}\n\n'
    )
    exchange.gets_text("text/event-stream", event, pattern)
    with exchange.plain_client() as client:
        assert client.get("/v1/catalog/models/story/fetch").text == event


def test_a_model_that_a_pool_serves_cannot_be_deleted(exchange: Exchange) -> None:
    """409."""
    exchange.given("a model in the catalog", model_id="story")
    exchange.asks("DELETE", "/v1/catalog/models/story")
    exchange.gets(409, error("CONFLICT"))
    with exchange.client() as client, pytest.raises(ApiError, match="What happened"):
        client.delete_model("story")


def test_a_model_is_deleted(exchange: Exchange) -> None:
    """204 once its pool is drained."""
    exchange.given("a drained pool")
    exchange.given("a model in the catalog", model_id="story")
    exchange.asks("DELETE", "/v1/catalog/models/story")
    exchange.gets(204)
    with exchange.client() as client:
        client.delete_model("story")


DECISION = {"rule": "address", "reason": match.str("Why."), "audit_id": uuid_text}
LOOPBACK = "http://127.0.0.1:9/"
PUBLIC = "https://8.8.8.8/"


def test_the_outbound_policy_is_asked_about_a_private_address(exchange: Exchange) -> None:
    """200 with a denial and the rule."""
    exchange.given("an idle pool")
    exchange.asks("POST", "/v1/policy/outbound/check", body=OutboundCheck(url=LOOPBACK))
    exchange.gets(200, {**DECISION, "allowed": False, "url": LOOPBACK, "addresses": ["127.0.0.1"]})
    with exchange.client() as client:
        decision = client.check_outbound(LOOPBACK)
    assert (decision.allowed, decision.rule) == (False, "address")


def test_the_outbound_policy_is_asked_about_a_public_address(exchange: Exchange) -> None:
    """200 with what allows it."""
    exchange.given("an idle pool")
    exchange.asks("POST", "/v1/policy/outbound/check", body=OutboundCheck(url=PUBLIC))
    exchange.gets(200, {**DECISION, "allowed": True, "rule": "default", "url": PUBLIC, "addresses": ["8.8.8.8"]})
    with exchange.client() as client:
        assert client.check_outbound(PUBLIC).allowed


def test_a_text_is_fetched(exchange: Exchange) -> None:
    """200 with the other side's status, headers and text, and where to find it in the log."""
    asked = FetchRequest(url="http://files.example/text", timeout_ms=5000)
    exchange.given("another machine")
    exchange.asks("POST", "/v1/tools/fetch", body=msgspec.to_builtins(asked))
    said = {"status": 200, "headers": {"content-type": "text/plain; charset=utf-8"}, "text": "n\u00e4h"}
    exchange.gets(200, {**said, "url": match.str(asked.url), "audit_id": uuid_text})
    with exchange.client() as client:
        assert client.fetch_url(asked).text == "n\u00e4h"


def test_a_fetch_is_denied(exchange: Exchange) -> None:
    """403 with the rule as the policy's label."""
    exchange.given("an idle pool")
    exchange.asks("POST", "/v1/tools/fetch", body=FetchRequest(url=LOOPBACK))
    exchange.gets(403, error("POLICY_DENIED", policy_label="address", details={"audit_id": uuid_text}))
    with exchange.client() as client, pytest.raises(ApiError, match="What happened"):
        client.fetch_url(FetchRequest(url=LOOPBACK))


def test_a_fetch_fails_elsewhere(exchange: Exchange) -> None:
    """502 when the other side breaks off; the client does not try again."""
    asked = FetchRequest(url="http://files.example/short")
    exchange.given("another machine")
    exchange.asks("POST", "/v1/tools/fetch", body=asked)
    exchange.gets(502, error("UPSTREAM_FAILED", retriable=True))
    with exchange.client() as client, pytest.raises(ApiError, match="What happened"):
        client.fetch_url(asked)


def test_the_service_says_that_it_is_there(exchange: Exchange) -> None:
    """Without a token."""
    exchange.given("an idle pool")
    exchange.asks("GET", "/healthz", token=None)
    exchange.gets(200, {"status": "ok"})
    with exchange.client() as client:
        assert client.is_there()


METRICS_TEXT = """# HELP tokens_out_total Tokens decoded.
# TYPE tokens_out_total counter
tokens_out_total{engine="llamacpp",engine_version="1",pool_id="default",replica_id="default-0"} 8.0
# HELP queue_depth Tasks that wait in a pool.
# TYPE queue_depth gauge
queue_depth{engine="llamacpp",engine_version="1",pool_id="default",priority="interactive"} 0.0
"""
METRICS_LINES = (
    r'tokens_out_total\{engine="[^"]+",engine_version="[^"]+",pool_id="default",replica_id="default-0"\} 8\.0\n',
    r'queue_depth\{engine="[^"]+",engine_version="[^"]+",pool_id="default",priority="interactive"\} 0\.0\n',
)


def test_metrics_are_scraped(exchange: Exchange) -> None:
    """Prometheus text with what was counted."""
    exchange.given("a task has succeeded", task_id=TASK_ID)
    exchange.asks("GET", "/metrics")
    anything = r"[\s\S]*"
    exchange.gets_text("text/plain", METRICS_TEXT, anything + anything.join(METRICS_LINES) + anything)
    with exchange.plain_client() as client:
        answer = client.get("/metrics")
    assert answer.text == METRICS_TEXT
    assert answer.headers["X-Correlation-Id"] == CORRELATION_ID


def test_metrics_need_the_token(exchange: Exchange) -> None:
    """401 for a scraper with a wrong one."""
    exchange.given("an idle pool")
    exchange.asks("GET", "/metrics", token="wrong")
    exchange.gets(401, error("UNAUTHORIZED"), headers={"WWW-Authenticate": "Bearer"})
    with exchange.plain_client() as client:
        assert client.get("/metrics", headers={"Authorization": "Bearer wrong"}).status_code == 401


# -- artifacts -------------------------------------------------------------------------------------------------------

ROOT = Artifact(kind=ArtifactKind.PLAN, content={"steps": ["read", "write"]}, tags=["draft"])
ROOT_ID = hashlib.sha256(b'{"steps":["read","write"]}').hexdigest()  # canonical JSON: any client can know it before
CHILD = Artifact(kind=ArtifactKind.DIFF, content={"b": 1, "a": 2.5}, parent=ROOT_ID, metadata={"by": "me"})
CHILD_ID = hashlib.sha256(b'{"a":2.5,"b":1}').hexdigest()
ARTIFACT_PATH = f"/v1/artifacts/{ROOT_ID}"


def reference(artifact: Artifact, artifact_id: str, size_bytes: int) -> dict[str, object]:
    return {
        "id": artifact_id,
        "kind": artifact.kind.value,
        "digest": f"sha256:{artifact_id}",
        "created_ms": match.int(1767268800000),
        "tags": artifact.tags or [],
        "parent": artifact.parent,
        "size_bytes": size_bytes,
    }


ROOT_REF = reference(ROOT, ROOT_ID, 26)


def as_state(artifact: Artifact) -> dict[str, object]:
    return dict(msgspec.to_builtins(artifact))


def test_an_artifact_is_stored(exchange: Exchange) -> None:
    """201, and its id is the digest of its content as canonical JSON."""
    exchange.given("an idle pool")
    exchange.asks("POST", "/v1/artifacts", body=ROOT)
    exchange.gets(201, ROOT_REF)
    with exchange.client() as client:
        assert client.put_artifact(ROOT).id == ROOT_ID


def test_an_artifact_that_is_there_is_answered_with_200(exchange: Exchange) -> None:
    """The reference is the first one's, tags and all."""
    again = msgspec.structs.replace(ROOT, kind=ArtifactKind.OTHER, tags=["other"])
    exchange.given("an artifact is stored", **as_state(ROOT))
    exchange.asks("POST", "/v1/artifacts", body=again)
    exchange.gets(200, ROOT_REF)
    with exchange.client() as client:
        assert client.put_artifact(again).tags == ["draft"]


def test_an_artifact_has_a_parent(exchange: Exchange) -> None:
    """The lineage is on the reference."""
    exchange.given("an artifact is stored", **as_state(ROOT))
    exchange.asks("POST", "/v1/artifacts", body=CHILD)
    exchange.gets(201, reference(msgspec.structs.replace(CHILD, tags=[]), CHILD_ID, 15))
    with exchange.client() as client:
        assert client.put_artifact(CHILD).parent == ROOT_ID


def test_an_unknown_parent_is_not_found(exchange: Exchange) -> None:
    """404, and nothing is stored."""
    exchange.given("an idle pool")
    exchange.asks("POST", "/v1/artifacts", body=CHILD)
    exchange.gets(404, error("NOT_FOUND"))
    with exchange.client() as client, pytest.raises(ApiError) as caught:
        client.put_artifact(CHILD)
    assert caught.value.code is ErrorCode.NOT_FOUND


def test_an_artifact_is_read(exchange: Exchange) -> None:
    """With its content and what was said about it."""
    exchange.given("an artifact is stored", **as_state(ROOT))
    exchange.asks("GET", ARTIFACT_PATH)
    exchange.gets(200, {**ROOT_REF, "content": ROOT.content, "metadata": {}})
    with exchange.client() as client:
        assert client.get_artifact(ROOT_ID).content == ROOT.content


def test_artifacts_are_listed_by_kind_and_tag(exchange: Exchange) -> None:
    """References, newest first."""
    exchange.given("an artifact is stored", **as_state(ROOT))
    exchange.asks("GET", "/v1/artifacts", query={"kind": "plan", "tag": "draft", "limit": "2"})
    exchange.gets(200, {"items": [ROOT_REF], "next_cursor": None})
    with exchange.client() as client:
        assert [ref.id for ref in client.list_artifacts(kind=ArtifactKind.PLAN, tag="draft", limit=2).items] == [
            ROOT_ID
        ]


def test_an_artifact_is_deleted(exchange: Exchange) -> None:
    """204."""
    exchange.given("an artifact is stored", **as_state(ROOT))
    exchange.asks("DELETE", ARTIFACT_PATH)
    exchange.gets(204)
    with exchange.client() as client:
        client.delete_artifact(ROOT_ID)


def test_an_unknown_artifact_is_not_found(exchange: Exchange) -> None:
    """404."""
    exchange.given("an idle pool")
    exchange.asks("GET", ARTIFACT_PATH)
    exchange.gets(404, error("NOT_FOUND"))
    with exchange.client() as client, pytest.raises(ApiError) as caught:
        client.get_artifact(ROOT_ID)
    assert caught.value.code is ErrorCode.NOT_FOUND
