"""Requests against the contract. Subclasses Connexion 3.3.0's internals, which is why that version is pinned: routing,
security and the order of things stay Connexion's; checking and calling are ours, on the generated types, because
Connexion turns several kinds of bad input into 500 and does not check uuid, int32, int64 and unknown query parameters.

Choices where JSON and HTTP leave one: a missing Content-Type means JSON; a charset is ignored, since JSON is UTF-8 (RFC
8259); of equal keys in one object the last counts, as in nearly every parser; a query parameter may come once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qsl

import msgspec
from connexion import AsyncApp
from connexion.apps.asynchronous import AsyncApi, AsyncASGIApp
from connexion.middleware.request_validation import RequestValidationAPI, RequestValidationMiddleware
from connexion.middleware.response_validation import (
    ResponseValidationAPI,
    ResponseValidationMiddleware,
    ResponseValidationOperation,
)
from connexion.middleware.routing import RoutingMiddleware
from connexion.operations import AbstractOperation
from starlette.types import ASGIApp, Receive, Scope, Send

from llama_orch.api.answer import Answer
from llama_orch.api.explain import body_place, body_problem, nearest, parameter_problem
from llama_orch.contract.operations import OPERATIONS, Operation, Parameter
from llama_orch.errors import InvalidParams, UnsupportedMediaType

ARGUMENTS = "llama_orch.arguments"  # in the scope, from the check to the call

Headers = list[tuple[bytes, bytes]]


class CheckedRequest:
    """Checks one operation's parameters and body and leaves the handler's keyword arguments in the scope."""

    def __init__(self, next_app: ASGIApp, operation: Operation) -> None:
        self._next_app = next_app
        self._path = [p for p in operation.parameters if p.place == "path"]
        self._query = [p for p in operation.parameters if p.place == "query"]
        self._headers = [(p.name.lower().encode(), p) for p in operation.parameters if p.place == "header"]
        self._body_type = operation.body
        self._decoder = msgspec.json.Decoder(operation.body) if operation.body else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arguments = {p.name: converted(p, scope["path_params"][p.name]) for p in self._path}
        arguments |= self._query_arguments(scope["query_string"])
        arguments |= {argument_name(p): self._header_argument(scope, name, p) for name, p in self._headers}
        if self._decoder:
            require_json(scope["headers"])
            arguments["body"] = self._decoded(await read_body(receive), self._decoder)
        scope[ARGUMENTS] = arguments
        await self._next_app(scope, receive, send)

    def _query_arguments(self, query_string: bytes) -> dict[str, Any]:
        given: dict[str, str] = {}
        known = [p.name for p in self._query]
        for name, value in parse_qsl(query_string.decode("latin-1"), keep_blank_values=True):
            if name not in known:
                raise InvalidParams(f"unknown query parameter `{name[:64]}`; {nearest(name, known)}")
            if name in given:
                raise InvalidParams(f"query parameter `{name}`: give it once")
            given[name] = value
        return {p.name: converted(p, given[p.name]) if p.name in given else p.default for p in self._query}

    @staticmethod
    def _header_argument(scope: Scope, name: bytes, parameter: Parameter) -> Any:
        given = [value for header, value in scope["headers"] if header == name]
        if len(given) > 1:
            raise InvalidParams(f"header parameter `{parameter.name}`: give it once")
        return converted(parameter, given[0].decode("latin-1")) if given else parameter.default

    def _decoded(self, body: bytes, decoder: msgspec.json.Decoder[Any]) -> Any:
        if not body:
            raise InvalidParams("body: send a JSON object")
        try:
            return decoder.decode(body)
        except msgspec.ValidationError as exc:
            raise InvalidParams(body_problem(exc, self._body_type), param=body_place(exc)) from None
        except msgspec.DecodeError as exc:
            raise InvalidParams(f"body: {exc}") from None
        except UnicodeDecodeError:
            raise InvalidParams("body: JSON must be valid UTF-8") from None
        except RecursionError:
            raise InvalidParams("body: JSON is nested too deeply") from None


def converted(parameter: Parameter, value: str) -> Any:
    try:
        return msgspec.convert(value, parameter.type, strict=False)
    except msgspec.ValidationError as exc:
        raise InvalidParams(parameter_problem(exc, parameter.place, parameter.name, parameter.type)) from None


def argument_name(parameter: Parameter) -> str:
    """Of the handler's keyword: a header's X-Priority is x_priority."""
    return parameter.name.lower().replace("-", "_")


def require_json(headers: Headers) -> None:
    media_type = next((value for name, value in headers if name == b"content-type"), b"application/json")
    if media_type.split(b";", 1)[0].strip().lower() != b"application/json":
        raise UnsupportedMediaType("send the body as application/json")


async def read_body(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":  # what came so far may by chance be whole JSON
            raise InvalidParams("the connection closed before the body was complete")
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


class RequestCheckApi(RequestValidationAPI):
    def make_operation(self, operation: AbstractOperation) -> CheckedRequest:
        return CheckedRequest(self.next_app, OPERATIONS[operation.operation_id])


class RequestCheck(RequestValidationMiddleware):
    api_cls = RequestCheckApi


class StrictRouting(RoutingMiddleware):
    """`/v1/tasks/` is not in the contract. Stock answers with a redirect that it builds from the client's Host
    header."""

    def add_api(self, *args: Any, **kwargs: Any) -> None:
        super().add_api(*args, **kwargs)
        for mount in self.router.routes:
            mount.app.redirect_slashes = False


class StampedResponseCheck(ResponseValidationOperation):
    """For tests. The correlation ID, which the contract asks for, is put on further out, by the edge."""

    @staticmethod
    def validate_required_headers(headers: list[tuple[bytes, bytes]], response_definition: dict[str, Any]) -> None:
        stamped = [*headers, (b"x-correlation-id", b"")]
        ResponseValidationOperation.validate_required_headers(stamped, response_definition)


class ResponseCheckApi(ResponseValidationAPI):
    def make_operation(self, operation: AbstractOperation) -> StampedResponseCheck:
        return StampedResponseCheck(self.next_app, operation=operation, validator_map=self.validator_map)


class ResponseCheck(ResponseValidationMiddleware):
    api_cls = ResponseCheckApi


class DirectCall:
    """Calls the handler with the checked arguments. It returns a model, None, or an ASGI response of its own."""

    def __init__(self, handler: Callable[..., Awaitable[Any]], operation: Operation) -> None:
        self._handler = handler
        self._http_status = min(operation.statuses)  # the only success, or the handler says which
        self._has_body = self._http_status != HTTPStatus.NO_CONTENT

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        result = await self._handler(**scope[ARGUMENTS])
        if callable(result):
            await result(scope, receive, send)
            return
        body, headers, http_status = b"", [], self._http_status
        if isinstance(result, Answer):
            http_status = result.http_status or http_status
            headers += [(name.lower().encode(), value.encode()) for name, value in result.headers.items()]
            result = result.body
        if self._has_body:
            body = msgspec.json.encode(result)
            headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": http_status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class DirectApi(AsyncApi):
    def make_operation(self, operation: AbstractOperation) -> DirectCall:
        return DirectCall(operation.function, OPERATIONS[operation.operation_id])


class DirectAsgiApp(AsyncASGIApp):
    api_cls = DirectApi


class DirectApp(AsyncApp):
    """Connexion's application around our innermost one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._middleware_app = self.middleware.app = DirectAsgiApp()
