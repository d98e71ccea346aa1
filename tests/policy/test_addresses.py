"""Every spelling of a place that is not public is known as one, and public places are not."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_orch.policy.addresses import LIFTABLE, Kind, embedded, kinds

pytestmark = pytest.mark.spec("HP-SEC-4")

NOT_PUBLIC = {
    "0.0.0.0": Kind.UNSPECIFIED,
    "0.1.2.3": Kind.UNSPECIFIED,
    "10.0.0.1": Kind.PRIVATE,
    "10.255.255.255": Kind.PRIVATE,
    "100.64.0.1": Kind.SHARED,
    "100.127.255.255": Kind.SHARED,
    "127.0.0.1": Kind.LOOPBACK,
    "127.255.255.254": Kind.LOOPBACK,
    "169.254.169.254": Kind.LINK_LOCAL,
    "172.16.0.1": Kind.PRIVATE,
    "172.31.255.255": Kind.PRIVATE,
    "192.0.0.170": Kind.RESERVED,
    "192.0.2.1": Kind.RESERVED,
    "192.88.99.1": Kind.RESERVED,
    "192.168.1.1": Kind.PRIVATE,
    "198.18.0.1": Kind.PRIVATE,
    "198.51.100.7": Kind.RESERVED,
    "203.0.113.7": Kind.RESERVED,
    "224.0.0.251": Kind.MULTICAST,
    "240.0.0.1": Kind.RESERVED,
    "255.255.255.255": Kind.RESERVED,
    "::": Kind.UNSPECIFIED,
    "::1": Kind.LOOPBACK,
    "::2": Kind.MAPPED,
    "64:ff9b:1::1": Kind.PRIVATE,
    "100::1": Kind.RESERVED,
    "2001:db8::1": Kind.RESERVED,
    "2001:20::1": Kind.RESERVED,
    "3fff::1": Kind.RESERVED,
    "4000::1": Kind.RESERVED,
    "5f00::1": Kind.RESERVED,
    "fc00::1": Kind.PRIVATE,
    "fd12:3456::1": Kind.PRIVATE,
    "fe80::1": Kind.LINK_LOCAL,
    "fec0::1": Kind.PRIVATE,
    "ff02::1": Kind.MULTICAST,
    # IPv4 within: mapped, compatible, translated, NAT64, 6to4, Teredo (inverted, and as its server), ISATAP
    "::ffff:127.0.0.1": Kind.LOOPBACK,
    "::ffff:8.8.8.8": Kind.MAPPED,
    "::127.0.0.1": Kind.LOOPBACK,
    "::8.8.8.8": Kind.MAPPED,
    "::ffff:0:10.0.0.1": Kind.PRIVATE,
    "64:ff9b::7f00:1": Kind.LOOPBACK,
    "64:ff9b::a9fe:a9fe": Kind.LINK_LOCAL,
    "2002:7f00:1::": Kind.LOOPBACK,
    "2002:c0a8:101::1": Kind.PRIVATE,
    "2001:0:808:808:0:0:80ff:fffe": Kind.LOOPBACK,
    "2001:0:7f00:1:0:0:f7f7:f7f7": Kind.LOOPBACK,
    "2a00:1450::5efe:7f00:1": Kind.LOOPBACK,
    "2a00:1450::200:5efe:a00:1": Kind.PRIVATE,
}
PUBLIC = [
    "1.1.1.1",
    "8.8.8.8",
    "9.255.255.255",
    "11.0.0.0",
    "100.63.255.255",
    "100.128.0.0",
    "126.255.255.255",
    "128.0.0.1",
    "172.15.255.255",
    "172.32.0.0",
    "192.167.255.255",
    "192.169.0.0",
    "223.255.255.255",
    "2606:4700:4700::1111",
    "2a00:1450:4001::200e",
    "2001:4860:4860::8888",
    "64:ff9b::808:808",
    "2002:808:808::1",
    "2001:0:808:808:0:0:f7f7:f7f7",
]


@pytest.mark.parametrize(("text", "kind"), NOT_PUBLIC.items())
def test_a_place_that_is_not_public(text: str, kind: Kind) -> None:
    """The kind is found, through whatever the address is wrapped in."""
    assert kind in kinds(ip_address(text))


@pytest.mark.parametrize("text", PUBLIC)
def test_a_public_place(text: str) -> None:
    """Nothing speaks against it, up to the edges of the networks that are not public."""
    assert kinds(ip_address(text)) == frozenset()


@pytest.mark.parametrize("text", ["0.0.0.0", "::", "224.0.0.1", "ff02::1", "240.0.0.1", "::ffff:0.0.0.0", "2002::"])
def test_what_no_setting_lifts(text: str) -> None:
    """Unspecified, multicast and reserved addresses, also inside another one."""
    assert not kinds(ip_address(text)) <= LIFTABLE


@given(st.ip_addresses(v=4))
def test_wrapping_hides_nothing(inner: IPv4Address) -> None:
    """Whatever speaks against an IPv4 address speaks against each IPv6 address that leads to it."""
    number = int(inner)
    wrapped = [
        number,
        0xFFFF << 32 | number,
        0xFFFF << 48 | number,
        0x64FF9B << 96 | number,
        0x2002 << 112 | number << 80,
        0x20010000 << 96 | number << 64,
        0x20010000 << 96 | 0x08080808 << 64 | (~number & 0xFFFFFFFF),
        0x2A001450 << 96 | 0x5EFE << 32 | number,
    ]
    for outer in map(IPv6Address, wrapped):
        if int(outer) > 1:  # :: and ::1 are their own
            assert inner in embedded(outer)
            assert kinds(outer) >= kinds(inner)


@given(st.ip_addresses())
def test_nothing_is_public_that_the_standard_library_calls_private(address: IPv4Address | IPv6Address) -> None:
    """An independent table, which knows less, agrees where it refuses."""
    if address.is_private or address.is_multicast or address.is_link_local or address.is_unspecified:
        assert kinds(address) or address in (IPv4Address("192.0.0.9"), IPv4Address("192.0.0.10"))
