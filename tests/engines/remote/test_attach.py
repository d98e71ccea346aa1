"""Attaching: what a server has is found out, what is stated goes first, and what is in the way is named."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from llama_orch.engines.base import LoadFailed, Offer
from llama_orch.outbound.plugins import Rewrite
from tests.engines.remote.support import KEY, a_key_file, a_remote_spec, an_engine, attached
from tests.engines.remote.upstream import MODEL, Answer, an_upstream, fails, models, says, usual
from tests.engines.support import run
from tests.outbound.stand_in import a_door

PROPS = says({"total_slots": 3, "default_generation_settings": {"n_ctx": 1024}, "build_info": "b1"})
LLAMACPP: dict[str, Any] = {"models": models("llamacpp", meta={"n_ctx_train": 2048})}
EXTRAS = ("kv_hint", "sampling.top_k", "sampling.repeat_penalty")


def llamacpp() -> dict[str, list[Answer]]:
    return {**usual(**LLAMACPP), "/props": [PROPS]}


@pytest.mark.spec("HP-REM-1", "HP-REM-6")
@pytest.mark.parametrize(
    ("answers", "settings", "slots", "ctx", "offer"),
    [
        (usual, {}, 8, 4096, Offer(("completion",), ("chat",), lacks=EXTRAS)),
        (usual, {"json_schema": True}, 8, 4096, Offer(("completion",), ("chat", "json_schema"), lacks=EXTRAS)),
        (usual, {"max_concurrency": 2, "ctx": 99}, 2, 99, Offer(("completion",), ("chat",), lacks=EXTRAS)),
        (usual, {"workload": "embedding"}, 8, 4096, Offer(("embedding",), lacks=("kv_hint",))),
        (
            lambda: usual(models=models("vllm", max_model_len=32768)),
            {},
            8,
            32768,
            Offer(("completion",), ("chat", "json_schema", "min_p"), lacks=("kv_hint",)),
        ),
        (
            lambda: usual(models=models("sglang", max_model_len=2**40)),
            {"json_schema": False},
            8,
            2**24,
            Offer(("completion",), ("chat", "min_p"), lacks=("kv_hint",)),
        ),
        (
            llamacpp,
            {},
            3,
            1024,
            Offer(("completion",), ("chat", "json_schema", "grammar", "min_p"), lacks=("kv_hint",)),
        ),
        (llamacpp, {"max_concurrency": 1}, 1, 1024, None),
        (lambda: {**llamacpp(), "/props": [fails(403)]}, {}, 8, 2048, None),
        (lambda: usual(models=models(max_model_len=-5)), {}, 8, 4096, None),
    ],
)
def test_what_a_server_has(answers: Any, settings: dict[str, Any], slots: int, ctx: int, offer: Offer | None) -> None:
    async def main() -> None:
        async with an_upstream(answers()) as upstream:
            worker = await an_engine(upstream, **settings).launch(a_remote_spec())
            facts = await worker.ready()
            assert (facts.slots, facts.ctx, facts.engine_version) == (slots, ctx, "v1")
            assert facts.offer is not None
            assert offer is None or facts.offer == offer

    run(main())


WAYS: dict[str, tuple[bytes, str]] = {
    "another model": (models(model="another"), "no model 'org/model'; it has: another"),
    "many models": (
        says({"data": [{"id": f"m{n}"} for n in range(1000)]}),
        "it has: m0, m1, m2, m3, m4, m5, m6, m7, …",
    ),
    "no models": (says({"data": []}), "it has: none"),
    "no list": (says({"data": "x"}), "not what the API says"),
    "no JSON": (says(b"<html>"), "not what the API says"),
    "deep JSON": (says(b"[" * 200_000), "not what the API says"),
    "9 MiB": (says(b"x" * (9 << 20)), "more than 8388608 bytes"),
    "not found": (fails(404), "answers 404 when it is asked for its models"),
    "a refused key": (fails(401), "refuses the key"),
    "a redirect": (says(b"", "Location: http://127.0.0.1:1/", status="302 Found"), "redirects (302)"),
    "a large head": (b"HTTP/1.1 200 OK\r\nX: " + b"x" * (1 << 20) + b"\r\n\r\n", "not HTTP"),
    "another protocol": (b"SSH-2.0-OpenSSH\r\n", "not HTTP"),
    "nothing": (b"", "not HTTP"),
}


@pytest.mark.spec("HP-REM-3", "HP-REM-7")
@pytest.mark.parametrize(("answer", "reason"), WAYS.values(), ids=WAYS)
def test_what_is_in_the_way(answer: bytes, reason: str) -> None:
    async def main() -> None:
        async with an_upstream(usual(models=answer)) as upstream:
            worker = await an_engine(upstream).launch(a_remote_spec())
            with pytest.raises(LoadFailed) as refused:
                await worker.ready()
            assert reason in str(refused.value)
            assert str(refused.value).startswith("server box")
            assert len(str(refused.value)) < 500

    run(main())


@pytest.mark.spec("HP-REM-7")
def test_a_server_that_dribbles_is_not_waited_for() -> None:
    """A byte now and then does not make an answer."""

    async def dribble(reader: Any, writer: Any, heard: Any) -> None:
        while not reader.at_eof():
            writer.write(b"H")
            await writer.drain()
            with suppress(TimeoutError):
                async with asyncio.timeout(0.02):
                    await reader.read(1)

    async def main() -> None:
        async with an_upstream(usual(models=dribble)) as upstream:
            worker = await an_engine(upstream, connect_timeout_ms=200).launch(a_remote_spec())
            with pytest.raises(LoadFailed, match="took longer than"):
                await worker.ready()

    run(main())


@pytest.mark.spec("HP-REM-2")
def test_the_key_goes_to_the_server_and_is_read_anew(tmp_path: Path) -> None:
    async def main() -> None:
        path = a_key_file(tmp_path)
        async with an_upstream() as upstream:
            engine = an_engine(upstream, api_key_file=str(path))
            await (await engine.launch(a_remote_spec())).ready()
            assert {one.headers["authorization"] for one in upstream.heard} == {f"Bearer {KEY}"}
            upstream.heard.clear()
            path.write_text("another-key-1\n")
            await (await engine.launch(a_remote_spec())).ready()
            assert {one.headers["authorization"] for one in upstream.heard} == {"Bearer another-key-1"}

    run(main())


@pytest.mark.spec("HP-REM-2")
@pytest.mark.parametrize(
    ("content", "mode", "reason"),
    [
        (KEY, 0o640, "other users can read the key"),
        (KEY, 0o604, "other users can read the key"),
        ("seven77", 0o600, "at least 8 visible"),
        ("zwei Wörter", 0o600, "without spaces"),
        (f"{KEY}\n{KEY}", 0o600, "one line"),
    ],
    ids=["group", "world", "short", "odd", "lines"],
)
def test_a_key_that_is_none(tmp_path: Path, content: str, mode: int, reason: str) -> None:
    """And the refusal does not tell it."""

    async def main() -> None:
        path = a_key_file(tmp_path, content, mode)
        async with an_upstream() as upstream:
            with pytest.raises(LoadFailed) as refused:
                await an_engine(upstream, api_key_file=str(path)).launch(a_remote_spec())
            assert reason in str(refused.value)
            assert content.split()[0] not in str(refused.value)
            assert upstream.heard == []

    run(main())


@pytest.mark.spec("HP-REM-2")
def test_a_key_file_that_is_a_link_or_is_not_there(tmp_path: Path) -> None:
    async def main() -> None:
        link = tmp_path / "link"
        link.symlink_to(a_key_file(tmp_path))
        async with an_upstream() as upstream:
            for path in (link, tmp_path / "nothing"):
                with pytest.raises(LoadFailed, match="cannot be read"):
                    await an_engine(upstream, api_key_file=str(path)).launch(a_remote_spec())

    run(main())


@pytest.mark.spec("HP-REM-2", "HP-SEC-4")
def test_the_policy_decides_on_each_connection() -> None:
    """A private address that the configuration names is called; one that a list denies is not, name or address; and
    each connection is judged by itself, for the purpose of an engine."""

    async def main() -> None:
        async with attached() as (_, upstream):
            assert upstream.heard
        async with an_upstream() as upstream:
            for denied in ({"deny": ["127.0.0.0/8"], "allow": []}, {"default": "deny", "allow": []}):
                worker = await an_engine(upstream, a_door(**denied)).launch(a_remote_spec())
                with pytest.raises(LoadFailed, match="the outbound policy denies this request"):
                    await worker.ready()
            assert upstream.heard == []
            door = a_door(default="deny", allow=["127.0.0.1"])
            await (await an_engine(upstream, door).launch(a_remote_spec())).ready()
            assert [one.purpose for one in door.decisions] == ["engine"] * len(upstream.heard)

    run(main())


@pytest.mark.spec("HP-REM-2", "HP-SEC-4")
def test_a_name_is_looked_up_once_for_each_connection_and_pinned() -> None:
    """What the name stands for later is judged anew: a denied address is not connected to."""

    async def main() -> None:
        async with an_upstream() as upstream:
            door = a_door({"box.lan": [["127.0.0.1"], ["127.0.0.1"], ["10.9.9.9"]]}, allow=[], deny=["10.0.0.0/8"])
            engine = an_engine(upstream, door, base_url=f"http://box.lan:{upstream.port}/v1", health_interval_ms=100)
            worker = await engine.launch(a_remote_spec())
            await worker.ready()
            assert [one.headers["host"] for one in upstream.heard] == [f"box.lan:{upstream.port}"] * 2
            assert door.names.asked == ["box.lan"] * 2
            assert "the outbound policy denies" in await worker.lost()

    run(main())


@pytest.mark.spec("HP-REM-2")
def test_no_plugin_sends_it_elsewhere() -> None:
    class Bend:
        async def ask(self, request: Any) -> Rewrite:
            return Rewrite("http://127.0.0.1:1/", "a bend")

    async def main() -> None:
        plugins: Any = Bend()
        async with an_upstream() as upstream:
            worker = await an_engine(upstream, a_door(plugins=plugins)).launch(a_remote_spec())
            with pytest.raises(LoadFailed, match="elsewhere, which is not done"):
                await worker.ready()
            assert upstream.heard == []

    run(main())


def test_the_model_that_is_meant() -> None:
    """Its ID may have slashes."""

    async def main() -> None:
        async with attached() as (_, upstream):
            assert upstream.asked("/v1/models")[0].body is None
        async with an_upstream(usual(models=models(model="a/b/c"))) as upstream:
            await (await an_engine(upstream).launch(a_remote_spec("a/b/c"))).ready()
            with pytest.raises(LoadFailed, match=MODEL):
                await (await an_engine(upstream).launch(a_remote_spec())).ready()

    run(main())
