"""Plugins that judge outbound requests (pluggy).

A plugin is a package that has an entry point in the group `llama_orch.outbound`: a module or an object with this hook.

    from llama_orch.outbound.plugins import Deny, hookimpl

    @hookimpl
    def llama_orch_outbound(request):
        if request.host.endswith(".example.net"):
            return Deny("not from here")

It is asked before any name is looked up, once for each request and each redirect, in a thread of its own. It answers
None (no opinion), Deny, Allow (in place of `allow` and `default`) or Rewrite (to another URL, which the lists judge
anew, and plugins once more: then they can only veto). One Deny is enough; else one Rewrite, else one Allow. What `deny`
names, and what addresses may be called, is not a plugin's to lift. A plugin that raises, takes too long, or answers
anything else denies.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import logging
import threading
from typing import Any, NamedTuple

import pluggy

from llama_orch.outbound.decision import Purpose

PROJECT = "llama_orch"
GROUP = "llama_orch.outbound"
ANSWER_LIMIT_S = 5.0
THREADS_MAX = 16

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
log = logging.getLogger("llama_orch.outbound")


class OutboundRequest(NamedTuple):
    """What a plugin is told. `url` has its query; `is_allowed` and `reason` are what the lists say so far."""

    url: str
    scheme: str
    host: str
    port: int
    purpose: Purpose
    is_allowed: bool
    reason: str


class Deny(NamedTuple):
    reason: str


class Allow(NamedTuple):
    reason: str


class Rewrite(NamedTuple):
    url: str
    reason: str


Answer = Deny | Allow | Rewrite


class PluginError(ValueError):
    """An installed plugin cannot be used; the message names it."""


class _Specification:
    @hookspec
    def llama_orch_outbound(self, request: OutboundRequest) -> Answer | None:
        """Judge one request."""


class Plugins:
    """The plugins in use. Without any, nothing is asked."""

    def __init__(self, *, answer_limit_s: float = ANSWER_LIMIT_S) -> None:
        self._answer_limit_s = answer_limit_s
        self._threads = threading.BoundedSemaphore(THREADS_MAX)
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(_Specification)

    @classmethod
    def installed(cls) -> Plugins:
        """Those of this environment's packages; raises PluginError rather than serve without one of them."""
        plugins = cls()
        try:
            plugins._manager.load_setuptools_entrypoints(GROUP)
            plugins._manager.check_pending()
        except Exception as error:  # whatever a package raises when it is imported
            raise PluginError(f"a plugin of the group {GROUP} cannot be used: {error}") from error
        return plugins

    def register(self, plugin: object, name: str) -> None:
        self._manager.register(plugin, name)

    async def ask(self, request: OutboundRequest) -> Answer | None:
        """What they say together. Takes at most ANSWER_LIMIT_S seconds."""
        if not self._manager.hook.llama_orch_outbound.get_hookimpls():
            return None
        if not self._threads.acquire(blocking=False):
            return Deny("plugins have not answered earlier requests yet")
        done: concurrent.futures.Future[Answer | None] = concurrent.futures.Future()
        context = contextvars.copy_context()
        # A daemon: one that never comes back must not keep the program from ending.
        threading.Thread(target=context.run, args=(self._work, request, done), daemon=True).start()
        waiting = asyncio.wrap_future(done)
        await asyncio.wait((waiting,), timeout=self._answer_limit_s)
        if waiting.done():
            return waiting.result()
        log.warning("an outbound plugin did not answer within %g s", self._answer_limit_s)
        return Deny("a plugin did not answer in time")

    def _work(self, request: OutboundRequest, done: concurrent.futures.Future[Answer | None]) -> None:
        try:
            done.set_result(self._answer(request))
        finally:
            self._threads.release()

    def _answer(self, request: OutboundRequest) -> Answer | None:
        try:
            answers = self._manager.hook.llama_orch_outbound(request=request)
        except BaseException:  # it is alone in its thread, so that there is nobody whom SystemExit could concern
            log.exception("an outbound plugin failed")
            return Deny("a plugin failed; the log says how")
        return _settled(answers)


def _settled(answers: list[Any]) -> Answer | None:
    """One answer from all of them."""
    if not all(_is_answer(one) for one in answers):
        return Deny("a plugin gave an answer that is none")
    for kind in (Deny, Rewrite, Allow):
        for answer in answers:
            if isinstance(answer, kind):
                return answer
    return None


def _is_answer(value: Any) -> bool:
    return isinstance(value, Deny | Allow | Rewrite) and all(isinstance(part, str) for part in value)
