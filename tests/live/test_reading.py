"""Workloads `embedding` and `rerank` through the running service, with models that are made for them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.encoders import CTX, MEAN, RANK, an_encoder
from tests.live.client import finish, open_client, stream, submit, until
from tests.live.models import a_model, ref, task
from tests.live_service import LiveService, live_service
from tests.runtime.frames import Seen

pytestmark = pytest.mark.xdist_group("live")

TEXTS = ["the fox is red", "the old dog", "a house by the sea", "the fox is red"]


class Models:
    """References of the pools' models."""

    embeds: str
    ranks: str
    plain: tuple[str, str]  # of no pool


@pytest.fixture(scope="module")
def reading(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveService]:
    folder = tmp_path_factory.mktemp("encoders")
    Models.embeds = ref(an_encoder(folder / "embeds.gguf", MEAN))
    Models.ranks = ref(an_encoder(folder / "ranks.gguf", RANK))
    pools = [
        {"id": "default", "ctx": 512},
        {"id": "second", "engine": "ctransformers", "ctx": 512},
        {"id": "embeds", "model": Models.embeds, "ctx": CTX, "slots": 4},
        {"id": "ranks", "model": Models.ranks, "ctx": CTX, "slots": 2},
    ]
    Models.plain = ref(a_model(folder, "plain")), ref(a_model(folder, "other"))
    with live_service({"pools": pools, "catalog": {"file_roots": [str(folder)]}}) as running:
        yield running


@pytest.fixture
def client(reading: LiveService) -> Iterator[httpx.Client]:
    with open_client(reading) as one:
        yield one


def embedded(client: httpx.Client, **body: Any) -> list[Seen]:
    return finish(client, **{"model_ref": Models.embeds, "workload": "embedding", **body})


def ranked(client: httpx.Client, *inputs: str, **body: Any) -> list[Seen]:
    return finish(client, model_ref=Models.ranks, workload="rerank", inputs=list(inputs), **body)


def refusal(client: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/tasks", json={"model_ref": Models.embeds, "workload": "embedding", **body})
    assert answer.status_code == 400, answer.text
    envelope: dict[str, Any] = answer.json()
    assert envelope["code"] == "INVALID_PARAMS"
    return envelope


@pytest.mark.spec("HP-STR-1", "HP-ADM-4")
def test_each_input_gets_its_vector(client: httpx.Client) -> None:
    """In their order, of length 1, the same for the same text whether it comes alone or not; and no tokens."""
    frames = embedded(client, inputs=TEXTS)
    end = frames[-1].data
    assert [frame.event for frame in frames if frame.event not in ("started", "metrics")] == ["end"]
    vectors = end["embeddings"]
    assert len(vectors) == len(TEXTS)
    assert "scores" not in end
    assert vectors[0] == vectors[3] != vectors[1]
    for vector in vectors:
        assert math.isclose(sum(value * value for value in vector), 1.0, abs_tol=1e-5)
    assert (end["tokens_out"], end["finish_reason"], end["kv_warmth"]) == (0, "stop", False)
    assert end["tokens_in"] > 4 * len(TEXTS)
    assert embedded(client, prompt=TEXTS[1])[-1].data["embeddings"] == [vectors[1]]


@pytest.mark.spec("HP-STR-1", "HP-ADM-4")
def test_each_document_gets_its_score(client: httpx.Client) -> None:
    """In their order; the first input is the query and gets none."""
    end = ranked(client, "the fox", *TEXTS)[-1].data
    assert len(end["scores"]) == len(TEXTS)
    assert end["scores"][0] == end["scores"][3] != end["scores"][1]
    assert "embeddings" not in end
    assert (end["tokens_out"], end["finish_reason"]) == (0, "stop")
    other = ranked(client, "a dog", *TEXTS)[-1].data
    assert other["scores"] != end["scores"]


@pytest.mark.spec("HP-DET-1")
def test_strict_vectors_do_not_depend_on_what_else_runs(client: httpx.Client) -> None:
    """Alone, and in the middle of others: the same bytes."""
    alone = embedded(client, inputs=TEXTS)[-1].data["embeddings"]
    others = [
        submit(client, model_ref=Models.embeds, workload="embedding", inputs=TEXTS * 8, determinism="best_effort")
        for _ in range(8)
    ]
    mine = [submit(client, model_ref=Models.embeds, workload="embedding", inputs=TEXTS) for _ in range(4)]
    for admission in mine:
        assert stream(client, admission["task_id"])[-1].data["embeddings"] == alone
    for admission in others:
        assert stream(client, admission["task_id"])[-1].event == "end"


@pytest.mark.spec("HP-ADM-7")
def test_an_input_may_fill_the_context_and_no_more(client: httpx.Client) -> None:
    """512 tokens with the two that frame a text, which is what such models are used with."""
    assert embedded(client, prompt="fox " * (CTX - 2))[-1].data["tokens_in"] == CTX
    envelope = refusal(client, inputs=["fox", "fox " * (CTX - 1)])
    assert f"the prompt has {CTX + 1} tokens" in envelope["message"]
    assert envelope["details"] == {"prompt_tokens": CTX + 1, "pool_ctx": CTX}


@pytest.mark.spec("HP-ADM-7")
def test_a_document_counts_with_its_query(client: httpx.Client) -> None:
    """Together they have to fit."""
    answer = client.post(
        "/v1/tasks",
        json={"model_ref": Models.ranks, "workload": "rerank", "inputs": ["fox " * 300, "dog", "fox " * 300]},
    )
    assert (answer.status_code, answer.json()["details"]["pool_ctx"]) == (400, CTX)
    assert ranked(client, "fox " * 200, "dog", "fox " * 300)[-1].event == "end"


@pytest.mark.spec("HP-STR-6", "HP-ADM-4")
def test_a_task_that_reads_can_be_canceled_and_has_a_deadline(client: httpx.Client) -> None:
    """The slots are free afterwards, and the next task gets its vectors."""
    many = {"model_ref": Models.embeds, "workload": "embedding", "inputs": ["fox " * 500] * 256}
    task_id = submit(client, **many)["task_id"]
    until(lambda: task(client, task_id)["state"] == "running")
    assert client.post(f"/v1/tasks/{task_id}/cancel").status_code == 204
    assert stream(client, task_id)[-1].data["code"] == "CANCELED"
    late = submit(client, **many, deadline_ms=60)["task_id"]
    assert stream(client, late)[-1].data["code"] == "DEADLINE_UNMET"
    assert embedded(client, inputs=TEXTS)[-1].event == "end"
    until(lambda: all(one["slots_busy"] == 0 for one in client.get("/v1/pools/embeds/health").json()["replicas"]))


@pytest.mark.spec("HP-ADM-4")
@pytest.mark.parametrize(
    ("field", "value"),
    [("max_tokens", 5), ("expected_tokens", 5), ("sampling", {"temperature": 0.0}), ("messages", [])],
)
def test_what_has_no_sense_is_refused_by_name(client: httpx.Client, field: str, value: object) -> None:
    """Nothing that a client says about an answer's text is passed over in silence."""
    body: dict[str, Any] = {field: value, "prompt": "the fox"}
    if field == "messages":
        body = {"messages": [{"role": "user", "content": "the fox"}]}
    assert f"{field}" in refusal(client, **body)["message"]


@pytest.mark.spec("HP-ADM-4")
def test_a_ranking_needs_a_query_and_documents(client: httpx.Client) -> None:
    """A prompt, or one input, is none."""
    for body, says in (
        ({"prompt": "fox"}, "give `inputs`"),
        ({"inputs": ["fox"]}, "a query and at least one document"),
    ):
        assert says in refusal(client, **body, model_ref=Models.ranks, workload="rerank")["message"]


@pytest.mark.spec("HP-ADM-4", "HP-DIS-1")
def test_a_pool_that_cannot_names_those_that_can(client: httpx.Client) -> None:
    """With their engines and models, in the message and in the details; capabilities say the same of each pool."""
    envelope = refusal(client, model_ref="builtin:tiny", engine="llamacpp", prompt="fox")
    able = envelope["details"]["pools_able"]
    assert {one["pool_id"] for one in able} == {"second", "embeds"}
    assert f"embeds (llamacpp, {Models.embeds})" in envelope["message"]
    envelope = refusal(client, model_ref="builtin:tiny", workload="rerank", inputs=["fox", "dog"])
    assert [one["model_ref"] for one in envelope["details"]["pools_able"]] == [Models.ranks]
    envelope = refusal(client, workload="completion", prompt="fox")
    assert {one["pool_id"] for one in envelope["details"]["pools_able"]} == {"default", "second"}
    workloads = {pool["id"]: pool["workloads"] for pool in client.get("/v1/capabilities").json()["pools"]}
    assert workloads == {
        "default": ["completion"],
        "second": ["completion", "embedding"],
        "embeds": ["embedding"],
        "ranks": ["rerank"],
    }


@pytest.mark.spec("HP-ADM-4")
def test_ctransformers_embeds_with_any_model(client: httpx.Client) -> None:
    """Its own vector of the last token; without naming the engine, a task that it alone can do goes there."""
    frames = embedded(client, model_ref="builtin:tiny", inputs=TEXTS)
    end = frames[-1].data
    assert end["engine"] == "ctransformers"
    assert end["embeddings"][0] == end["embeddings"][3] != end["embeddings"][1]
    assert finish(client, engine="ctransformers", max_tokens=4)[-1].event == "end"
    assert embedded(client, model_ref="builtin:tiny", inputs=TEXTS)[-1].data["embeddings"] == end["embeddings"]


@pytest.mark.spec("HP-ADM-4", "HP-PLC-8")
def test_a_model_on_demand_gets_an_engine_that_can(client: httpx.Client) -> None:
    """The first one that takes the model and does the work with it; where there is none, each says why."""
    frames = embedded(client, model_ref=Models.plain[0], inputs=TEXTS)
    assert frames[-1].data["engine"] == "ctransformers"
    envelope = refusal(client, model_ref=Models.plain[1], workload="rerank", inputs=["fox", "dog"])
    for engine in ("llamacpp", "ctransformers"):
        assert f"{engine}: it cannot do workload 'rerank' with this model" in envelope["message"]
