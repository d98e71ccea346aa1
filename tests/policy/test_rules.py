"""The lists: how entries are written, what they fit, and which of them decides."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_orch.contract.config import OutboundSettings
from llama_orch.policy.addresses import Address, kinds
from llama_orch.policy.rules import BadRule, Rules, Verdict, list_problems, parse_rule
from llama_orch.policy.urls import parse_target

pytestmark = pytest.mark.spec("HP-SEC-4")


def rules(**settings: Any) -> Rules:
    return Rules.of(OutboundSettings(**settings))


def judged(rules: Rules, url: str, *addresses: str) -> Verdict:
    """As the door does: the lists, then the addresses."""
    target = parse_target(url)
    found = [ip_address(one) for one in addresses] or list(target.known or ())
    verdict = rules.by_lists(target, found)
    return (rules.by_addresses(target, found) or verdict) if verdict.is_allowed else verdict


FITS = [
    ("example.com", "http://example.com/"),
    ("example.com", "https://EXAMPLE.com.:8443/"),
    ("Example.COM.", "https://example.com/"),
    ("https://example.com", "https://example.com/"),
    ("example.com:8080", "http://example.com:8080/"),
    ("example.com:443", "https://example.com/"),
    ("*.example.com", "http://a.example.com/"),
    ("*.example.com", "http://a.b.example.com/"),
    ("*", "http://anything.example/"),
    ("*", "http://8.8.8.8/"),
    ("https://*:443", "https://anything.example/"),
    ("bücher.example", "http://xn--bcher-kva.example/"),
    ("xn--bcher-kva.example", "http://bücher.example/"),
    ("8.8.8.8", "http://8.8.8.8/"),
    ("8.8.8.0/24", "http://8.8.8.8/"),
    ("[2606:4700::1]:80", "http://[2606:4700:0::1]/"),
    ("[2606:4700::/32]", "http://[2606:4700::1]/"),
    ("8.8.8.8", "http://[64:ff9b::808:808]/"),
]
MISSES = [
    ("example.com", "http://a.example.com/"),
    ("example.com", "http://example.com.evil.example/"),
    ("example.com", "http://evilexample.com/"),
    ("*.example.com", "http://example.com/"),
    ("*.example.com", "http://evilexample.com/"),
    ("https://example.com", "http://example.com/"),
    ("example.com:443", "http://example.com/"),
    ("8.8.8.8", "http://8.8.4.4/"),
    ("8.8.8.8:81", "http://8.8.8.8/"),
    ("[2606:4700::/32]", "http://8.8.8.8/"),
]


@pytest.mark.parametrize(("entry", "url"), FITS)
def test_an_entry_fits(entry: str, url: str) -> None:
    """In `allow` it lets through what is denied by default, in `deny` it stops what is allowed by default."""
    assert judged(rules(default="deny", allow=[entry]), url, *named(url)).rule == "allow[0]"
    assert judged(rules(deny=[entry]), url, *named(url)).rule == "deny[0]"


@pytest.mark.parametrize(("entry", "url"), MISSES)
def test_an_entry_misses(entry: str, url: str) -> None:
    """Then the default decides."""
    assert not judged(rules(default="deny", allow=[entry]), url, *named(url)).is_allowed
    assert judged(rules(deny=[entry]), url, *named(url)).is_allowed


def named(url: str) -> list[str]:
    """A public address for a name."""
    return [] if parse_target(url).address else ["9.9.9.9"]


BAD = [
    "",
    " ",
    "http://",
    "ftp://example.com",
    "example.com/path",
    "https://example.com/",
    "user@example.com",
    "ex*mple.com",
    "*example.com",
    "*.*.com",
    "*.10.0.0.1",
    "example.com:0",
    "example.com:99999",
    "example.com:http",
    "10.0.0.1/8",
    "10.0.0.0/33",
    "10.0.0",
    "0x7f.1",
    "fd00::/8",
    "[fd00::",
    "a b",
    "a,b",
]


@pytest.mark.parametrize("entry", BAD)
def test_an_entry_that_cannot_be_read_is_a_problem(entry: str) -> None:
    """Its place in the configuration is named, and how one is written."""
    with pytest.raises(BadRule):
        parse_rule(entry)
    (problem,) = list_problems(OutboundSettings(deny=["example.com", entry]))
    assert problem.startswith("policy.outbound.deny[1]: ")


def test_deny_decides_before_allow() -> None:
    """Whatever `allow` names."""
    both = rules(allow=["*"], deny=["*.example.com"])
    assert judged(both, "http://a.example.com/", "9.9.9.9") == Verdict(
        False, "deny[0]", "policy.outbound.deny[0] names a.example.com"
    )
    assert judged(both, "http://example.com/", "9.9.9.9").rule == "allow[0]"


def test_the_default_is_permissive_towards_public_addresses_only() -> None:
    """Public ones pass without a list; others do not, by name or by number."""
    assert judged(rules(), "https://example.com/", "9.9.9.9", "2606:4700::1") == Verdict(
        True, "default", "policy.outbound.default is allow, and no entry of deny fits"
    )
    for url, addresses in {
        "http://127.0.0.1:8080/": [],
        "http://[::1]/": [],
        "http://169.254.169.254/latest/meta-data": [],
        "http://intranet.example/": ["192.168.0.7"],
        "http://[::ffff:8.8.8.8]/": [],
        "http://[fd00::1]/": [],
    }.items():
        assert judged(rules(), url, *addresses).rule == "address", url


def test_one_private_address_among_public_ones_is_enough() -> None:
    """Which of them would be connected to is chance."""
    assert judged(rules(), "http://a.example/", "9.9.9.9", "10.0.0.1", "1.1.1.1").rule == "address"


def test_private_addresses_can_be_allowed_together() -> None:
    """But for those that no request has any business with."""
    open_ones = rules(allow_private_addresses=True)
    for url in ("http://127.0.0.1/", "http://[::1]/", "http://[::ffff:10.0.0.1]/", "http://169.254.1.1/"):
        assert judged(open_ones, url).is_allowed
    for url in ("http://0.0.0.0/", "http://[::]/", "http://224.0.0.1/", "http://[ff02::1]/", "http://255.255.255.255/"):
        assert judged(open_ones, url).rule == "address"


def test_private_addresses_can_be_allowed_one_by_one() -> None:
    """By address or network, with its port; never by name, since who owns a name chooses its addresses."""
    lan = rules(allow=["192.168.1.5:8000", "nas.example"])
    assert judged(lan, "http://192.168.1.5:8000/").is_allowed
    assert judged(lan, "http://other.example:8000/", "192.168.1.5").is_allowed
    assert judged(lan, "http://192.168.1.5/").rule == "address"
    assert judged(lan, "http://192.168.1.6:8000/").rule == "address"
    assert judged(lan, "http://nas.example/", "192.168.1.5").rule == "address"
    assert judged(lan, "http://a.example:8000/", "192.168.1.5", "192.168.1.6").rule == "address"


def test_a_denied_network_is_denied_by_any_name_and_spelling() -> None:
    """One address within it is enough, also inside an IPv6 address."""
    denying = rules(deny=["8.8.8.0/24"], allow_private_addresses=True)
    for addresses in (
        ["8.8.8.8"],
        ["9.9.9.9", "8.8.8.1"],
        ["::ffff:8.8.8.8"],
        ["64:ff9b::808:808"],
        ["2002:808:801::"],
    ):
        assert judged(denying, "http://a.example/", *addresses).rule == "deny[0]"


def test_an_allowed_network_must_hold_all_addresses() -> None:
    """With `default: deny` one of them outside is enough to refuse."""
    only = rules(default="deny", allow=["8.8.8.0/24"])
    assert judged(only, "http://a.example/", "8.8.8.8", "8.8.8.9").is_allowed
    assert judged(only, "http://a.example/", "8.8.8.8", "9.9.9.9") == Verdict(
        False, "default", "policy.outbound.default is deny, and no entry of allow fits"
    )


entries = st.lists(
    st.sampled_from(["*", "a.example", "*.example", "https://*", "10.0.0.0/8", "[fd00::/8]", "8.8.8.8:80", "*:8080"]),
    max_size=3,
)
settings = st.builds(
    OutboundSettings,
    default=st.sampled_from(["allow", "deny"]),
    allow=entries,
    deny=entries,
    allow_private_addresses=st.booleans(),
)
urls = st.builds(
    "{}://{}:{}/".format,
    st.sampled_from(["http", "https"]),
    st.sampled_from(["a.example", "b.a.example", "other.test"]),
    st.sampled_from([80, 443, 8080]),
)
places = st.one_of(
    st.ip_addresses(), st.sampled_from([ip_address(one) for one in ("10.1.1.1", "8.8.8.8", "fd00::1", "::ffff:a00:1")])
)


@given(settings, urls, st.lists(places, min_size=1, max_size=4))
def test_what_holds_for_every_policy(given: OutboundSettings, url: str, addresses: list[Address]) -> None:
    """A denial before the name was looked up stays one after it. The order of the addresses changes nothing about
    whether. What is not public is only reached where a setting names it. One more entry to deny never allows more."""
    policy, target = Rules.of(given), parse_target(url)
    verdict = policy.by_lists(target, addresses)
    if not policy.by_lists(target, None).is_allowed:
        assert not verdict.is_allowed
    assert policy.by_lists(target, addresses[::-1]).is_allowed == verdict.is_allowed
    against = policy.by_addresses(target, addresses)
    if against is None and not given.allow_private_addresses:
        named = [rule for rule in policy.allow if rule.network is not None]
        assert all(not kinds(one) or any(rule.holds(target, one) for rule in named) for one in addresses)
    stricter = policy._replace(deny=(*policy.deny, parse_rule("a.example")))
    assert verdict.is_allowed or not stricter.by_lists(target, addresses).is_allowed
