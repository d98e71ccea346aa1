"""Schemathesis' hooks and our checks, for `run.py`. Loaded by `st` inside its own process.

Before the documents are used, `narrowed` writes into them what this installation adds to the contract: the models and
profiles that it has, and the rules between fields. After that every request is either right, and must be admitted, or
wrong, and must be refused; nothing in between hides a shallow run.
"""

from __future__ import annotations

import atexit
import json
import os
import re
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

import schemathesis
from schemathesis import Case, CheckContext, HookContext, Response

MODELS = json.loads(os.environ["FUZZ_MODELS"])  # the first is the real one
IDS = json.loads(os.environ["FUZZ_IDS"])  # for paths, by their beginning: what is there, and what is not
SOURCE = os.environ["FUZZ_SOURCE"]  # of the models that are entered into the catalog
RELOADS = json.loads(os.environ["FUZZ_RELOADS"])  # models for the pool that is drained and reloaded
ARTIFACT = json.loads(os.environ["FUZZ_ARTIFACT"])  # the content of the artifact that is there
URLS = json.loads(os.environ["FUZZ_URLS"])  # one that answers with a text, and some that do not
TO_ELSEWHERE = ("POST /v1/policy/outbound/check", "POST /v1/tools/fetch")
ACTS_ON_POOLS = ("POST /v1/pools/{id}/drain", "POST /v1/pools/{id}/reload")
FORMS = (
    *(("completion", form) for form in ("prompt", "inputs", "messages")),
    *(("embedding", form) for form in ("prompt", "inputs")),
    ("rerank", "inputs"),
)
# Of a schema or a grammar no schema can say whether it can be kept.
SCHEMAS = ({"type": "boolean"}, {"enum": ["a", 1, None]}, {"type": "object", "required": ["x"]}, {})
GRAMMARS = ('root ::= "yes" | "no"', "root ::= [a-z ]{1,40} [.]")
MAX_TOKENS = 16
MAX_INPUTS = 3
MAX_MESSAGES = 8
CTX = 2048
POOLS = json.loads(os.environ["FUZZ_POOLS"])  # of those models, for OpenAI's paths
OPENAI = ("/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/embeddings")
CHATS = ("OpenAiChatRequest", "OpenAiCompletionRequest")
ABSENT = {"type": "string", "nullable": True, "enum": [None]}
CALLS = ("tool_calls", "tool_call_id")  # of messages
OF_SOME_MODELS = ("tools", "tool_choice", "logprobs", "top_logprobs", "name")
TERMINAL = ("end", "error")
HOSTILE = ("two words", "a\ttab", "x" * 129, "na\u00efve")  # no correlation ID may be one of these

seen: Counter[str] = Counter()
admitted: set[str] = set()
entered: list[str] = []  # models of the catalog
_count: Counter[str] = Counter()

_is_uuid = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}").fullmatch
_is_correlation_id = re.compile(r"[!-~]{1,128}").fullmatch


@atexit.register
def write_seen() -> None:
    """What this run has seen, for `run.py` to judge."""
    with open(os.environ["FUZZ_SEEN"], "w") as file:
        json.dump(seen, file)


# -- the documents ---------------------------------------------------------------------------------------------------


@schemathesis.hook
def before_load_schema(context: HookContext, raw_schema: dict[str, Any]) -> None:
    schemas = raw_schema["components"]["schemas"]
    raw_schema["components"]["parameters"].get("Cursor", {})["schema"] = {"type": "string", "pattern": "^[0-9]{1,18}$"}
    if "CatalogModelRequest" in schemas:
        schemas["CatalogModelRequest"]["properties"]["source_url"] = {"type": "string", "enum": [SOURCE]}
    if "TaskRequest" in schemas:
        schemas["TaskRequest"] = narrowed(schemas["TaskRequest"], schemas)
    for name in (*CHATS, "OpenAiEmbeddingRequest"):
        if name in schemas:
            names = [*MODELS, *POOLS] if name in CHATS else [*MODELS[1:], *POOLS[1:]]  # llama.cpp's does not embed
            schemas[name] = offered(schemas[name], schemas, names)
    for item in raw_schema["paths"].values():
        for operation in item.values():
            if "x-sse-events" in operation:
                operation["responses"]["200"]["content"]["text/event-stream"]["schema"] = one_of_events(operation)


def one_of_events(operation: dict[str, Any]) -> dict[str, Any]:
    """OpenAPI 3.0 cannot say what is in a stream; Schemathesis takes the schema as that of one event, and validates
    what `contentSchema` says about its data."""
    return {
        "oneOf": [
            {
                "type": "object",
                "required": ["id", "event", "data"],
                "properties": {
                    "id": {"type": "string", "pattern": "^[0-9]+$"},
                    "event": {"type": "string", "enum": [event["name"]]},
                    "data": {
                        "type": "string",
                        "contentMediaType": "application/json",
                        "contentSchema": event["schema"],
                    },
                },
            }
            for event in operation["x-sse-events"]
        ]
    }


def narrowed(request: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """TaskRequest as this installation takes it: one form of prompt, its own models, engines and profiles.

    Texts have no greatest length here: what the context bounds is tokens, and megabytes only cost time.
    """
    properties = json.loads(json.dumps(request["properties"]))
    schemas["ChatMessage"]["properties"]["content"].pop("maxLength")
    properties["prompt"].pop("maxLength")
    properties["inputs"]["items"].pop("maxLength")
    properties["inputs"]["maxItems"] = 16
    properties["messages"].pop("maxItems")
    message = schemas["ChatMessage"]["properties"]
    message |= {"role": {"type": "string", "enum": ["system", "user", "assistant"]}} | dict.fromkeys(CALLS, ABSENT)
    del properties["tools"], properties["logprobs"]  # like the calls of messages not for these models, or most of them
    properties |= {
        "model_ref": {"type": "string", "enum": MODELS},
        "engine": {"type": "string", "nullable": True, "enum": ["llamacpp", None]},
        "sampler_profile_version": {"type": "string", "nullable": True, "enum": ["v1", "greedy-v1", None]},
        "keep_transcript": {"type": "boolean", "nullable": True, "enum": [False, None]},
    }
    properties["ctx"]["maximum"] = CTX
    return {"oneOf": [_one_form(request, properties, workload, form) for workload, form in FORMS]}


def offered(request: dict[str, Any], schemas: dict[str, Any], models: list[str]) -> dict[str, Any]:
    """A request of OpenAI's API as it is taken: what the document describes as refused is absent or null."""
    properties = {name: _taken(name, schema) for name, schema in request["properties"].items()}
    properties["model"] = {"type": "string", "enum": models}
    for text in ("prompt", "input"):
        if text in properties:
            listed = properties[text]["oneOf"][0]
            limits = {"items": {"type": "string", "minLength": 1}, "maxItems": min(listed["maxItems"], MAX_INPUTS)}
            properties[text] = {"oneOf": [listed | limits, {"type": "string", "minLength": 1}]}
    if "messages" in properties:
        message = schemas["OpenAiMessage"]
        message["properties"] = {name: _taken(name, schema) for name, schema in message["properties"].items()}
        message["required"] = ["role", "content"]
        message["properties"]["role"] = {"type": "string", "enum": ["system", "developer", "user", "assistant"]}
        message["properties"]["content"]["oneOf"][1] = {"type": "string"}
        schemas["OpenAiTextPart"]["properties"]["text"].pop("maxLength", None)
    if "stream_options" in properties:
        options = schemas["OpenAiStreamOptions"]["properties"]
        options["include_obfuscation"] = _taken("include_obfuscation", options["include_obfuscation"])
    return request | {"properties": properties}


def _taken(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """What only some models take is in the examples, and in tests/live."""
    is_refused = schema.get("description", "").startswith("Refused")
    return ABSENT if is_refused or name in (*CALLS, *OF_SOME_MODELS) else schema


def _one_form(request: dict[str, Any], properties: dict[str, Any], workload: str, form: str) -> dict[str, Any]:
    """A task of this workload with its texts in this form, and nothing that has no sense for it."""
    own = dict(properties)
    for other in ("prompt", "inputs", "messages"):
        own[other] = _never_null(own[other]) if other == form else ABSENT
    own["workload"] = {"type": "string", "enum": [workload]}
    required = ["model_ref", form]
    if workload != "completion":
        required.append("workload")
        own |= {"max_tokens": ABSENT, "expected_tokens": ABSENT}
        own |= {"model_ref": {"type": "string", "enum": MODELS[1:]}, "engine": ABSENT}
        del own["sampling"]  # it cannot be null
    if workload == "rerank":
        own["inputs"] = own["inputs"] | {"minItems": 2}
    return request | {"required": required, "properties": own}


def _never_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key != "nullable"}


# -- the requests ----------------------------------------------------------------------------------------------------


@schemathesis.hook
def before_call(context: HookContext, case: Case, kwargs: dict[str, Any]) -> None:
    """Makes right requests right in what no schema can say. Schemathesis judges the request anew afterwards, so a
    wrong one stays wrong. Three of four paths lead to what exists; links lead by themselves."""
    if case.meta is None:
        return
    if case.operation.label in ACTS_ON_POOLS:
        lead_to_its_pool(case)
    if case.meta.generation.mode.is_negative:
        return
    _count[case.operation.label] += 1
    number = _count[case.operation.label]
    if number % 3 == 0:  # the schema takes any text; so does the service, and puts an ID of its own in its place
        case.headers["X-Correlation-Id"] = HOSTILE[number // 3 % len(HOSTILE)]
    if case.path in OPENAI[1:]:
        if isinstance(case.body, dict):
            case.body = offerable(case.body, number)
        if "X-Deadline-Ms" in case.headers and number % 7:  # most of them can be met
            case.headers["X-Deadline-Ms"] = "31536000000"
    elif case.operation.label == "POST /v1/tasks":
        if isinstance(case.body, dict):
            case.body = admissible(case.body, number)
    elif case.operation.label == "POST /v1/catalog/models":
        if isinstance(case.body, dict) and number % 7 == 0:  # in conflict with what is there
            case.body = case.body | {"id": IDS["/v1/catalog/models/"][0], "tags": ["another"]}
    elif case.operation.label == "DELETE /v1/catalog/models/{id}" and case.meta.phase.name.value != "stateful":
        known = entered.pop() if entered and number % 4 else known_and_unknown(case)[1]
        case.path_parameters = case.path_parameters | {"id": known}
    elif case.operation.label == "POST /v1/artifacts":
        if isinstance(case.body, dict):
            case.body = storable(case.body, number)
    elif case.operation.label in TO_ELSEWHERE:
        if isinstance(case.body, dict) and number % 5:  # the fifth keeps what it has, which is hardly ever a URL
            case.body = case.body | {"url": URLS[number % 5 % len(URLS)]}
            if number % 3:
                case.body = {"url": case.body["url"]}
    elif case.operation.label in ACTS_ON_POOLS:
        if number % 4 == 0 and case.meta.phase.name.value != "stateful":
            case.path_parameters = case.path_parameters | {"id": known_and_unknown(case)[1]}
    elif "id" in case.path_parameters and (
        case.meta.phase.name.value != "stateful"
        or case.path_parameters["id"] in (None, "None")  # a task without session
    ):
        known, unknown, *more = known_and_unknown(case)
        known = more[number // 3 % len(more)] if more and number % 3 == 0 else known
        case.path_parameters = case.path_parameters | {"id": known if number % 4 else unknown}


def known_and_unknown(case: Case) -> list[str]:
    """What is there, what is not, and perhaps more that is there."""
    return next(ids for start, ids in IDS.items() if case.path.startswith(start))


def lead_to_its_pool(case: Case) -> None:
    """A drain or a reload that the service may accept goes to the pool that no task is for, wherever a link leads it
    and whatever else is wrong with it: a header that nobody knows does no harm. Three of four models are there."""
    wrong = {location.value for location, part in case.meta.components.items() if part.mode.is_negative}
    if "path" not in wrong:
        case.path_parameters = case.path_parameters | {"id": known_and_unknown(case)[0]}
    if "body" not in wrong and isinstance(case.body, dict) and "new_model_ref" in case.body:
        number = _count["models"] = _count["models"] + 1
        if number % 4:
            case.body = case.body | {"new_model_ref": RELOADS[number // 4 % len(RELOADS)]}


def admissible(body: dict[str, Any], number: int) -> dict[str, Any]:
    """The same task with a short answer and an id of its own, but now and then with the id of the first task, now and
    then of the session that is read, or for a pool with a short queue."""
    body = dict(body)
    if body.get("task_id"):
        body["task_id"] = f"00000000-0000-4000-8000-{number:012x}" if number % 11 else IDS["/v1/tasks/"][0]
    if body.get("max_tokens"):
        body["max_tokens"] = min(body["max_tokens"], MAX_TOKENS)
    if isinstance(body.get("inputs"), list):
        body["inputs"] = body["inputs"][:MAX_INPUTS]
    if isinstance(body.get("messages"), list) and body["messages"]:  # llama.cpp takes no two answers at the end
        body["messages"] = [*body["messages"][:-1], body["messages"][-1] | {"role": "user"}]
    if number % 7 == 0:  # begins it anew where it was deleted
        body["session_id"] = IDS["/v1/sessions/"][0]
    if body.get("workload", "completion") != "completion":
        return body
    body["model_ref"] = MODELS[0] if number % 5 else MODELS[1 + number // 5 % (len(MODELS) - 1)]
    if body["model_ref"] != MODELS[0]:
        body.pop("engine", None)
        body.pop("max_tokens", None)
    if isinstance(body.get("sampling"), dict):
        body["sampling"] = kept(body["sampling"], number, is_real=body["model_ref"] == MODELS[0])
    return body


def offerable(body: dict[str, Any], number: int) -> dict[str, Any]:
    """The same for OpenAI's paths: short answers, what contradicts itself put right, and now and then a full queue."""
    body = dict(body)
    if "input" in body:
        return body
    for name in ("max_tokens", "max_completion_tokens"):
        body.pop(name, None)
    body["max_tokens"] = number % MAX_TOKENS + 1
    body["stream"] = number % 3 == 0
    if not body["stream"]:
        body.pop("stream_options", None)
    if isinstance(body.get("messages"), list) and body["messages"]:
        *before, last = body["messages"][-MAX_MESSAGES:]
        body["messages"] = [*before, last | {"role": "user"}]
    body["model"] = (POOLS, MODELS)[number % 2][0 if number % 5 else 1 + number // 5 % (len(MODELS) - 1)]
    form = body.pop("response_format", None)
    if form and body["model"] in (POOLS[0], MODELS[0]):
        schema = {"name": "x", "schema": SCHEMAS[number % len(SCHEMAS)]}
        body["response_format"] = ({"type": "json_schema", "json_schema": schema}, {"type": "json_object"})[number % 2]
    return body


def kept(sampling: dict[str, Any], number: int, *, is_real: bool) -> dict[str, Any]:
    """With at most one of schema and grammar, and that one of ours; simulated engines follow none."""
    asked = [name for name in ("json_schema", "grammar") if sampling.get(name) is not None]
    sampling = {name: value for name, value in sampling.items() if name not in asked}
    if asked and is_real:
        choices: tuple[Any, ...] = SCHEMAS if asked[0] == "json_schema" else GRAMMARS
        sampling[asked[0]] = choices[number % len(choices)]
    return sampling


def storable(body: dict[str, Any], number: int) -> dict[str, Any]:
    """The same artifact without what no schema can say: whole numbers of more than 64 bits, a parent that is not there.
    Now and then the one that is read and deleted comes again, and one of two parents is there."""
    body = {name: within_64_bits(value) for name, value in body.items()}
    if number % 3 == 0:
        body["content"] = ARTIFACT
    if body.get("parent"):
        known, unknown = IDS["/v1/artifacts/"]
        body["parent"] = known if number % 2 else unknown
    return body


def within_64_bits(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: within_64_bits(item) for key, item in value.items()}
    if isinstance(value, list):
        return [within_64_bits(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return max(-(2**63), min(2**63 - 1, value))
    return value


# -- the answers -----------------------------------------------------------------------------------------------------


@schemathesis.check
def correlation_id(ctx: CheckContext, response: Response, case: Case) -> None:
    """Every answer has exactly one correlation ID: the request's where that is usable, else a new one."""
    seen[f"{case.operation.definition.raw['operationId']} {response.status_code}"] += 1
    sent = response.request.headers.get("X-Correlation-Id")
    if isinstance(sent, bytes):
        sent = sent.decode("latin-1")
    given = response.headers.get("x-correlation-id") or []
    assert len(given) == 1, f"X-Correlation-Id: {given}"
    if sent is not None and _is_correlation_id(sent):
        assert given[0] == sent, f"X-Correlation-Id not echoed: sent {sent!r}, got {given[0]!r}"
    else:
        seen["hostile correlation-ID"] += bool(sent)
        assert given[0] != sent, f"a hostile X-Correlation-Id came back: {sent!r}"
        assert _is_uuid(given[0]), f"X-Correlation-Id is not a UUID: {given[0]!r}"


@schemathesis.check
def error_envelope(ctx: CheckContext, response: Response, case: Case) -> None:
    """Every failure, documented or not (404 of the router, 405, 415), is the envelope, with the headers of its kind."""
    if response.status_code < 400:
        return
    headers = response.headers
    if response.request.method != "HEAD":
        assert headers.get("content-type") == ["application/json"], f"Content-Type: {headers.get('content-type')}"
        body = response.json()
        if is_openai(response):
            openai_envelope(body, headers)
            return
        seen[f"code {body.get('code')}"] += 1
        allowed = {"code", "message", "engine", "correlation_id", "retriable"}
        assert allowed <= set(body), f"the envelope lacks {sorted(allowed - set(body))}"
        extra = set(body) - allowed - {"retry_after_ms", "policy_label", "details"}
        assert not extra, f"the envelope has {sorted(extra)}"
        assert [body["correlation_id"]] == headers.get("x-correlation-id"), "the envelope has another correlation ID"
        if response.status_code == 429:
            assert body.get("policy_label"), "429 without policy_label"
        if response.status_code in (429, 503):
            assert headers.get("x-backoff-ms") == [str(body.get("retry_after_ms"))], (
                "X-Backoff-Ms is not retry_after_ms"
            )
            seconds = -(-body["retry_after_ms"] // 1000)
            assert headers.get("retry-after") == [str(seconds)], "Retry-After is not X-Backoff-Ms in seconds"
    if response.status_code == 401:
        assert "www-authenticate" in headers, "401 without WWW-Authenticate"
    if response.status_code == 405:
        assert "allow" in headers, "405 without Allow"


def is_openai(response: Response) -> bool:
    path = urlsplit(response.request.url).path
    return path in OPENAI or path.startswith("/v1/models/")


def openai_envelope(body: dict[str, Any], headers: Any) -> None:
    """OpenAI's shape on its paths, and the waits in the headers alone."""
    assert list(body) == ["error"], f"not OpenAI's envelope: {sorted(body)}"
    assert set(body["error"]) == {"message", "type", "code", "param"}, f"its fields: {sorted(body['error'])}"
    seen[f"code {body['error']['code']}"] += 1
    assert headers.get("x-should-retry") in (["true"], ["false"]), f"X-Should-Retry: {headers.get('x-should-retry')}"
    if headers.get("x-should-retry") == ["true"]:
        seconds = -(-int(headers["x-backoff-ms"][0]) // 1000)
        assert headers.get("retry-after") == [str(seconds)], "Retry-After is not X-Backoff-Ms in seconds"


@schemathesis.check
def chunks_in_order(ctx: CheckContext, response: Response, case: Case) -> None:
    """A stream of OpenAI's has chunks of one answer, then [DONE], or an error as the last and no [DONE]."""
    media_type = (response.headers.get("content-type") or [""])[0]
    if not is_openai(response) or not media_type.startswith("text/event-stream"):
        return
    messages = [one for one in response.text.split("\n\n") if one and not one.startswith(":")]
    *data, last = [message.removeprefix("data: ") for message in messages]
    assert len({json.loads(one)["id"] for one in data}) <= 1, "chunks of several answers"
    seen["chunks"] += len(data)
    if last == "[DONE]":
        seen["whole stream"] += 1
        reasons = [choice["finish_reason"] for one in data for choice in json.loads(one)["choices"]]
        assert [reason for reason in reasons if reason] == reasons[-1:], f"finish reasons: {reasons}"
    else:
        assert set(json.loads(last)["error"]) == {"message", "type", "code", "param"}, last


@schemathesis.check
def admitted_tasks_are_there(ctx: CheckContext, response: Response, case: Case) -> None:
    """A task that was admitted is never unknown; ended ones are kept for longer than a run takes."""
    if case.operation.label == "POST /v1/tasks" and response.status_code == 202:
        admitted.add(response.json()["task_id"])
    if case.operation.path.startswith("/v1/tasks/{id}") and response.status_code == 404:
        task_id = str(case.path_parameters["id"])
        assert task_id.lower() not in admitted, f"task {task_id} was admitted and is not there"


@schemathesis.check
def entered_models_are_there(ctx: CheckContext, response: Response, case: Case) -> None:
    """What was entered is kept in mind, so that it can be deleted."""
    if case.operation.label == "POST /v1/catalog/models" and response.status_code == 201:
        model = response.json()
        assert model["state"] == "Active"
        entered.append(model["id"])


@schemathesis.check
def frames_in_order(ctx: CheckContext, response: Response, case: Case) -> None:
    """A stream has `started` first, tokens counted without a gap, and exactly one terminal frame, as the last."""
    if case.operation.label != "GET /v1/tasks/{id}/stream" or response.status_code != 200:
        return
    if response.request.method == "HEAD":
        return
    frames = [frame for frame in map(parsed, response.text.split("\n\n")) if "event" in frame]
    names = [frame["event"] for frame in frames]
    seen.update(f"frame {name}" for name in names)
    for end in (json.loads(frame["data"]) for frame in frames if frame["event"] == "end"):
        seen.update(f"result {name}" for name in ("embeddings", "scores") if name in end)
    numbers = [int(frame["id"]) for frame in frames]
    assert numbers == sorted(set(numbers)), f"frame numbers: {numbers}"
    is_resumed = "last-event-id" in {name.lower() for name in response.request.headers}
    if is_resumed and not frames:  # the client had it all
        return
    ends = [index for index, name in enumerate(names) if name in TERMINAL]
    assert ends == [len(names) - 1], f"terminal frames at {ends} of {len(names)}: {names[-5:]}"
    counts = [json.loads(frame["data"]).get("i") for frame in frames if frame["event"] == "token"]
    if not is_resumed:
        assert names[0] == "started", f"the first frame is {names[0]}"
        assert counts == list(range(len(counts))), f"token counts: {counts}"
    elif counts:
        first = counts[0] or 0
        assert counts == list(range(first, first + len(counts))), f"token counts: {counts}"
    assert names.count("started") <= 1, "a second `started`"


def parsed(block: str) -> dict[str, str]:
    """One SSE message; comments have no name."""
    pairs = [line.split(": ", 1) for line in block.split("\n") if line and not line.startswith(":")]
    return {pair[0]: pair[1] for pair in pairs}
