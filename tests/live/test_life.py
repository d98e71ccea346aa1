"""The whole life of a task on both real engines, over a real socket, with the model that we ship."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.live.client import ENGINES, finish, live_frames, open_client, stream, submit, until
from tests.live_service import LiveService
from tests.runtime.frames import check_order, events, text

pytestmark = pytest.mark.xdist_group("live")


@pytest.mark.spec("HP-STR-1", "HP-DET-2", "HP-DIS-1")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_story_comes_token_by_token(service: LiveService, engine: str) -> None:
    """Real tokens of a real model that read as English, and an end that names all that is needed to repeat it."""
    with open_client(service) as client:
        frames = finish(client, engine=engine, max_tokens=200, seed=11)
        story = text(frames)
        end = frames[-1].data
        assert end["engine"] == engine
        assert end["tokens_out"] >= 40
        assert end["tokens_in"] >= 4
        assert re.fullmatch(r"sha256:[0-9a-f]{64}", end["model_digest"])
        words = re.findall(r"[a-z]+", story.lower())
        assert sum(word in ("the", "a", "and", "was", "to", "she", "he", "it") for word in words) > len(words) / 8
        pool = client.get("/v1/pools/" + ("default" if engine == "llamacpp" else "second")).json()
        assert pool["model_digest"] == end["model_digest"]
        assert pool["engine_version"] == end["engine_version"]


@pytest.mark.spec("HP-DET-1", "HP-ADM-6")
@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_seed_gives_the_same_bytes_whatever_else_runs(service: LiveService, engine: str) -> None:
    """A strict task repeated among other tasks gives the same text; other seeds give other texts."""
    with open_client(service) as client:
        alone = text(finish(client, engine=engine, max_tokens=48, seed=5))

        def one(number: int) -> str:
            other = {"seed": 5} if number % 2 else {"seed": 100 + number, "determinism": "best_effort"}
            return text(finish(client, engine=engine, max_tokens=48, **other))

        with ThreadPoolExecutor(8) as threads:
            texts = list(threads.map(one, range(12)))
        assert set(texts[1::2]) == {alone}
        assert len(set(texts[0::2])) == 6


@pytest.mark.spec("HP-STR-1", "HP-ADM-1", "HP-ADM-2")
def test_64_tasks_from_16_clients_on_one_replica(service: LiveService) -> None:
    """Each ends exactly once, token indices without a gap, tokens as many as its metrics say."""

    def client_of(number: int) -> list[str]:
        ends = []
        with open_client(service) as client:
            for turn in range(4):
                kind = ("strict", "best_effort")[(number + turn) % 2]
                frames = finish(client, engine="llamacpp", max_tokens=16, determinism=kind)
                assert frames[-1].data["tokens_out"] <= 16
                ends.append(frames[-1].event)
        return ends

    with ThreadPoolExecutor(16) as threads:
        ends = [end for ends in threads.map(client_of, range(16)) for end in ends]
    assert ends == ["end"] * 64


@pytest.mark.spec("HP-STR-5")
@pytest.mark.parametrize("engine", ENGINES)
def test_characters_of_several_tokens_stay_whole(service: LiveService, engine: str) -> None:
    """A hot sampler makes byte tokens; every frame is still valid UTF-8 without a replacement in mid-character."""
    with open_client(service) as client:
        sampling = {"temperature": 8.0, "top_k": 0, "top_p": 1.0} | ({"min_p": 0.0} if engine == "llamacpp" else {})
        for seed in range(4):
            frames = finish(client, engine=engine, prompt="Zoë näht 日本", max_tokens=200, seed=seed, sampling=sampling)
            assert frames[-1].event == "end"
            assert frames[-1].data["tokens_out"] >= events(frames).count("token")


@pytest.mark.spec("HP-STR-6")
@pytest.mark.parametrize("engine", ENGINES)
def test_cancel_in_mid_stream(service: LiveService, engine: str) -> None:
    """Once cancel has answered, no token follows, and the slot is free for the next task."""
    with open_client(service) as client:
        sampling = {"temperature": 0.0, "repeat_penalty": 1.3}
        task_id = submit(client, engine=engine, max_tokens=900, sampling=sampling)["task_id"]
        with live_frames(client, task_id) as frames:
            for frame in frames:
                if frame.event == "token":
                    break
            answer = client.post(f"/v1/tasks/{task_id}/cancel")
            assert answer.status_code == 204
            rest = list(frames)
        again = stream(client, task_id)
        check_order(again)
        if again[-1].event == "error":  # else the model had said all before the cancel came
            assert again[-1].data["code"] == "CANCELED"
            assert rest[-1] == again[-1]
        assert client.post(f"/v1/tasks/{task_id}/cancel").status_code == 204
        pool = "default" if engine == "llamacpp" else "second"
        until(lambda: client.get(f"/v1/pools/{pool}/health").json()["replicas"][0]["slots_busy"] == 0)


@pytest.mark.spec("HP-STR-7")
def test_last_event_id_over_http(service: LiveService) -> None:
    """A stream opened again goes on behind the frame that it names, byte for byte."""
    with open_client(service) as client:
        frames = finish(client, max_tokens=30, seed=3)
        middle = len(frames) // 2
        headers = {"Last-Event-ID": str(frames[middle].number)}
        assert (
            stream(client, client.get("/v1/tasks?limit=1").json()["items"][0]["task_id"], **headers)
            == (frames[middle + 1 :])
        )


@pytest.mark.spec("HP-ADM-7")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_prompt_over_the_context_is_refused_with_both_numbers(service: LiveService, engine: str) -> None:
    """Tokens are counted by the model's own tokenizer before anything is queued."""
    with open_client(service) as client:
        body = {"model_ref": "builtin:tiny", "engine": engine, "prompt": "the little fox " * 2000}
        answer = client.post("/v1/tasks", json=body)
        assert answer.status_code == 400
        details = answer.json()["details"]
        assert details["prompt_tokens"] > details["pool_ctx"] == (2048 if engine == "llamacpp" else 1024)


@pytest.mark.parametrize("engine", ENGINES)
def test_messages_go_through_the_models_own_template(service: LiveService, engine: str) -> None:
    """A conversation is rendered by the engine, and so has more tokens than its words alone."""
    with open_client(service) as client:
        messages = [{"role": "user", "content": "Tell me a story about a brave fox."}]
        chat = client.post(
            "/v1/tasks", json={"model_ref": "builtin:tiny", "engine": engine, "messages": messages, "max_tokens": 8}
        )
        assert chat.status_code == 202, chat.text
        plain = finish(client, engine=engine, prompt=messages[0]["content"], max_tokens=8)
        rendered = stream(client, chat.json()["task_id"])
        assert rendered[-1].data["tokens_in"] > plain[-1].data["tokens_in"]


@pytest.mark.spec("HP-DIS-1", "HP-DIS-2", "HP-DIS-3", "HP-PLC-2", "HP-ADM-3")
def test_capabilities_describe_what_is_there(service: LiveService) -> None:
    """Versions, limits, devices, profiles and concurrency are those of this installation."""
    with open_client(service) as client:
        until(lambda: all(pool["ready"] for pool in client.get("/v1/pools").json()["items"]))
        found = client.get("/v1/capabilities").json()
        assert found["api_version"] == client.get("/openapi/data.json").json()["info"]["version"]
        assert {engine["engine"] for engine in found["engines"]} == set(ENGINES)
        assert [pool["slots"] for pool in found["pools"]] == [4, 1]
        assert found["concurrency"] == {"recommended": 2, "slots": 5}
        assert found["queue"] == {"capacity": 64, "full_policy": "reject"}
        assert [profile["version"] for profile in found["sampler_profiles"]] == ["v1", "greedy-v1"]
        assert found["devices"][0]["vram_free_bytes"] > 0
        assert all(engine["determinism"] for engine in found["engines"])
        assert client.get("/v1/replicasets").status_code == 404


@pytest.mark.spec("HP-OBS-5", "HP-SEC-7", "HP-SEC-2")
def test_the_log_is_json_lines_with_the_fields_and_without_the_token(service: LiveService) -> None:
    """One event a line, the request's correlation ID on its task's lines, uvicorn's lines too, no secret anywhere."""
    with open_client(service) as client:
        answer = client.post(
            "/v1/tasks",
            json={"model_ref": "builtin:tiny", "prompt": "Once", "max_tokens": 4},
            headers={"X-Correlation-Id": "find-me-in-the-log"},
        )
        stream(client, answer.json()["task_id"])
        httpx.get(service.url + "/v1/pools", headers={"Authorization": "Bearer wrong-but-secret"}, trust_env=False)
    mine = [line for line in service.log() if line.get("correlation_id") == "find-me-in-the-log"]
    assert [line["message"] for line in mine] == ["task admitted", "task started", "task succeeded"]
    last = mine[-1]
    assert {"task_id", "engine", "engine_version", "pool_id", "replica_id", "tokens_in", "tokens_out"} <= set(last)
    assert last["decode_time_ms"] >= 0
    assert any(line["logger"].startswith("uvicorn") for line in service.log())
    raw = service.log_path.read_text()
    assert service.token not in raw
    assert "wrong-but-secret" not in raw


@pytest.mark.parametrize("engine", ENGINES)
def test_top_k_of_0_switches_it_off(service: LiveService, engine: str) -> None:
    """It is not the same as top_k 1, which would give every seed the same text."""
    with open_client(service) as client:
        sampling = {"temperature": 1.5, "top_p": 1.0, "top_k": 0}
        texts = {text(finish(client, engine=engine, max_tokens=24, seed=seed, sampling=sampling)) for seed in range(4)}
        assert len(texts) > 1


@pytest.mark.spec("HP-STR-6", "HP-PLC-7")
@pytest.mark.parametrize(("engine", "pool", "words"), [("llamacpp", "default", 390), ("ctransformers", "second", 190)])
def test_cancel_while_a_long_prompt_is_read_costs_no_worker(
    service: LiveService, engine: str, pool: str, words: int
) -> None:
    """The engine looks up between two batches of the prompt: the slot gets free and the worker stays."""
    with open_client(service) as client:
        before = client.get(f"/v1/pools/{pool}/health").json()["replicas"][0]["restarts"]
        for _ in range(3):
            task_id = submit(client, engine=engine, prompt="the little fox " * words, max_tokens=20)["task_id"]
            assert client.post(f"/v1/tasks/{task_id}/cancel").status_code == 204
            assert stream(client, task_id)[-1].data["code"] == "CANCELED"
        assert finish(client, engine=engine, max_tokens=4)[-1].event == "end"
        assert client.get(f"/v1/pools/{pool}/health").json()["replicas"][0]["restarts"] == before
