"""Swagger UI in a real browser against the real service, where there is a browser."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.live_service import LiveService
from tools.check_ui import BROWSER, a_page, check

pytestmark = pytest.mark.xdist_group("live")


@pytest.mark.skipif(not BROWSER.exists(), reason=f"no {BROWSER}: `apt-get install chromium` brings it")
def test_a_task_is_submitted_in_the_browser(service: LiveService, tmp_path: Path) -> None:
    """Authorize, Try it out on POST /v1/tasks, see the 202; the token survives a reload, the console says nothing.

    UI_SCREENSHOT names the file to put the picture into.
    """
    screenshot = Path(os.environ.get("UI_SCREENSHOT") or tmp_path / "ui.png")
    with a_page() as page:
        assert check(page, service.url, service.token, screenshot) == []
    assert screenshot.read_bytes().startswith(b"\x89PNG")
