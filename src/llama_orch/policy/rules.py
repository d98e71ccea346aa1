"""The lists of `policy.outbound`: how an entry is written, and what the lists say about a request.

An entry is `[SCHEME://]HOST[:PORT]`. HOST is a name, `*.NAME` (every name below it, not itself), `*`, an address, or a
network such as 10.0.0.0/8 (IPv6 in brackets). An entry with a name is compared with the URL's host; one with an address
or a network with the addresses that the host stands for, every one of them, however they are spelled.

1. An entry of `deny` that fits decides, whatever `allow` says. Of a network's, one address within it is enough.
2. With `default: deny` an entry of `allow` must fit. Of a network's, all addresses must be within it.
3. An address that is not public is refused unless `allow_private_addresses` is set, or an entry of `allow` names it by
   address or network. Names do not lift this: whoever owns a name chooses its addresses. Unspecified, multicast and
   reserved addresses are refused always.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from ipaddress import ip_network
from typing import NamedTuple

from llama_orch.contract.config import OutboundSettings
from llama_orch.policy.addresses import LIFTABLE, Address, Network, kinds, spellings
from llama_orch.policy.urls import PORTS, BadUrl, Target, parse_host

_entry = re.compile(r"(?:([a-z]+)://)?(\[[^\[\]]*\]|[^\[\]:]*)(?::(\d{1,5}))?").fullmatch
HOW = "write [SCHEME://]HOST[:PORT], as in https://*.example.com, 10.0.0.0/8 or [fd00::/8]:8080"


class BadRule(Exception):
    """An entry of a list that cannot be read; the message says why and how one is written."""


class Rule(NamedTuple):
    """One entry. None is any; exactly one of `name`, `below` and `network` is set, or none for `*`."""

    scheme: str | None
    name: str | None
    below: str | None
    network: Network | None
    port: int | None

    def fits_name(self, target: Target) -> bool:
        """False where it takes addresses to say."""
        if self.network is not None or not self._fits_rest(target):
            return False
        if self.name is not None:
            return target.host == self.name
        return self.below is None or (target.address is None and target.host.endswith(self.below))

    def holds(self, target: Target, address: Address) -> bool:
        """Whether it names this address, itself or one within it."""
        network = self.network
        if network is None or not self._fits_rest(target):
            return False
        return any(one in network for one in spellings(address) if one.version == network.version)

    def may_hold(self, target: Target) -> bool:
        return self.network is not None and self._fits_rest(target)

    def _fits_rest(self, target: Target) -> bool:
        return self.scheme in (None, target.scheme) and self.port in (None, target.port)


def parse_rule(text: str) -> Rule:
    """Raises BadRule."""
    found = _entry(text.strip().lower())
    if found is None or not found[2]:
        raise BadRule(f"{text!r} is no entry; {HOW}")
    scheme, host, port = found[1], found[2], int(found[3]) if found[3] else None
    if scheme not in (None, *PORTS):
        raise BadRule(f"{text!r}: the scheme is http or https, or left out for both")
    if port is not None and not 1 <= port <= 65535:
        raise BadRule(f"{text!r}: the port is not within 1 to 65535")
    if host == "*":
        return Rule(scheme, None, None, None, port)
    try:
        if "/" in host:
            return Rule(scheme, None, None, ip_network(host.strip("[]")), port)
        name, address = parse_host(host.removeprefix("*."))
    except (BadUrl, ValueError) as error:
        raise BadRule(f"{text!r}: {error}; {HOW}") from error
    if host.startswith("*."):
        if address is not None:
            raise BadRule(f"{text!r}: addresses have no names below them; {HOW}")
        return Rule(scheme, None, f".{name}", None, port)
    if address is not None:
        return Rule(scheme, None, None, ip_network(address), port)
    return Rule(scheme, name, None, None, port)


def list_problems(settings: OutboundSettings) -> Iterator[str]:
    """What is wrong with the lists, for the check of the configuration."""
    for name, entries in (("allow", settings.allow), ("deny", settings.deny)):
        for index, entry in enumerate(entries):
            try:
                parse_rule(entry)
            except BadRule as error:
                yield f"policy.outbound.{name}[{index}]: {error}"


class Verdict(NamedTuple):
    """`rule` is a word from a small set, fit for a metric's label: `default`, `allow[0]`, `deny[2]`, `address` …;
    `reason` is a sentence."""

    is_allowed: bool
    rule: str
    reason: str


class Rules(NamedTuple):
    """The settings, read. `of` raises BadRule."""

    is_allowed_by_default: bool
    allow: tuple[Rule, ...]
    deny: tuple[Rule, ...]
    allow_private_addresses: bool

    @classmethod
    def of(cls, settings: OutboundSettings) -> Rules:
        return cls(
            settings.default == "allow",
            tuple(parse_rule(entry) for entry in settings.allow),
            tuple(parse_rule(entry) for entry in settings.deny),
            settings.allow_private_addresses,
        )

    def by_lists(self, target: Target, addresses: Sequence[Address] | None) -> Verdict:
        """What the lists say. Before the name was looked up (None) a denial is final, an allowance is not."""
        if (denial := self.by_deny(target, addresses)) is not None:
            return denial
        found = addresses or ()
        for index, rule in enumerate(self.allow):
            is_held = bool(found) and all(rule.holds(target, one) for one in found)
            if rule.fits_name(target) or is_held or (not found and rule.may_hold(target)):
                return Verdict(True, f"allow[{index}]", f"policy.outbound.allow[{index}] names {target.host}")
        if self.is_allowed_by_default:
            return Verdict(True, "default", "policy.outbound.default is allow, and no entry of deny fits")
        return Verdict(False, "default", "policy.outbound.default is deny, and no entry of allow fits")

    def by_deny(self, target: Target, addresses: Sequence[Address] | None) -> Verdict | None:
        """The denial of the first entry of `deny` that fits; None where none does, as far as is known."""
        for index, rule in enumerate(self.deny):
            if rule.fits_name(target) or any(rule.holds(target, one) for one in addresses or ()):
                return Verdict(False, f"deny[{index}]", f"policy.outbound.deny[{index}] names {target.host}")
        return None

    def by_addresses(
        self, target: Target, addresses: Sequence[Address], *, is_configured: bool = False
    ) -> Verdict | None:
        """A denial where one of the addresses may not be called; None where all may. `is_configured`: the configuration
        names this very server elsewhere than in the lists, which lifts what an entry of `allow` would."""
        for address in addresses:
            against = kinds(address)
            is_named = is_configured or any(rule.holds(target, address) for rule in self.allow)
            if against and not (against <= LIFTABLE and (self.allow_private_addresses or is_named)):
                words = ", ".join(sorted(against))
                host = "" if target.address is not None else f"{target.host} stands for "
                lifted = "; policy.outbound.allow can name it" if against <= LIFTABLE else ""
                return Verdict(False, "address", f"{host}{address}, which is no public address ({words}){lifted}")
        return None
