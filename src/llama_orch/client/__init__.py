"""The client of the service: typed, sync and async, for any program that has its address and its token.

    with Client("http://127.0.0.1:8080", token) as client:
        answer = client.run(TaskRequest(model_ref="builtin:tiny", prompt="Once upon a time"))

`Client` and `AsyncClient` have the same methods, and share everything that is not I/O: what is sent (`calls`), what an
answer means (`wire`), whether and when to try again (`retry`), what has been read of a stream (`reading`). The package
knows the contract and HTTP, and nothing of the service. docs/retries.md is its guide for callers.
"""

from llama_orch.client.aio import AsyncClient
from llama_orch.client.errors import ApiError, ClientError, TaskFailed, UnreachableError
from llama_orch.client.reading import Answer, Frame
from llama_orch.client.retry import ATTEMPTS_MAX, WAIT_MAX_S
from llama_orch.client.sync import Client

__all__ = [
    "ATTEMPTS_MAX",
    "WAIT_MAX_S",
    "Answer",
    "ApiError",
    "AsyncClient",
    "Client",
    "ClientError",
    "Frame",
    "TaskFailed",
    "UnreachableError",
]
