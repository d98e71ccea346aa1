"""What belongs to the request in hand, wherever its code runs. The edge sets it; logs and error frames read it."""

from __future__ import annotations

from contextvars import ContextVar

# "-" outside of any request: an error body must carry something.
correlation_id: ContextVar[str] = ContextVar("correlation_id", default="-")

# Whose token the request carried, as logs say it: never the token itself (HP-SEC-7). Empty before it was checked.
identity: ContextVar[str] = ContextVar("identity", default="")
