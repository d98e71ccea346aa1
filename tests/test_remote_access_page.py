"""docs/remote-access.md: what it has its readers configure works, and weakens no default."""

from __future__ import annotations

import re

import msgspec
import pytest

from llama_orch.api.sse import HEARTBEAT_S
from llama_orch.contract.config import ServerSettings, Settings
from llama_orch.settings import SettingsError, check_bind, parse_settings
from tests.api.harness import TOKEN, serving
from tests.api.test_bad_input import assert_envelope
from tests.examples.pages import ROOT, blocks

pytestmark = pytest.mark.spec("HP-SEC-6")

PAGE = ROOT / "docs" / "remote-access.md"
TEXT = PAGE.read_text(encoding="utf-8")
CONFIGURED = [parse_settings(block.text, block.name) for block in blocks(PAGE) if block.language == "yaml"]
BOUND, PROXIED = CONFIGURED
(NGINX,) = [block.text for block in blocks(PAGE) if block.language == "nginx"]


@pytest.mark.parametrize("settings", CONFIGURED, ids=["explicit bind", "reverse proxy"])
def test_nothing_else_is_configured(settings: Settings) -> None:
    """Each way sets the address or the names, and leaves every other default as it is."""
    defaults = msgspec.structs.asdict(ServerSettings())
    changed = {key for key, value in msgspec.structs.asdict(settings.server).items() if value != defaults[key]}
    assert changed <= {"host", "allowed_hosts"}
    assert msgspec.structs.replace(settings, server=ServerSettings()) == Settings()


def test_the_explicit_bind_needs_a_strong_token() -> None:
    """It names one address, not all of them, and a weak token refuses the start."""
    assert BOUND.server.host not in ("0.0.0.0", "::", "127.0.0.1")
    with pytest.raises(SettingsError, match="can be reached from other machines"):
        check_bind(BOUND.server.host, "short-token-12345", token_is_generated=False)
    check_bind(BOUND.server.host, "x", token_is_generated=True)
    assert "can be reached from other machines" in TEXT


def test_the_proxy_keeps_the_service_on_loopback() -> None:
    """Only the proxy is reached from elsewhere, and it leads to the default address."""
    assert PROXIED.server.host == "127.0.0.1"
    assert TEXT.count("127.0.0.1:8080;") + TEXT.count("reverse_proxy 127.0.0.1:8080") == 2


@pytest.mark.parametrize("settings", CONFIGURED, ids=["explicit bind", "reverse proxy"])
def test_the_token_and_the_host_are_still_asked_for(settings: Settings) -> None:
    """By the name that the page gives: 401 without the token, 200 with it; by any other name 403, token or not. No
    answer lets a page of another site read it."""
    (name,) = settings.server.allowed_hosts
    loopback = msgspec.structs.replace(settings.server, host="127.0.0.1")
    with serving(msgspec.structs.replace(settings, server=loopback)) as server:
        host = ("Host", name.encode())
        assert server.call("GET", "/v1/pools", [host, ("Authorization", b"")]).http_status == 401
        answer = server.call("GET", "/v1/pools", [host, ("Origin", b"https://evil.example")])
        assert answer.http_status == 200
        assert not any(header.lower().startswith("access-control") for header in answer.headers)
        for stranger in (f"evil.{name}", f"{name}.evil.example", "evil.example"):
            refused = server.call("GET", "/v1/pools", [("Host", stranger.encode())])
            assert refused.http_status == 403
            assert "server.allowed_hosts" in assert_envelope(refused, "FORBIDDEN").message
        forwarded = [("Host", b"evil.example"), ("X-Forwarded-Host", name.encode()), ("X-Forwarded-For", b"127.0.0.1")]
        assert server.call("GET", "/v1/pools", forwarded).http_status == 403


def test_a_tunnel_may_end_on_any_port() -> None:
    """The service looks at the name and not at the port; the token is asked for here as well."""
    with serving(Settings(), token=TOKEN) as server:
        for host in (b"127.0.0.1:9999", b"localhost:1", b"127.0.0.1"):
            assert server.call("GET", "/v1/pools", [("Host", host)]).http_status == 200
            assert server.call("GET", "/v1/pools", [("Host", host), ("Authorization", b"")]).http_status == 401
    assert re.search(r"ssh -N -L 127\.0\.0\.1:8080:127\.0\.0\.1:8080 ", TEXT)


def test_the_proxys_settings_fit_the_service() -> None:
    """Streams are not buffered, a silent one is not cut off, bodies may be as large as the service takes them."""
    assert "proxy_buffering off;" in NGINX
    assert "proxy_set_header Host $host;" in NGINX
    (timeout_s,) = re.findall(r"proxy_read_timeout (\d+)s;", NGINX)
    assert int(timeout_s) >= 4 * HEARTBEAT_S
    assert f"a comment comes every {HEARTBEAT_S:g} s" in NGINX
    assert f"client_max_body_size {Settings().server.max_body_bytes >> 20}m;" in NGINX
    assert "Authorization" not in NGINX
