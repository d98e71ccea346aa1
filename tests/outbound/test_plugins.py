"""Plugins: they veto, replace and rewrite, once and in front of the name server; one that fails denies."""

from __future__ import annotations

import asyncio
import importlib.metadata
import threading
from collections.abc import Callable
from typing import Any

import pytest

from llama_orch.outbound.plugins import (
    GROUP,
    THREADS_MAX,
    Allow,
    Deny,
    OutboundRequest,
    PluginError,
    Plugins,
    Rewrite,
    hookimpl,
)
from tests.live.client import until
from tests.outbound.stand_in import a_door, a_machine, ok, play, redirect
from tests.outbound.test_door import denied, got, on_sockets

pytestmark = pytest.mark.spec("HP-SEC-4")


class Plugin:
    """Answers as it is told, and remembers what it was asked."""

    def __init__(self, answer: Callable[[OutboundRequest], Any]) -> None:
        self._answer = answer
        self.asked: list[OutboundRequest] = []

    @hookimpl
    def llama_orch_outbound(self, request: OutboundRequest) -> Any:
        self.asked.append(request)
        return self._answer(request)


def plugged(*answers: Callable[[OutboundRequest], Any], answer_limit_s: float = 5.0) -> Plugins:
    plugins = Plugins(answer_limit_s=answer_limit_s)
    for number, answer in enumerate(answers):
        plugins.register(Plugin(answer), f"plugin {number}")
    return plugins


@on_sockets
async def test_a_veto() -> None:
    """Before a name server is asked, with the plugin's reason."""
    door = a_door(plugins=plugged(lambda request: Deny("not today")))
    assert "not today" in (await denied(door, "http://files.example/")).message
    assert door.rules == ["plugin"]
    assert door.names.asked == []


@on_sockets
async def test_a_plugin_is_told_what_the_lists_say() -> None:
    """The whole URL, what it is for, and the verdict so far; each redirect is a question of its own."""
    plugin = Plugin(lambda request: None)
    plugins = Plugins()
    plugins.register(plugin, "one")
    async with a_machine({"/a?b=c": redirect("/d"), "/d": ok()}) as machine:
        await got(a_door(plugins=plugins), f"{machine.url}/a?b=c")
        assert plugin.asked[0] == OutboundRequest(
            f"{machine.url}/a?b=c",
            "http",
            "127.0.0.1",
            machine.port,
            "tool",
            True,
            "policy.outbound.allow[0] names 127.0.0.1",
        )
        assert [one.url for one in plugin.asked] == [f"{machine.url}/a?b=c", f"{machine.url}/d"]


@on_sockets
async def test_a_plugin_replaces_allow_and_default_but_not_the_addresses() -> None:
    """Allow lets through what no list allows; a private address stays private."""
    async with a_machine({"/": ok()}) as machine:
        allowing = plugged(lambda request: Allow("I know it"))
        door = a_door({"files.example": [["127.0.0.1"]]}, default="deny", plugins=allowing)
        await got(door, f"http://files.example:{machine.port}/")
        assert door.rules == ["plugin"]
        assert (await denied(door, "http://127.0.0.2/")).policy_label == "address"


@on_sockets
@pytest.mark.parametrize("entry", ["files.example", "*.example", "*", "127.0.0.1", "127.0.0.0/8"])
async def test_no_plugin_lifts_an_entry_of_deny(entry: str) -> None:
    """By name it is denied before a name server is asked; by address as soon as the addresses are known."""
    door = a_door(
        {"files.example": [["127.0.0.1"]]}, deny=[entry], plugins=plugged(lambda request: Allow("I know better"))
    )
    assert (await denied(door, "http://files.example/")).policy_label == "deny[0]"
    assert door.names.asked == ([] if "1" not in entry else ["files.example"])


@on_sockets
async def test_a_rewritten_request_is_put_to_the_plugins_again() -> None:
    """They may veto where another one leads; no second rewrite and no Allow counts."""

    def careful(request: OutboundRequest) -> Any:
        return Deny("not there") if request.host == "mirror.example" else None

    def to(host: str) -> Callable[[OutboundRequest], Any]:
        return lambda request: Rewrite(f"http://{host}/", "there")

    door = a_door(plugins=plugged(to("mirror.example"), careful))
    assert "not there" in (await denied(door, "http://a.example/")).message
    for answer in (to("127.0.0.1"), lambda request: Allow("yes")):
        once = plugged(
            lambda r, answer=answer: answer(r) if r.host == "b.example" else Rewrite("http://b.example/", "b")
        )
        door = a_door(allow=[], default="deny", plugins=once)
        assert (await denied(door, "http://a.example/")).policy_label == "default"


@on_sockets
async def test_a_rewrite() -> None:
    """To a mirror, which the lists judge; secrets for the first host stay behind."""
    async with a_machine({"/b": ok(b"mirrored")}) as machine:
        mirror = plugged(lambda request: Rewrite(request.url.replace("http://a.example", machine.url), "the mirror"))
        door = a_door(plugins=mirror)
        reply, body = await got(door, "http://a.example/b", headers={"Authorization": "Bearer s"})
        assert (body, reply.target.url) == (b"mirrored", f"{machine.url}/b")
        assert "authorization" not in machine.headers()
        assert door.names.asked == []
        for bad, label in (
            ("http://127.0.0.2/", "address"),
            ("ftp://x/", "scheme"),
            ("http://denied.example/", "deny[0]"),
        ):
            door = a_door(plugins=plugged(lambda request, bad=bad: Rewrite(bad, "odd")), deny=["denied.example"])
            assert (await denied(door, "http://a.example/")).policy_label == label


@on_sockets
async def test_the_strictest_of_several_counts() -> None:
    """A Deny before a Rewrite before an Allow, whoever is asked first."""
    allow, deny = (lambda request: Allow("yes")), (lambda request: Deny("no"))
    for answers in ((allow, deny), (deny, allow), (lambda request: Rewrite("http://127.0.0.1/", "there"), deny)):
        assert (await denied(a_door(plugins=plugged(*answers)), "http://127.0.0.1/")).policy_label == "plugin"


def raising(request: OutboundRequest) -> Any:
    raise RuntimeError("hunter2")


def leaving(request: OutboundRequest) -> Any:
    raise SystemExit(3)


@on_sockets
@pytest.mark.parametrize(
    "answer", [raising, leaving, lambda request: True, lambda request: "allow", lambda request: Allow(None)]
)
async def test_a_plugin_that_fails_denies(answer: Any) -> None:
    """Whatever it raises or says; what it raises is not repeated to the caller."""
    error = await denied(a_door(plugins=plugged(answer, answer_limit_s=0.5)), "http://127.0.0.1/")
    assert error.policy_label == "plugin"
    assert "hunter2" not in error.message


def test_a_plugin_that_does_not_come_back_denies() -> None:
    """At its time limit; when too many have not come back, at once. When they do, it is asked again."""
    go_on = threading.Event()
    threads = threading.active_count()

    async def act() -> None:
        door = a_door(plugins=plugged(lambda request: go_on.wait() and None, answer_limit_s=0.05))
        for _ in range(THREADS_MAX):
            assert "in time" in (await door.outbound.check("http://127.0.0.1/")).reason
        assert "earlier requests" in (await door.outbound.check("http://127.0.0.1/")).reason
        go_on.set()
        await asyncio.to_thread(until, lambda: threading.active_count() <= threads + 1)  # this one itself
        assert (await door.outbound.check("http://127.0.0.1/")).is_allowed

    try:
        play(act())
    finally:
        go_on.set()


class Package(importlib.metadata.Distribution):
    """An installed package with one entry point."""

    def __init__(self, target: str) -> None:
        self._target = target

    def read_text(self, filename: str) -> str | None:
        texts = {
            "METADATA": "Metadata-Version: 2.1\nName: a-plugin\nVersion: 1\n",
            "entry_points.txt": f"[{GROUP}]\na_plugin = {self._target}\n",
        }
        return texts.get(filename)

    def locate_file(self, path: Any) -> Any:
        raise NotImplementedError


no_opinion = Plugin(lambda request: Deny("installed"))


class Misnamed:
    @hookimpl
    def llama_orch_outbnd(self, request: OutboundRequest) -> None:
        """A hook that there is not."""


misnamed = Misnamed()


def installed(monkeypatch: pytest.MonkeyPatch, target: str) -> Plugins:
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: [Package(target)])
    return Plugins.installed()


def test_installed_plugins_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By their entry points."""
    plugins = installed(monkeypatch, f"{__name__}:no_opinion")

    async def act() -> None:
        assert "installed" in (await a_door(plugins=plugins).outbound.check("http://127.0.0.1/")).reason

    play(act())


@pytest.mark.parametrize("target", ["no_such_module:x", f"{__name__}:misnamed"])
def test_a_plugin_that_cannot_be_used_stops_the_start(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """The service does not go on without a policy that somebody has installed."""
    with pytest.raises(PluginError, match=GROUP):
        installed(monkeypatch, target)
