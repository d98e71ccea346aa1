"""How much memory the bodies of requests may take, all together, and those of large answers. What came of a request's
body is counted until its answer begins: until then it is read, checked, or waits, for the one writer of the stores as a
rule. An answer is counted until it is sent (HP-ERR-2)."""

from __future__ import annotations

import asyncio

from starlette.types import Message, Receive, Scope, Send

from llama_orch.errors import PayloadTooLarge, PolicyDenied, ReplicaExhausted

HELD_MIN_BYTES = 64 << 20
BODIES_MIN = 4  # of the largest size that is taken, should that be more
RETRY_AFTER_MS = 1000
PIECE_BYTES, PIECE_LIMIT_S = 1 << 16, 30.0  # of a large answer; who does not take one in this time is cut off


class Bodies:
    """Those of one listener, or its large answers. What is said of a length is not counted, but what has come: who
    sends nothing holds nothing."""

    def __init__(self, max_body_bytes: int, what: str = "the bodies of requests that are under way") -> None:
        self.max_body_bytes = max_body_bytes
        self._what = what
        self._held_max = max(HELD_MIN_BYTES, BODIES_MIN * max_body_bytes)
        self._held = 0

    def too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(
            f"the body exceeds {self.max_body_bytes} bytes; send less, "
            "or raise server.max_body_bytes in the configuration"
        )

    def take(self, count: int) -> bool:
        """False where there is no room; then these bytes are not held."""
        if count and self._held + count > self._held_max:
            return False
        self._held += count
        return True

    def release(self, count: int) -> None:
        self._held -= count

    def no_room(self) -> ReplicaExhausted:
        return ReplicaExhausted(
            f"{self._what} hold {self._held_max} bytes, which is the most; repeat shortly",
            retry_after_ms=RETRY_AFTER_MS,
            policy_label="bodies",
        )


class Body:
    """One request's."""

    def __init__(self, bodies: Bodies, receive: Receive) -> None:
        self._bodies = bodies
        self._receive = receive
        self._received = 0
        self._held = 0

    async def receive(self) -> Message:
        """Raises PayloadTooLarge, also where no length was said, and ReplicaExhausted."""
        message, count = await self._next()
        if not self._bodies.take(count):
            self.release()
            while message.get("more_body"):  # who still sends when the connection is closed may never read the answer
                message, _ = await self._next()
            raise self._bodies.no_room()
        self._held += count
        return message

    async def _next(self) -> tuple[Message, int]:
        message = await self._receive()
        count = len(message.get("body", b""))
        self._received += count
        if self._received > self._bodies.max_body_bytes:
            raise self._bodies.too_large()
        return message, count

    def release(self) -> None:
        """Its answer begins, or there is none."""
        self._bodies.release(self._held)
        self._held = 0


class LargeAnswer:
    """A JSON answer that is sent piece by piece, so that who reads slowly holds what is counted and no more. Raises
    ReplicaExhausted where there is no room for it."""

    def __init__(self, body: bytes, bodies: Bodies) -> None:
        if not bodies.take(len(body)):
            raise bodies.no_room()
        self._body = body
        self._bodies = bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        length = str(len(self._body)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", length)]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            for place in range(0, len(self._body), PIECE_BYTES):
                piece = self._body[place : place + PIECE_BYTES]
                more = place + PIECE_BYTES < len(self._body)
                async with asyncio.timeout(PIECE_LIMIT_S):
                    await send({"type": "http.response.body", "body": piece, "more_body": more})
        except TimeoutError as error:
            raise PolicyDenied("the answer was read too slowly", policy_label="slow-reader") from error
        finally:
            self._bodies.release(len(self._body))
