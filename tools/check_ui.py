"""Drives Swagger UI in a real browser against the real service: authorize, submit a task, read what is there, look for
errors in the console.

    python tools/check_ui.py [--browser /usr/bin/chromium] [--screenshot FILE]

Needs a Chromium and PyPI's `playwright`. Exits 1 and says why when something is not as it should be.
tests/live/test_ui.py does the same where there is a browser."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from playwright.sync_api import Locator, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from tests.live_service import live_service  # noqa: E402

BROWSER = Path("/usr/bin/chromium")
ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LIMIT_MS = 60_000  # a page that hangs fails; nothing waits for it
DATA_PLANE, CONTROL_PLANE = "Llama-Orch data plane", "Llama-Orch control plane"
SECOND_DOOR = "Llama-Orch for clients of OpenAI's API"


class Shown(NamedTuple):
    """What the page shows of an answer."""

    http_status: str
    body: dict[str, Any]


@contextmanager
def a_page(browser: Path = BROWSER) -> Iterator[Page]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=ARGS)
        page = chromium.new_page(viewport={"width": 1280, "height": 2200})
        page.set_default_timeout(LIMIT_MS)
        try:
            yield page
        finally:
            chromium.close()


def open_document(page: Page, url: str, title: str) -> list[str]:
    """Open the page at one of its documents; returns those that it offers."""
    page.goto(url)
    chooser = page.locator("select#select")
    chooser.wait_for()
    names = chooser.locator("option").all_inner_texts()
    chooser.select_option(label=title)
    page.locator("h2.title", has_text=title).wait_for()
    return names


def authorize(page: Page, token: str) -> None:
    page.locator(".scheme-container .authorize").click()
    dialog = page.locator(".dialog-ux")
    dialog.locator("input").fill(token)
    dialog.get_by_role("button", name="Authorize").click()
    dialog.get_by_role("button", name="Close").click()


def execute(page: Page, tag: str, operation_id: str) -> Shown:
    """Try an operation out, with the example that the page puts in for its body."""
    operation = page.locator(f"#operations-{tag}-{operation_id}")
    operation.locator(".opblock-summary-control").click()
    operation.get_by_role("button", name="Try it out").click()
    operation.get_by_role("button", name="Execute").click()
    return shown(operation)


def shown(operation: Locator) -> Shown:
    answer = operation.locator(".live-responses-table .response").last
    answer.locator(".response-col_status").wait_for()
    body = answer.locator(".highlight-code code").first.inner_text()
    return Shown(answer.locator(".response-col_status").inner_text().split()[0], json.loads(body))


def check(page: Page, url: str, token: str, screenshot: Path | None) -> list[str]:
    """What is wrong, in words. `url` is the service's."""
    said: list[str] = []
    page.on("console", lambda message: said.append(f"console {message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"script error: {error}"))
    page.on("requestfailed", lambda request: said.append(f"request failed: {request.url}"))
    wrong: list[str] = []
    names = open_document(page, f"{url}/ui/", DATA_PLANE)
    if names != [DATA_PLANE, CONTROL_PLANE, SECOND_DOOR]:
        wrong.append(f"the page offers {names}")
    authorize(page, token)
    created = execute(page, "tasks", "createTask")
    if created.http_status != "202" or "task_id" not in created.body:
        wrong.append(f"POST /v1/tasks shows {created}")
    if screenshot:
        page.evaluate("scrollTo(0, 0)")  # the whole page is some metres long
        page.screenshot(path=screenshot)
    open_document(page, f"{url}/ui/", CONTROL_PLANE)
    kept = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}])")
    if token in kept:  # whoever serves another page on this port later could read it
        wrong.append("the token stays in the browser")
    authorize(page, token)
    read = execute(page, "discovery", "getCapabilities")
    if read.http_status != "200" or not read.body.get("engines"):
        wrong.append(f"GET /v1/capabilities shows {read}")
    return wrong + said


def arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--browser", type=Path, default=BROWSER)
    parser.add_argument("--screenshot", type=Path)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    with live_service() as service, a_page(options.browser) as page:
        wrong = check(page, service.url, service.token, options.screenshot)
    print("\n".join(wrong) or "Swagger UI: authorized, a task submitted, token kept, console silent")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
