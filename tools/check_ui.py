"""Drives Swagger UI in a real browser: authorize, execute one operation, look for errors in the console.

    python tools/check_ui.py [--browser /usr/bin/chromium] [--screenshot FILE]

Needs a Chromium and PyPI's `playwright`. Exits 1 and says why when something is not as it should be."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from tests.api.harness import serving  # noqa: E402

ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TOKEN = "a-token-for-the-browser"  # ASCII: a browser sends other letters as Latin-1
CONTROL_PLANE = "Llama-Orch control plane"


def authorize(page: Page, token: str) -> None:
    page.locator(".scheme-container .authorize").click()
    dialog = page.locator(".dialog-ux")
    dialog.locator("input").fill(token)
    dialog.get_by_role("button", name="Authorize").click()
    dialog.get_by_role("button", name="Close").click()


def execute_capabilities(page: Page) -> str:
    """The status code that the page shows for GET /v1/capabilities."""
    operation = page.locator("#operations-discovery-getCapabilities")
    operation.locator(".opblock-summary").click()
    operation.get_by_role("button", name="Try it out").click()
    operation.get_by_role("button", name="Execute").click()
    shown = operation.locator(".live-responses-table .response-col_status").last
    shown.wait_for()
    return shown.inner_text().split()[0]


def open_document(page: Page, url: str) -> list[str]:
    """Open the page at its control plane; returns the documents that it offers."""
    page.goto(url)
    chooser = page.locator("select#select")
    chooser.wait_for()
    names = chooser.locator("option").all_inner_texts()
    chooser.select_option(label=CONTROL_PLANE)
    page.locator("h2.title", has_text=CONTROL_PLANE).wait_for()
    return names


def check(page: Page, url: str, screenshot: Path | None) -> list[str]:
    """What is wrong, in words."""
    said: list[str] = []
    page.on("console", lambda message: said.append(f"console {message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"script error: {error}"))
    page.on("requestfailed", lambda request: said.append(f"request failed: {request.url}"))
    wrong: list[str] = []
    names = open_document(page, url)
    if len(names) != 2:
        wrong.append(f"the page offers {names}")
    authorize(page, TOKEN)
    if (http_status := execute_capabilities(page)) != "200":
        wrong.append(f"GET /v1/capabilities shows {http_status}")
    if screenshot:
        page.screenshot(path=screenshot, full_page=True)
    open_document(page, url)  # the token must survive a reload
    if (http_status := execute_capabilities(page)) != "200":
        wrong.append(f"after a reload GET /v1/capabilities shows {http_status}")
    return wrong + said


def arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--browser", type=Path, default=Path("/usr/bin/chromium"))
    parser.add_argument("--screenshot", type=Path)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    with serving(token=TOKEN) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.browser, args=ARGS)
        page = browser.new_page()
        page.set_default_timeout(60_000)
        wrong = check(page, f"http://127.0.0.1:{server.port}/ui/", options.screenshot)
        browser.close()
    print("\n".join(wrong) or "Swagger UI: authorized, executed, token kept, console silent")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
