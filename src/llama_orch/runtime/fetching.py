"""The tool fetch: one text from elsewhere, through the door, within bounds.

What the other side sends is bounded twice: as it comes, and unpacked. Although no content encoding is asked for, gzip
and deflate are read, because some servers send nothing else.
"""

from __future__ import annotations

import asyncio
import codecs
import re
import zlib

from llama_orch.contract.models import FetchRequest, FetchResult, PolicyDecision
from llama_orch.errors import ReplicaExhausted, UpstreamFailed
from llama_orch.outbound.decision import Decision
from llama_orch.outbound.door import Limits, Outbound, Reply

AT_ONCE_MAX = 16  # fetches and checks
RETRY_AFTER_MS = 1000
REDIRECTS_MAX = 5

_is_text_type = re.compile(
    r"text/.+|application/(?:(?:.+\+)?(?:json|xml|yaml)|(?:x-)?(?:ndjson|javascript|ecmascript|yaml|sh|sql|toml))"
).fullmatch
_charset = re.compile(r"""charset\s*=\s*["']?([A-Za-z0-9_.:-]{1,40})""").search
# Of Python's codecs those that are a script's encoding: others, such as `zip` or `unicode_escape`, do more than read.
_is_script_encoding = re.compile(
    r"ascii|utf-(?:8|16|32)(?:-[lb]e|-sig)?|iso8859-\d+|cp\d+|koi8-[ru]|gb2312|gbk|gb18030|hz|big5(?:hkscs)?"
    r"|euc_\w+|euc-\w+|shift_jis\w*|iso2022_\w+|iso-2022-\w+|mac-[a-z]+|tis-620|johab|ptcp154"
).fullmatch
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))


class Fetching:
    """Checks and fetches for callers of the API, a few at once."""

    def __init__(self, outbound: Outbound) -> None:
        self._outbound = outbound
        self._places = AT_ONCE_MAX

    async def check(self, url: str) -> PolicyDecision:
        """What the policy decides about a request now. Asks a name server, and nobody else."""
        with self._place():
            return _view(await self._outbound.check(url))

    async def fetch(self, request: FetchRequest) -> FetchResult:
        """Raises PolicyDenied, UpstreamFailed, and ReplicaExhausted when too many are at it."""
        limits = Limits(request.max_bytes, request.timeout_ms / 1000, redirects_max=REDIRECTS_MAX)
        with self._place():
            async with self._outbound.fetch(request.url, purpose="tool", limits=limits) as reply:
                body = await _body(reply, request.max_bytes)
                text = await asyncio.to_thread(_text, reply, body)
                return FetchResult(
                    status=reply.http_status,
                    headers={name: value for name, value in reply.headers.items() if name != "set-cookie"},
                    text=text,
                    url=reply.target.url,
                    audit_id=reply.audit_id,
                )

    def _place(self) -> _Place:
        if self._places <= 0:
            raise ReplicaExhausted(
                f"{AT_ONCE_MAX} fetches are under way, which is the most at once; repeat this one",
                retry_after_ms=RETRY_AFTER_MS,
                policy_label="fetches",
            )
        return _Place(self)


class _Place:
    """One of the places, for as long as its block runs."""

    def __init__(self, fetching: Fetching) -> None:
        self._fetching = fetching

    def __enter__(self) -> None:
        self._fetching._places -= 1

    def __exit__(self, *_: object) -> None:
        self._fetching._places += 1


def _view(decision: Decision) -> PolicyDecision:
    return PolicyDecision(
        allowed=decision.is_allowed,
        rule=decision.rule,
        reason=decision.reason,
        url=None if decision.target is None else decision.target.url,
        addresses=[str(address) for address in decision.addresses],
        audit_id=decision.audit_id,
    )


async def _body(reply: Reply, bytes_max: int) -> bytes:
    """The body, unpacked."""
    encoding = reply.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise UpstreamFailed(f"{reply.target.host} packs its answer as {encoding[:32]!r}, which was not asked for")
    packed = b"".join([chunk async for chunk in reply.chunks()])
    return packed if encoding in ("", "identity") or not packed else _unpacked(packed, reply.target.host, bytes_max)


def _unpacked(packed: bytes, host: str, bytes_max: int) -> bytes:
    """Never makes more than `bytes_max` bytes and one, whatever the packed ones promise."""
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib, as its first bytes say
    try:
        body = unpacker.decompress(packed, bytes_max + 1)
    except zlib.error as error:
        raise UpstreamFailed(f"what {host} sends cannot be unpacked") from error
    if len(body) > bytes_max:
        raise UpstreamFailed(f"{host} sends more than {bytes_max} bytes once they are unpacked")
    if not unpacker.eof or unpacker.unused_data:
        raise UpstreamFailed(f"what {host} sends cannot be unpacked to its end")
    return body


def _text(reply: Reply, body: bytes) -> str:
    """The body as text; bytes that its encoding does not have become U+FFFD."""
    content_type = reply.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    if body and (not _is_text_type(media_type) if media_type else b"\0" in body):
        raise UpstreamFailed(f"{reply.target.host} answers with {media_type[:64] or 'bytes'}; only text is fetched")
    for mark, encoding in _MARKS:
        if body.startswith(mark):
            return body[len(mark) :].decode(encoding, "replace")
    return body.decode(_encoding(content_type), "replace")


def _encoding(content_type: str) -> str:
    """What the answer says, where that is the encoding of a script; else UTF-8."""
    found = _charset(content_type)
    try:
        name = codecs.lookup(found[1]).name if found else "utf-8"
    except LookupError:
        return "utf-8"
    return name if _is_script_encoding(name) else "utf-8"
