"""docs/outbound.md: its plugin is one, and its figures are those of the code."""

from __future__ import annotations

import types

import pytest

from llama_orch.contract.models import FetchRequest
from llama_orch.outbound.door import Limits
from llama_orch.outbound.plugins import ANSWER_LIMIT_S, GROUP, Plugins
from llama_orch.runtime.fetching import AT_ONCE_MAX, REDIRECTS_MAX
from tests.examples.pages import ROOT, blocks
from tests.outbound.stand_in import a_door
from tests.outbound.test_door import on_sockets

pytestmark = pytest.mark.spec("HP-SEC-4")

PAGE = ROOT / "docs" / "outbound.md"
TEXT = " ".join(PAGE.read_text(encoding="utf-8").split())


@on_sockets
async def test_the_plugin_of_the_page() -> None:
    """It vetoes, rewrites and has no opinion, as the page says."""
    (source,) = [block.text for block in blocks(PAGE) if block.language == "py"]
    module = types.ModuleType("of_the_page")
    exec(compile(source, PAGE.name, "exec"), module.__dict__)  # noqa: S102  # it is ours
    plugins = Plugins()
    plugins.register(module, "of the page")
    door = a_door(plugins=plugins).outbound
    assert "tools stay outside" in (await door.check("http://a.internal.example/", "tool")).reason
    assert (await door.check("http://a.internal.example/", "model")).is_allowed
    decision = await door.check("https://huggingface.co/a/b?c")
    assert decision.target is not None
    assert decision.target.url == "https://mirror.example/a/b?c"


def test_the_figures_are_those_of_the_code() -> None:
    """What the page says in figures is what the constants are."""
    request = FetchRequest(url="http://x/")
    assert (request.max_bytes, request.timeout_ms) == (1 << 20, 10_000)
    assert f"takes longer than {ANSWER_LIMIT_S:g} s denies" in TEXT
    assert f"{AT_ONCE_MAX} at once" in TEXT
    assert Limits(1, 1.0).redirects_max == REDIRECTS_MAX == 5
    assert "at most five are followed" in TEXT
    assert f"`{GROUP}`" in TEXT
