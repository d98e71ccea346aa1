"""One reading of a URL: odd spellings are refused, and what is judged is what is requested."""

from __future__ import annotations

from contextlib import suppress
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_orch.policy.urls import BadUrl, follow, parse_target

pytestmark = pytest.mark.spec("HP-SEC-4")

READ = {
    "http://example.com": "http://example.com/",
    "HTTPS://Example.COM:443/a?b#c": "https://example.com/a?b",
    "http://example.com:80/": "http://example.com/",
    "http://example.com:8080/": "http://example.com:8080/",
    "http://example.com./": "http://example.com/",
    "http://example.com:/": "http://example.com/",
    "http://bücher.example/ä?ö=ü": "http://xn--bcher-kva.example/%C3%A4?%C3%B6=%C3%BC",
    "http://xn--bcher-kva.example/": "http://xn--bcher-kva.example/",
    "http://１２７.0.0.1/": "http://127.0.0.1/",
    "http://127。0。0。1/": "http://127.0.0.1/",
    "http://ⓔxample.com/": "http://example.com/",
    "http://[::1]:8/": "http://[::1]:8/",
    "http://[0:0:0:0:0:0:0:1]/": "http://[::1]/",
    "http://a_b.example/": "http://a_b.example/",
    "http://example.com?x": "http://example.com/?x",
    "http://example.com/%41%zz[": "http://example.com/%41%zz%5B",
    "http://127.0.0.1.example/": "http://127.0.0.1.example/",
    "http://127.0.0.1#@example.com/": "http://127.0.0.1/",
    "http://127.0.0.1?@example.com/": "http://127.0.0.1/?@example.com/",
}
REFUSED = [
    "",
    "example.com",
    "//example.com/",
    "http:example.com",
    "http:/example.com",
    "http:///path",
    "http://",
    "http://:80/",
    "http://user@example.com/",
    "http://user:password@example.com/",
    "http://example.com@127.0.0.1/",
    "http://example.com\\@127.0.0.1/",
    "http:\\\\example.com/",
    "http://exa mple.com/",
    " http://example.com/",
    "http://example.com/a b",
    "http://example.com/\r\nHost: evil.example",
    "http://exam\tple.com/",
    "http://example.com\x00.evil.example/",
    "http://example.com\u2028/",
    "http://example.com:0/",
    "http://example.com:65536/",
    "http://example.com:8o/",
    "http://example.com:80:80/",
    "http://example.com:+80/",
    "http://0x7f.0.0.1/",
    "http://0x7f000001/",
    "http://2130706433/",
    "http://0177.0.0.1/",
    "http://127.1/",
    "http://127.0.1/",
    "http://127.0.0.01/",
    "http://127.0.0.256/",
    "http://1.2.3.4.5/",
    "http://example.0x1/",
    "http://0/",
    "http://127.0.0.1../",
    "http://example..com/",
    "http://.example.com/",
    "http://%31%32%37.0.0.1/",
    "http://example%2ecom/",
    "http://[::1/",
    "http://::1/",
    "http://[fe80::1%25eth0]/",
    "http://[fe80::1%eth0]/",
    "http://[v1.a]/",
    "http://[127.0.0.1]/",
    "http://[::ffff:127.0.0.1]evil/",
    "http://-example.com/",
    "http://example-.com/",
    "http://" + "a" * 64 + ".com/",
    "http://" + "a." * 130 + "com/",
    "http://example.com/" + "x" * 9000,
    "http://example.com/" + "ä" * 2000,
    "http://ex\u200bam\ud800ple.com/",
    "http://a\u0338\u2260.example\u00ad\uffff/",
]


@pytest.mark.parametrize(("text", "url"), READ.items())
def test_a_url_is_read(text: str, url: str) -> None:
    """In lower case, ASCII, with the port only where it is not the scheme's own."""
    assert parse_target(text).url == url


@pytest.mark.parametrize("text", REFUSED)
def test_a_url_that_parsers_disagree_about_is_refused(text: str) -> None:
    """The reason says what to write, and does not repeat the text."""
    with pytest.raises(BadUrl) as caught:
        parse_target(text)
    assert caught.value.rule == "invalid-url"
    assert caught.value.reason


@pytest.mark.parametrize("scheme", ["ftp", "file", "gopher", "javascript", "data", "unix", "ws", "httpss"])
def test_other_schemes_are_refused(scheme: str) -> None:
    """Only http and https are served."""
    with pytest.raises(BadUrl) as caught:
        parse_target(f"{scheme}://example.com/")
    assert caught.value.rule == "scheme"


def test_an_address_is_known_as_one() -> None:
    """Whatever its spelling, so that it is judged without a name server."""
    assert str(parse_target("http://127。0。0。1/").address) == "127.0.0.1"
    assert str(parse_target("http://[::FFFF:7f00:1]/").address) in ("::ffff:7f00:1", "::ffff:127.0.0.1")
    assert parse_target("http://example.com/").address is None


hosts = st.text("abz019.-_:@[]%#?/\\ xäＡ。", max_size=20)
texts = st.one_of(
    st.text(max_size=60),
    st.builds("{}://{}{}".format, st.sampled_from(["http", "https", "HtTp", "ftp", ""]), hosts, st.text(max_size=20)),
)


@given(texts)
def test_what_is_read_is_read_alike_by_others(text: str) -> None:
    """Any text is read or refused; what is read comes to the same when read again, by us, by the standard library and
    by the library that sends it."""
    with suppress(BadUrl):
        target = parse_target(text)
        assert target.url.isascii()
        assert parse_target(target.url) == target
        split = urlsplit(target.url)
        assert (split.scheme, split.hostname, split.username) == (target.scheme, target.host, None)
        sent = httpx.URL(target.url)
        assert (sent.scheme, sent.raw_host.decode(), sent.port or target.port) == (
            target.scheme,
            target.host,
            target.port,
        )
        assert not sent.userinfo


@pytest.mark.parametrize(
    ("location", "url"),
    [
        ("/b", "https://example.com/b"),
        ("b", "https://example.com/a/b"),
        ("?q", "https://example.com/a/c?q"),
        ("//evil.example/b", "https://evil.example/b"),
        ("http://evil.example/", "http://evil.example/"),
        ("", "https://example.com/a/c"),
    ],
)
def test_a_redirect_is_followed_from_where_it_came(location: str, url: str) -> None:
    """Relative ones too."""
    assert follow(parse_target("https://example.com/a/c"), location).url == url


@pytest.mark.parametrize(
    "location", ["https://u@evil.example/", "/a\\b", "file:///etc/passwd", "http://[/", "/\r\nX: y"]
)
def test_a_redirect_to_an_odd_place_is_refused(location: str) -> None:
    """As the same URL would be."""
    with pytest.raises(BadUrl):
        follow(parse_target("https://example.com/a/c"), location)


def test_a_query_is_not_shown() -> None:
    """What goes into logs has no query, where keys and signatures are, and is not long."""
    shown = parse_target("https://example.com/" + "p" * 500 + "?X-Signature=secret").shown
    assert "secret" not in shown
    assert len(shown) < 250
