"""Names to addresses, once per request: what is checked here is what is connected to, so that a name server which
changes its answer gains nothing (DNS rebinding)."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from ipaddress import ip_address

from llama_orch.policy.addresses import Address

RESOLVE_LIMIT_S = 10.0
ADDRESSES_MAX = 64

# A host name to its addresses, in the order to try them; empty where there are none. Raises ResolveError.
Resolve = Callable[[str], Awaitable[list[Address]]]


class ResolveError(Exception):
    """No name server could say."""


async def system_resolve(host: str) -> list[Address]:
    """As this machine resolves names, /etc/hosts included."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(RESOLVE_LIMIT_S):
            found = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except TimeoutError:
        raise ResolveError(f"no name server answered within {RESOLVE_LIMIT_S:g} s") from None
    except socket.gaierror as error:
        if error.errno in (socket.EAI_NONAME, socket.EAI_NODATA):
            return []
        raise ResolveError(f"the name could not be looked up: {error.strerror}") from error
    except (OSError, UnicodeError) as error:
        raise ResolveError("the name could not be looked up") from error
    texts = dict.fromkeys(str(sockaddr[0]).partition("%")[0] for *_, sockaddr in found)
    return [ip_address(text) for text in list(texts)[:ADDRESSES_MAX]]
