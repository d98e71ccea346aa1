"""Where the service is and how to talk to it: LLORCH_URL, LLORCH_HOME and LLORCH_API_TOKEN."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import typer

from llama_orch.cli.output import FAILED, UsageError, exit_code, note, print_error

if TYPE_CHECKING:
    from llama_orch.client import Client

DEFAULT_URL = "http://127.0.0.1:8080"
ATTEMPTS_MAX = 5  # of one call: a person waits


def server_url(env: Mapping[str, str]) -> str:
    """LLORCH_URL, or the address where `serve` listens by default."""
    url = env.get("LLORCH_URL", "").strip() or DEFAULT_URL
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        is_url = False
    if not is_url or parts.username is not None or parts.query or parts.fragment:
        raise UsageError(f"LLORCH_URL is not the address of a server, such as {DEFAULT_URL}")
    return url.rstrip("/")


def is_loopback_url(url: str) -> bool:
    from llama_orch.settings import is_loopback

    return is_loopback(urlsplit(url).hostname or "")


def client_token(url: str, env: Mapping[str, str], *, create: bool = False) -> str:
    """The token to send. The home folder's is this machine's and never leaves it."""
    from llama_orch.settings import Home, api_token

    if not is_loopback_url(url) and not env.get("LLORCH_API_TOKEN"):
        raise UsageError(f"set LLORCH_API_TOKEN to the token of {url}: the token file is for this machine's server")
    return api_token(Home.of(env), env, create)[0]


@contextmanager
def answers_reported() -> Iterator[None]:
    """Turn a server's refusal, or its silence, into a message and an exit code."""
    from llama_orch.client import ApiError, UnreachableError

    try:
        yield
    except ApiError as error:
        print_error(error.error)
        raise typer.Exit(exit_code(error.error, error.status)) from error
    except UnreachableError as error:
        note(f"error: {error}")
        if error.is_refused:
            note("start a server with `llama-orch serve`, or set LLORCH_URL to the one that you mean")
        raise typer.Exit(FAILED) from error


@contextmanager
def connected(env: Mapping[str, str], *, attempts_max: int | None = None) -> Iterator[Client]:
    """A client of the server that is there; its failures are reported. `attempts_max`: of one call; None: the usual
    number. A server that was never there is not waited for: whoever sits at the terminal may have to start it."""
    from llama_orch.client import Client

    url = server_url(env)
    token = client_token(url, env)
    attempts = ATTEMPTS_MAX if attempts_max is None else attempts_max
    with answers_reported(), Client(url, token, attempts_max=attempts, waits_for_start=False) as client:
        yield client
