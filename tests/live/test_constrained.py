"""Answers that must match a schema or a grammar, on the real worker: good ones are kept, bad ones do no harm."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import pytest

from tests.hostile import GRAMMARS, KEPT, SCHEMAS
from tests.live.client import finish, open_client
from tests.live.models import health
from tests.live_service import LiveService
from tests.runtime.frames import Seen, text

pytestmark = pytest.mark.xdist_group("live")

REFUSED_WITHIN_S = 20.0  # with two cores that are wanted by others; a second or three when they are not
HOSTILE = [
    *(pytest.param({"grammar": grammar}, id=f"grammar: {name}") for name, grammar in GRAMMARS.items() if grammar),
    *(pytest.param({"json_schema": schema}, id=f"schema: {name}") for name, schema in SCHEMAS.items()),
]


def refusal(client: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = client.post(
        "/v1/tasks", json={"model_ref": "builtin:tiny", "prompt": "A fox:", "engine": "llamacpp", **body}
    )
    assert answer.status_code == 400, answer.text
    envelope: dict[str, Any] = answer.json()
    return envelope


def constrained(client: httpx.Client, sampling: dict[str, Any], seed: int = 1, **body: Any) -> list[Seen]:
    body = {"engine": "llamacpp", "prompt": "Once upon a time", "max_tokens": 400, **body}
    return finish(client, seed=seed, sampling=sampling, **body)


@pytest.mark.spec("HP-ADM-4", "HP-ADM-7")
@pytest.mark.parametrize("sampling", HOSTILE)
def test_a_hostile_one_is_refused_in_good_time(service: LiveService, sampling: dict[str, Any]) -> None:
    """400 with a reason, before the queue, and the worker is the one that was there before."""
    with open_client(service) as client:
        finish(client, engine="llamacpp", max_tokens=1)
        before = health(client, "default")["replicas"]
        began = time.monotonic()
        envelope = refusal(client, sampling=sampling)
        assert time.monotonic() - began < REFUSED_WITHIN_S
        assert envelope["code"] == "INVALID_PARAMS"
        assert re.search(r"`sampling\.(grammar|json_schema)`|the grammar of the answer", envelope["message"])
    with open_client(service) as client:
        assert finish(client, engine="llamacpp", max_tokens=4)[-1].event == "end"
        assert [one["restarts"] for one in health(client, "default")["replicas"]] == [one["restarts"] for one in before]


@pytest.mark.spec("HP-ADM-7")
def test_others_are_served_while_a_hostile_one_is_judged(service: LiveService) -> None:
    """The judgement takes seconds; a task that came after it does not wait for it."""
    slow = {"grammar": GRAMMARS["300 stars"] + ' "unlike any other"'}
    with open_client(service) as client, ThreadPoolExecutor(1) as threads:
        finish(client, engine="llamacpp", max_tokens=1)
        judged = threads.submit(refusal, client, sampling=slow)
        finish(client, engine="llamacpp", max_tokens=2)
        was_first = not judged.done()
        judged.result()
        assert was_first


@pytest.mark.spec("HP-ADM-4")
@pytest.mark.parametrize("name", KEPT)
def test_an_answer_is_valid_under_its_schema(service: LiveService, name: str) -> None:
    """Whatever a seed makes of it. An answer that the limit cut off is only a beginning."""
    validator = jsonschema.Draft202012Validator(KEPT[name])
    whole = 0
    with open_client(service) as client:
        for seed in range(6):
            frames = constrained(client, {"json_schema": KEPT[name], "temperature": 1.2}, seed)
            if frames[-1].data["finish_reason"] == "stop":
                whole += 1
                validator.validate(json.loads(text(frames)))
    assert whole > 0


@pytest.mark.spec("HP-ADM-4", "HP-DET-1")
def test_an_answer_follows_its_grammar_and_its_seed(service: LiveService) -> None:
    """The same bytes for the same seed, and nothing that the grammar does not let through."""
    grammar = 'root ::= name " the " animal "."\nname ::= "Ann" | "Bob" | "Zoe"\nanimal ::= [a-z]{3,8}'
    with open_client(service) as client:
        texts = [text(constrained(client, {"grammar": grammar}, seed)) for seed in (1, 2, 3, 1, 2, 3)]
    assert texts[:3] == texts[3:]
    for answer in texts:
        assert re.fullmatch(r"(Ann|Bob|Zoe) the [a-z]{3,8}\.", answer)


@pytest.mark.spec("HP-ADM-4")
def test_a_constraint_holds_for_a_conversation_and_for_each_input(service: LiveService) -> None:
    """`messages` go through the template first; several inputs have an answer each."""
    with open_client(service) as client:
        said = constrained(
            client, {"grammar": 'root ::= "yes" | "no"'}, prompt=None, messages=[{"role": "user", "content": "Well?"}]
        )
        assert text(said) in ("yes", "no")
        both = constrained(client, {"grammar": 'root ::= "yes" | "no"'}, prompt=None, inputs=["Well?", "Really?"])
        assert re.fullmatch("(yes|no){2}", text(both))


@pytest.mark.spec("HP-ADM-4")
def test_only_one_constraint_may_be_given(service: LiveService) -> None:
    """Nobody could say which of two holds."""
    with open_client(service) as client:
        envelope = refusal(client, sampling={"json_schema": {"type": "string"}, "grammar": 'root ::= "a"'})
    assert envelope["message"].startswith("give one of `sampling.json_schema` and `sampling.grammar`")


@pytest.mark.spec("HP-ADM-4", "HP-DIS-1")
def test_an_engine_that_follows_no_grammar_says_so(service: LiveService) -> None:
    """ctransformers: 400 and not in its features; llamacpp has both."""
    with open_client(service) as client:
        for name, value in (("grammar", 'root ::= "a"'), ("json_schema", {"type": "string"})):
            envelope = refusal(client, engine="ctransformers", sampling={name: value})
            assert f"does not offer `sampling.{name}`" in envelope["message"]
        engines = {one["engine"]: one["features"] for one in client.get("/v1/capabilities").json()["engines"]}
    assert {"grammar", "json_schema"} <= set(engines["llamacpp"])
    assert not {"grammar", "json_schema"} & set(engines["ctransformers"])


@pytest.mark.spec("HP-ADM-4")
@pytest.mark.parametrize("engine", ["llamacpp", "ctransformers"])
def test_a_stop_text_ends_the_answer_wherever_tokens_end(service: LiveService, engine: str) -> None:
    """Also one that is made of several tokens and begins within one; it is not part of the answer."""
    with open_client(service) as client:
        body: dict[str, Any] = {"engine": engine, "seed": 3, "max_tokens": 120}
        free = text(finish(client, **body))
        for start in (12, 37):
            stop = free[start : start + 15]
            frames = finish(client, **body, sampling={"stop": ["never comes", stop]})
            assert text(frames) == free[: free.index(stop)]
            assert frames[-1].data["finish_reason"] == "stop"
            assert frames[-1].data["tokens_out"] < 120
