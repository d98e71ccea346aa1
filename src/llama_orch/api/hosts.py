"""The Host allow-list. A page that rebinds its own name to 127.0.0.1 gets past the browser, but not past its Host
(HP-SEC-8)."""

from __future__ import annotations

import ipaddress
import re

from llama_orch.contract.config import ServerSettings
from llama_orch.errors import Forbidden

_NAME = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]{1,253})(?::[0-9]{0,5})?").fullmatch


def host_name(host: str) -> str:
    """The lower-case name in a Host header's value, without its port; empty where the value is malformed."""
    match = _NAME(host.lower())
    return match[1] if match else ""


class AllowedHosts:
    def __init__(self, server: ServerSettings) -> None:
        bound = f"[{server.host}]" if ":" in server.host and not server.host.startswith("[") else server.host
        names = {host_name(name) for name in (bound, *server.allowed_hosts)}
        self._names = (names - {""}) | {"localhost", "127.0.0.1", "[::1]"}

    def check(self, host: str) -> None:
        """Ports do not matter: a tunnel may end on any."""
        name = host_name(host)
        if name in self._names or _is_loopback(name):
            return
        raise Forbidden(
            f"the Host header names `{name or '?'}`, which this service does not answer to; "
            "call it as localhost, or add the name to server.allowed_hosts in the configuration"
        )


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.IPv4Address(name).is_loopback
    except ipaddress.AddressValueError:
        return False
