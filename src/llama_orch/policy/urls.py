"""One reading of a URL. What is judged is what is requested: `Target.url` is put together from the judged parts, so
that no second parser can see another host in the same text.

Whatever is spelled in a way that parsers disagree about is refused, not repaired: user names, backslashes, blanks and
control characters, IPv4 addresses that are not four decimal numbers, zones, escapes in the host.
"""

from __future__ import annotations

import re
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import NamedTuple
from urllib.parse import quote, urljoin

import idna

from llama_orch.policy.addresses import Address

URL_MAX_CHARS = 8192
PORTS = {"http": 80, "https": 443}

_parts = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(.*)", re.DOTALL).fullmatch
_after_scheme = re.compile(r"//([^/?#]*)([^?#]*)(\?[^#]*)?(?:#.*)?").fullmatch
_authority = re.compile(r"(\[[^\[\]]*\]|[^\[\]:]*)(?::(\d{1,5})?)?").fullmatch
_is_odd = re.compile(r"[\x00-\x20\x7f-\xa0\\\u2028\u2029\ud800-\udfff]").search
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_is_name = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*").fullmatch
_is_number = re.compile(r"\d+|0x[0-9a-f]*").fullmatch
_SAFE = "/?:@!$&'()*+,;=~-._%"  # stays as it is in a path and a query; `%` may begin an escape


def without_query(reference: str) -> str:
    """A model reference as it may be told and logged: what follows a `?` of a URL is a signature or a token, often."""
    return reference.partition("?")[0] if reference.startswith("https:") else reference


class BadUrl(Exception):
    """The text is no URL that the service requests. `rule` is `invalid-url` or `scheme`; the message says why."""

    def __init__(self, rule: str, reason: str) -> None:
        super().__init__(reason)
        self.rule, self.reason = rule, reason


class Target(NamedTuple):
    """Where a request goes. `host` is in lower case and ASCII, without a trailing dot and, for IPv6, without brackets;
    `address` is what it stands for when it is no name. `rest` is path and query, in ASCII."""

    scheme: str
    host: str
    port: int
    address: Address | None
    rest: str

    @property
    def known(self) -> tuple[Address, ...] | None:
        """The addresses, where no name server has to be asked."""
        return None if self.address is None else (self.address,)

    @property
    def authority(self) -> str:
        """For the Host header: the port only where it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def origin(self) -> str:
        return f"{self.scheme}://{self.authority}"

    @property
    def url(self) -> str:
        return f"{self.origin}{self.rest}"

    @property
    def shown(self) -> str:
        """For logs and messages: without the query, where signatures and keys are."""
        path = self.rest.partition("?")[0]
        return f"{self.origin}{path if len(path) <= 200 else path[:200] + '…'}"


def parse_target(url: str) -> Target:
    """The one reading of `url`; raises BadUrl. A fragment is left out."""
    if len(url) > URL_MAX_CHARS:
        raise BadUrl("invalid-url", f"the URL has more than {URL_MAX_CHARS} characters")
    if _is_odd(url):
        raise BadUrl("invalid-url", "the URL has a blank, a backslash or a control character")
    parts = _parts(url)
    if parts is None:
        raise BadUrl("invalid-url", "the URL has no scheme; write https://…")
    scheme = parts[1].lower()
    if scheme not in PORTS:
        raise BadUrl("scheme", f"the scheme {scheme[:32]!r} is not served; only http and https are")
    found = _after_scheme(parts[2])
    if found is None:
        raise BadUrl("invalid-url", f"after {scheme}: a URL has // and a host")
    host, address, port = _parse_authority(found[1])
    rest = quote((found[2] or "/") + (found[3] or ""), safe=_SAFE)
    if len(rest) > URL_MAX_CHARS:
        raise BadUrl("invalid-url", f"the URL has more than {URL_MAX_CHARS} characters once it is escaped")
    return Target(scheme, host, PORTS[scheme] if port is None else port, address, rest)


def follow(target: Target, location: str) -> Target:
    """Where a redirect leads; raises BadUrl."""
    if _is_odd(location) or len(location) > URL_MAX_CHARS:
        raise BadUrl("invalid-url", "the redirect's Location has odd characters or is too long")
    try:
        return parse_target(urljoin(target.url, location))
    except ValueError:  # urljoin looks into brackets
        raise BadUrl("invalid-url", "the redirect's Location is no URL") from None


def _parse_authority(text: str) -> tuple[str, Address | None, int | None]:
    if "@" in text:
        raise BadUrl("invalid-url", "the URL has a user name or password before the host; send them otherwise")
    found = _authority(text)
    if found is None:
        raise BadUrl("invalid-url", "what follows // is not HOST or HOST:PORT")
    port = int(found[2]) if found[2] else None
    if port is not None and not 1 <= port <= 65535:
        raise BadUrl("invalid-url", "the port is not within 1 to 65535")
    host, address = parse_host(found[1])
    return host, address, port


def parse_host(text: str) -> tuple[str, Address | None]:
    """The host as names are compared, and its address where it is one; raises BadUrl."""
    if text.startswith("["):
        try:
            if "%" in text:
                raise BadUrl("invalid-url", "the IPv6 address has a zone")
            six = IPv6Address(text[1:-1])
        except AddressValueError:
            raise BadUrl("invalid-url", "what is in brackets is no IPv6 address") from None
        return str(six), six
    host = _to_ascii(text).removesuffix(".")
    if _is_number(host.rpartition(".")[2]):  # what browsers and inet_aton take for an IPv4 address
        try:
            four = IPv4Address(host)
        except AddressValueError:
            raise BadUrl("invalid-url", "an IPv4 address is four decimal numbers, as in 192.0.2.1") from None
        return str(four), four
    if not _is_name(host):
        raise BadUrl("invalid-url", "the host is no name")
    return host, None


def _to_ascii(text: str) -> str:
    """Names in other scripts as name servers have them; also wide digits and the dots of other scripts."""
    if text.isascii():
        return text.lower()
    try:
        return idna.encode(text, uts46=True).decode("ascii").lower()
    except (idna.IDNAError, UnicodeError):
        raise BadUrl("invalid-url", "the host is no name that can be written in ASCII (IDNA)") from None
