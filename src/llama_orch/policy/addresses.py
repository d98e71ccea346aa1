"""What kind of place an IP address is.

Own tables and not `ipaddress.is_global`: that changes its mind between Python versions and looks into few of the IPv6
addresses that carry an IPv4 one, through which 127.0.0.1 can be spelled in seven ways. Sources: IANA's special-purpose
registries of both families, RFC 4291, 6052, 7915 (translated), 3056 (6to4), 4380 (Teredo), 5214 (ISATAP).
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


class Kind(StrEnum):
    """Why an address is not simply public. `allow_private_addresses` lifts those of LIFTABLE and no other."""

    LOOPBACK = "loopback"
    PRIVATE = "private"
    LINK_LOCAL = "link-local"
    SHARED = "shared"  # behind a provider's NAT
    MAPPED = "mapped"  # an IPv4 address in an IPv6 spelling that no name server gives
    UNSPECIFIED = "unspecified"
    MULTICAST = "multicast"
    RESERVED = "reserved"


LIFTABLE = frozenset({Kind.LOOPBACK, Kind.PRIVATE, Kind.LINK_LOCAL, Kind.SHARED, Kind.MAPPED})

_V4 = [
    (IPv4Network(network), kind)
    for network, kind in (
        ("0.0.0.0/8", Kind.UNSPECIFIED),  # Linux connects 0.0.0.0 to loopback
        ("10.0.0.0/8", Kind.PRIVATE),
        ("100.64.0.0/10", Kind.SHARED),
        ("127.0.0.0/8", Kind.LOOPBACK),
        ("169.254.0.0/16", Kind.LINK_LOCAL),  # where clouds serve credentials
        ("172.16.0.0/12", Kind.PRIVATE),
        ("192.0.0.0/24", Kind.RESERVED),
        ("192.0.2.0/24", Kind.RESERVED),
        ("192.88.99.0/24", Kind.RESERVED),
        ("192.168.0.0/16", Kind.PRIVATE),
        ("198.18.0.0/15", Kind.PRIVATE),  # benchmarks; local proxies hand these out as stand-ins
        ("198.51.100.0/24", Kind.RESERVED),
        ("203.0.113.0/24", Kind.RESERVED),
        ("224.0.0.0/4", Kind.MULTICAST),
        ("240.0.0.0/4", Kind.RESERVED),  # broadcast is the last of them
    )
]
_V6 = [
    (IPv6Network(network), kind)
    for network, kind in (
        ("::/128", Kind.UNSPECIFIED),
        ("::1/128", Kind.LOOPBACK),
        ("64:ff9b:1::/48", Kind.PRIVATE),  # translation of a network's own
        ("2001:db8::/32", Kind.RESERVED),
        ("3fff::/20", Kind.RESERVED),
        ("fc00::/7", Kind.PRIVATE),
        ("fe80::/10", Kind.LINK_LOCAL),
        ("fec0::/10", Kind.PRIVATE),
        ("ff00::/8", Kind.MULTICAST),
    )
]
_GLOBAL_V6 = IPv6Network("2000::/3")  # nothing else is assigned to public hosts
_IETF_V6 = IPv6Network("2001::/23")  # protocols, not hosts; Teredo is within
_TEREDO = IPv6Network("2001::/32")
_6TO4 = IPv6Network("2002::/16")
_NAT64 = IPv6Network("64:ff9b::/96")  # what an IPv6-only network's name server gives for public IPv4 hosts
_MAPPED = [IPv6Network(network) for network in ("::ffff:0:0/96", "::ffff:0:0:0/96", "::/96")]
_ISATAP = (0x00005EFE, 0x02005EFE)  # the third quarter of the address
_LOW_32 = 0xFFFFFFFF


def kinds(address: Address) -> frozenset[Kind]:
    """What speaks against the address, and against every IPv4 address within it; empty for a public one."""
    if isinstance(address, IPv4Address):
        return frozenset(kind for network, kind in _V4 if address in network)
    found = {kind for network, kind in _V6 if address in network}
    is_mapped = not found and any(address in network for network in _MAPPED)
    if is_mapped:
        found.add(Kind.MAPPED)
    inner = list(embedded(address))
    for one in inner:
        found |= kinds(one)
    is_assigned = address in _GLOBAL_V6 and (address not in _IETF_V6 or address in _TEREDO)
    if not found and not is_assigned and address not in _NAT64:
        found.add(Kind.RESERVED)
    return frozenset(found)


def embedded(address: Address) -> Iterator[IPv4Address]:
    """The IPv4 addresses that packets to this one may end up at. ::1 and :: are their own."""
    number = int(address)
    if isinstance(address, IPv4Address) or number <= 1:
        return
    if address in _NAT64 or any(address in network for network in _MAPPED):
        yield IPv4Address(number & _LOW_32)
    if address in _6TO4:
        yield IPv4Address(number >> 80 & _LOW_32)
    if address in _TEREDO:  # the server's, and the client's, which is inverted
        yield IPv4Address(number >> 64 & _LOW_32)
        yield IPv4Address(~number & _LOW_32)
    if number >> 32 & _LOW_32 in _ISATAP:
        yield IPv4Address(number & _LOW_32)


def spellings(address: Address) -> list[Address]:
    """The address and those within it, for comparison with a network."""
    return [address, *embedded(address)]
