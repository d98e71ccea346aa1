"""The guardrails before the queue: each refuses what it must, and its message says what to do."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_orch.contract.models import (
    ChatMessage,
    ChatRole,
    ErrorCode,
    Sampling,
    ToolCall,
    ToolFunction,
    Tools,
    Workload,
)
from llama_orch.core import admission
from llama_orch.errors import InvalidParams, LlorchError, NotFound, PoolUnready
from llama_orch.testing.builders import DIGEST, a_pool, a_spec, a_task

PROFILES = ("v1", "greedy-v1")
CHAT = [ChatMessage(role=ChatRole.USER, content="hello")]


def pools(*specs: dict[str, Any]) -> list[admission.Pool]:
    return [a_pool(f"p{n}", **spec) for n, spec in enumerate(specs)]


# -- which pool can do it ----------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-ADM-7", "HP-ERR-4")
def test_an_unknown_model_is_refused_with_the_known_ones() -> None:
    """A model that no pool serves is NOT_FOUND, and the message names those that are served."""
    with pytest.raises(NotFound, match=r"name one of: builtin:tiny, file:/m\.gguf"):
        admission.matching_pools(pools({}, {"model": "file:/m.gguf"}), a_task(model_ref="builtin:huge"))


@pytest.mark.spec("HP-ADM-4")
def test_a_model_can_be_named_by_its_digest() -> None:
    """Once the file was hashed, `sha256:…` names the pool as well as its reference does."""
    found = pools({})
    with pytest.raises(NotFound):
        admission.matching_pools(found, a_task(model_ref=DIGEST))
    found[0].model_digest = DIGEST
    assert admission.matching_pools(found, a_task(model_ref=DIGEST)) == found


@pytest.mark.spec("HP-ADM-4")
def test_an_engine_that_does_not_serve_the_model_is_refused_with_those_that_do() -> None:
    """`engine` narrows the choice, and an engine that nobody offers for this model is a client's mistake."""
    both = pools({"engine": "llamacpp"}, {"engine": "ctransformers"})
    assert admission.matching_pools(both, a_task()) == both
    assert admission.matching_pools(both, a_task(engine="ctransformers")) == both[1:]
    with pytest.raises(InvalidParams, match="leave `engine` out or name one of: ctransformers, llamacpp"):
        admission.matching_pools(both, a_task(engine="vllm"))


@pytest.mark.spec("HP-ADM-4")
@pytest.mark.parametrize(
    ("asked", "lack", "says"),
    [
        ({"workload": Workload.RERANK}, {}, "cannot do workload 'rerank'; it does: completion"),
        ({"messages": CHAT}, {"features": ()}, "does not offer `messages`; leave it out"),
        ({"sampling": Sampling(grammar="root")}, {"features": ("chat",)}, "does not offer `sampling.grammar`; leave"),
        ({"sampling": Sampling(json_schema={})}, {"features": ()}, "does not offer `sampling.json_schema`; leave"),
        ({"logprobs": 0}, {"features": ()}, "does not offer `logprobs`; leave it out"),
        (
            {"messages": CHAT, "tools": Tools(functions=[])},
            {},
            "does not offer `tools`, since its engine, or its model's chat template",
        ),
    ],
)
def test_what_no_pool_can_do_is_refused(asked: dict[str, Any], lack: dict[str, Any], says: str) -> None:
    """A request that no pool of the model is able to run is INVALID_PARAMS, and the message names the field."""
    with pytest.raises(InvalidParams, match=says) as caught:
        admission.matching_pools(pools(lack), a_task(**asked))
    assert caught.value.engine == "llamacpp"


@pytest.mark.spec("HP-ADM-4")
def test_pools_that_lack_a_feature_are_passed_over() -> None:
    """Where some pool can, only those that can are left, in their order."""
    three = pools({"features": ()}, {"features": ("chat",)}, {"features": ("chat", "grammar")})
    assert admission.matching_pools(three, a_task(messages=CHAT)) == three[1:]
    assert admission.matching_pools(three, a_task(sampling=Sampling(temperature=0.0))) == three


@pytest.mark.spec("HP-ADM-4")
def test_a_workload_that_a_pool_cannot_do_is_refused_with_the_pools_that_can() -> None:
    """Also those of other models; in the message for people, in the details for programs."""
    some = pools({}, {"engine": "ctransformers", "model": "file:/e.gguf", "workloads": ("completion", "embedding")})
    with pytest.raises(InvalidParams, match=r"these pools can: p1 \(ctransformers, file:/e\.gguf\)") as caught:
        admission.matching_pools(some, a_task(workload=Workload.EMBEDDING))
    able = [{"pool_id": "p1", "engine": "ctransformers", "model_ref": "file:/e.gguf"}]
    assert caught.value.details == {"workload": "embedding", "pools_able": able}
    with pytest.raises(InvalidParams, match="no pool can: add one on llamacpp whose model was made to rank") as caught:
        admission.matching_pools(some, a_task(workload=Workload.RERANK, inputs=["q", "d"]))
    assert caught.value.details == {"workload": "rerank", "pools_able": []}


@pytest.mark.spec("HP-ADM-4")
def test_a_pool_made_for_a_task_is_held_against_all() -> None:
    """Where only one pool is asked, the others are still named."""
    made, other = pools({}, {"model": "file:/r.gguf", "workloads": ("rerank",)})
    with pytest.raises(InvalidParams, match="these pools can: p1"):
        admission.matching_pools([made], a_task(workload=Workload.RERANK), [made, other])


# -- the request itself ------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-ADM-4")
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": None}, "given: none"),
        ({"prompt": "x", "inputs": ["y"]}, "given: prompt, inputs"),
        ({"prompt": "x", "inputs": ["y"], "messages": CHAT}, "given: prompt, inputs, messages"),
    ],
)
def test_exactly_one_form_of_prompt(fields: dict[str, Any], says: str) -> None:
    """None or several of `prompt`, `inputs` and `messages` are refused with what was given."""
    with pytest.raises(InvalidParams, match=f"give exactly one of .*; {says}"):
        admission.check_request(a_task(**fields), a_spec(), PROFILES)


@pytest.mark.spec("HP-ADM-4")
@pytest.mark.parametrize("fields", [{"prompt": "x"}, {"inputs": ["x", "y"]}, {"messages": CHAT}])
def test_each_form_of_prompt_alone_is_fine(fields: dict[str, Any]) -> None:
    """One form is enough, whichever it is."""
    admission.check_request(a_task(**fields), a_spec(), PROFILES)


@pytest.mark.spec("HP-ADM-4")
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"workload": Workload.EMBEDDING, "messages": CHAT},
            "exactly one of `prompt` and `inputs` for workload 'embed",
        ),
        ({"workload": Workload.RERANK}, "give `inputs` for workload 'rerank'; given: prompt"),
        ({"workload": Workload.RERANK, "inputs": ["q"]}, "a query and at least one document"),
        ({"workload": Workload.EMBEDDING, "max_tokens": 1}, "`max_tokens` is about text that is written"),
        ({"workload": Workload.EMBEDDING, "expected_tokens": 1}, "`expected_tokens` is about"),
        ({"workload": Workload.EMBEDDING, "sampling": Sampling()}, "`sampling` is about"),
        ({"sampling": Sampling(grammar="x", json_schema={})}, "give one of `sampling.json_schema`"),
    ],
)
def test_what_has_no_sense_for_the_workload_is_refused(fields: dict[str, Any], says: str) -> None:
    """By name, instead of being passed over."""
    with pytest.raises(InvalidParams, match=says):
        admission.check_request(a_task(**fields), a_spec(), PROFILES)


@pytest.mark.spec("HP-ADM-4", "HP-ADM-7")
@pytest.mark.parametrize(
    ("sampling", "says"),
    [
        (Sampling(grammar="root ::= x"), "`sampling.grammar` is refused: it has no rule 'x'"),
        (Sampling(json_schema={"not": {}}), "`sampling.json_schema` is refused: at # there is 'not'"),
        (Sampling(json_schema={"$ref": "#"}), "`sampling.json_schema` is refused: the rule 'root' begins with itself"),
    ],
)
def test_a_constraint_that_cannot_be_kept_is_refused_by_its_field(sampling: Sampling, says: str) -> None:
    """What is wrong with a schema's grammar is said of the schema."""
    with pytest.raises(InvalidParams, match=re.escape(says)):
        admission.grammar_of(sampling)


@pytest.mark.spec("HP-ADM-4")
def test_a_grammar_is_passed_on_as_it_is() -> None:
    """And a schema as the grammar that was made of it."""
    assert admission.grammar_of(Sampling(grammar='root ::= "a"')) == 'root ::= "a"'
    assert admission.grammar_of(Sampling(json_schema={"const": 1})) == 'root ::= "1"'
    assert not admission.is_constrained(a_task(sampling=Sampling(temperature=0.0)))


@pytest.mark.spec("HP-ADM-7")
def test_a_text_that_is_read_leaves_no_room_for_an_answer() -> None:
    """It may fill the context where the pool says so, and asks for no tokens."""
    read = a_task(workload=Workload.EMBEDDING)
    whole, most = a_spec(ctx=512, reads_whole_ctx=True), a_spec(ctx=512)
    assert admission.check_lengths(read, whole, [512, 3]) == 0
    assert admission.check_lengths(read, most, [511]) == 0
    for spec, length in ((whole, 513), (most, 512)):
        with pytest.raises(InvalidParams, match=f"the prompt has {length} tokens"):
            admission.check_lengths(read, spec, [3, length])
    with pytest.raises(InvalidParams, match="the prompt has 512 tokens"):
        admission.check_lengths(a_task(), whole, [512])
    assert admission.check_bounds(read, most, [512]) == 0


@pytest.mark.spec("HP-ADM-7")
def test_a_document_is_counted_with_its_query() -> None:
    """They are read together."""
    rank = a_task(workload=Workload.RERANK, inputs=["a query", "one", "another"])
    assert admission.evaluations(rank, [5, 3, 4]) == [8, 9]
    assert admission.evaluations(a_task(inputs=["a", "b"]), [5, 3]) == [5, 3]
    assert admission.token_bounds(rank, ["a query", "one", "another"]) == [15 + 11, 15 + 15]
    assert admission.token_bounds(rank, []) == []


@pytest.mark.spec("HP-ADM-7", "HP-ADM-4")
def test_more_context_than_the_pool_has_is_refused_with_both_numbers() -> None:
    """`ctx` is a demand on the pool; what it has exactly is still fine."""
    admission.check_request(a_task(ctx=2048), a_spec(ctx=2048), PROFILES)
    with pytest.raises(
        InvalidParams, match="`ctx` is 2049 tokens, but pool default has 2048; ask for at most 2048"
    ) as e:
        admission.check_request(a_task(ctx=2049), a_spec(ctx=2048), PROFILES)
    assert e.value.details == {"ctx": 2049, "pool_ctx": 2048}


@pytest.mark.spec("HP-ADM-6", "HP-DET-2")
def test_an_unknown_sampler_profile_is_refused_with_the_known_ones() -> None:
    """A profile is pinned by its version, so an unknown one cannot be honoured."""
    admission.check_request(a_task(sampler_profile_version="greedy-v1"), a_spec(), PROFILES)
    with pytest.raises(InvalidParams, match="unknown `sampler_profile_version` 'v9'; known: greedy-v1, v1"):
        admission.check_request(a_task(sampler_profile_version="v9"), a_spec(), PROFILES)


# -- lengths -----------------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-ADM-7")
def test_a_prompt_that_fills_the_context_is_refused() -> None:
    """There must be room for one token at least; the message and the details have both figures."""
    spec = a_spec(ctx=100)
    assert admission.check_lengths(a_task(), spec, [99]) == 1
    with pytest.raises(InvalidParams, match=r"the prompt has 100 tokens, .* context of 100; shorten the prompt") as e:
        admission.check_lengths(a_task(), spec, [100])
    assert e.value.details == {"prompt_tokens": 100, "pool_ctx": 100}


@pytest.mark.spec("HP-ADM-7")
def test_an_answer_that_cannot_fit_is_refused_with_what_would() -> None:
    """`max_tokens` is a demand: it is granted whole or refused, never cut."""
    spec = a_spec(ctx=100)
    assert admission.check_lengths(a_task(max_tokens=40), spec, [60]) == 40
    with pytest.raises(InvalidParams, match="exceed the context of 100; ask for at most 40") as caught:
        admission.check_lengths(a_task(max_tokens=41), spec, [60])
    assert caught.value.details == {"prompt_tokens": 60, "max_tokens": 41, "pool_ctx": 100}


@pytest.mark.spec("HP-ADM-7")
def test_the_longest_of_several_inputs_decides() -> None:
    """Inputs run one after another, each with the whole context, so that they do not add up."""
    spec = a_spec(ctx=100, max_tokens=30)
    assert admission.check_lengths(a_task(inputs=["a", "b", "c"]), spec, [60, 20, 60]) == 30
    assert admission.check_lengths(a_task(inputs=["a", "b"]), spec, [20, 90]) == 10


@pytest.mark.spec("HP-ADM-4")
def test_without_max_tokens_the_pools_default_holds() -> None:
    """The default is the pool's, cut to the room that is left: nobody asked for it."""
    spec = a_spec(ctx=100, max_tokens=30)
    assert admission.check_lengths(a_task(), spec, [10]) == 30
    assert admission.check_lengths(a_task(), spec, [80]) == 20


@pytest.mark.spec("HP-ADM-7")
@pytest.mark.parametrize(
    ("max_tokens", "bound", "fits"), [(40, 60, True), (41, 60, False), (None, 70, True), (None, 71, False)]
)
def test_on_a_bound_only_what_fits_for_certain_is_let_in(max_tokens: int | None, bound: int, fits: bool) -> None:
    """While nobody can count, what might not fit is POOL_UNREADY, which a repeat can mend, and nothing is cut."""
    spec, request = a_spec(ctx=100, max_tokens=30), a_task(max_tokens=max_tokens)
    if fits:
        assert admission.check_bounds(request, spec, [5, bound]) == (max_tokens or 30)
        return
    with pytest.raises(PoolUnready, match="repeat once the pool is ready") as caught:
        admission.check_bounds(request, spec, [5, bound])
    assert caught.value.retry_after_ms is not None


@pytest.mark.spec("HP-ADM-7")
@pytest.mark.parametrize(("text", "characters"), [("", 0), ("abc", 3), ("ä", 2), ("日本", 6), ("🦙", 4)])
def test_a_bound_counts_bytes_and_not_characters(text: str, characters: int) -> None:
    """A tokenizer that falls back to bytes makes one token of each."""
    assert admission.token_bound(text) == characters + admission.EXTRA_TOKENS


@pytest.mark.spec("HP-ADM-7")
@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(text=st.text(), more=st.text())
def test_a_bound_holds_for_parts_and_only_grows(text: str, more: str) -> None:
    """No tokenizer of characters or bytes exceeds the bound, and more text never lowers it."""
    assert admission.token_bound(text) > max(len(text), len(text.encode()))
    assert admission.token_bound(text) <= admission.token_bound(text + more)


@pytest.mark.spec("HP-ERR-1", "HP-ERR-4")
def test_a_refusal_is_the_one_error_body() -> None:
    """The guardrails raise what the contract knows: a code, a message, the engine and no secret."""
    with pytest.raises(LlorchError) as caught:
        admission.check_lengths(a_task(prompt="a secret"), a_spec(ctx=4), [4])
    body = caught.value.body("c-1")
    assert (body.code, body.engine, body.correlation_id) == (ErrorCode.INVALID_PARAMS, "llamacpp", "c-1")
    assert "secret" not in body.message


# -- tools -----------------------------------------------------------------------------------------------------------


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def tools(*names: str, **fields: Any) -> Tools:
    return Tools(functions=[ToolFunction(name=name) for name in names], **fields)


def a_call(depth: int = 0) -> ToolCall:
    return ToolCall(id="a", name="b", arguments=nested(depth))


def said(**fields: Any) -> ChatMessage:
    return ChatMessage(**{"role": ChatRole.ASSISTANT, "content": "", **fields})


@pytest.mark.spec("HP-OAI-8")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"messages": None, "prompt": "x", "tools": tools("look")}, "`tools` go with `messages`"),
        ({"tools": tools("look", "look")}, "have the name 'look'"),
        ({"tools": tools("look", only="fly")}, "`tools.only` is 'fly'"),
        ({"tools": tools("look"), "sampling": Sampling(grammar="root ::= []")}, "`tools` and `sampling.grammar`"),
        ({"messages": [said(role=ChatRole.USER, tool_calls=[a_call()])]}, "`messages[0].tool_calls`"),
        ({"messages": [said(tool_call_id="a")]}, "`messages[0].tool_call_id`"),
        ({"messages": [said(role=ChatRole.TOOL)]}, "`messages[0].tool_call_id`"),
        ({"messages": [said(tool_calls=[a_call(65)])]}, "nested more than 64 deep"),
        (
            {"tools": Tools(functions=[ToolFunction(name="a", parameters={"default": nested(64)})])},
            "nested more than 64",
        ),
        (
            {"tools": Tools(functions=[ToolFunction(name="a", parameters={"enum": [0] * 5000})])},
            "more than 4096 values",
        ),
    ],
)
def test_tools_that_contradict_themselves_are_refused(changes: dict[str, Any], reason: str) -> None:
    """Or that no template should have to write out."""
    pool = a_pool(features=("chat", "tools", "grammar"), tool_syntax="hermes")
    request = a_task(**{"prompt": None, "messages": CHAT, **changes})
    with pytest.raises(InvalidParams, match=re.escape(reason)):
        admission.check_request(request, pool.spec, ["v1"])


@pytest.mark.spec("HP-OAI-8")
def test_what_is_nested_as_deep_as_may_be_is_taken() -> None:
    """And not one less."""
    pool = a_pool(features=("chat", "tools"), tool_syntax="hermes")
    messages = [said(tool_calls=[a_call(63)])]
    admission.check_request(a_task(prompt=None, messages=messages, tools=tools("look")), pool.spec, ["v1"])
