"""OpenAI's API: a second door to the same queue (HP-OAI-1). Each handler makes a task of its request and hands it to
the service like any other."""

from __future__ import annotations

from collections.abc import Iterator

from llama_orch.api.openai_run import ChunkedAnswer, Run, Waiters, WholeAnswer
from llama_orch.api.service import Service
from llama_orch.clock import Clock, new_id
from llama_orch.contract.models import (
    Determinism,
    OpenAiChatRequest,
    OpenAiCompletionRequest,
    OpenAiEmbeddingRequest,
    OpenAiModel,
    OpenAiModelList,
    OpenAiStreamOptions,
    Pool,
    Priority,
    TaskRequest,
)
from llama_orch.errors import NotFound
from llama_orch.openai.answers import ChatWording, Chunks, Subject, TextWording, Wording, embeddings_answer
from llama_orch.openai.requests import Extras, Served, chat_task, completion_task, embedding_task

POOLS_AT_ONCE = 200


class OpenAi:
    _service: Service
    _clock: Clock
    _started_at: int  # seconds since 1970
    _waiters: Waiters

    # -- models --------------------------------------------------------------------------------------------------------

    async def list_open_ai_models(self) -> OpenAiModelList:
        return OpenAiModelList(object="list", data=list(self._models().values()))

    async def get_open_ai_model(self, *, id: str) -> OpenAiModel:
        try:
            return self._models()[id]
        except KeyError:
            raise NotFound(f"there is no model {id!r}; GET /v1/models lists those that are served") from None

    def _models(self) -> dict[str, OpenAiModel]:
        """By name: the pools' IDs, then the references of what they serve."""
        pools = list(self._pools())
        names = [(pool.id, pool.engine) for pool in pools] + [(pool.model, pool.engine) for pool in reversed(pools)]
        engines = dict(names)  # of a model that several pools serve, the first one's
        return {
            name: OpenAiModel(id=name, object="model", created=self._started_at, owned_by=engine)
            for name, engine in engines.items()
        }

    def _pools(self) -> Iterator[Pool]:
        cursor: str | None = None
        while True:
            page = self._service.list_pools(limit=POOLS_AT_ONCE, cursor=cursor)
            yield from page.items
            cursor = page.next_cursor
            if cursor is None:
                return

    def _served(self, model: str) -> Served:
        """A pool's ID, else a reference; whether anybody serves that is for admission to say."""
        try:
            pool = self._service.get_pool(model)
        except NotFound:
            return Served(model)
        return Served(pool.model, pool.engine)

    # -- answers -------------------------------------------------------------------------------------------------------

    async def create_chat_completion(
        self,
        *,
        body: OpenAiChatRequest,
        x_priority: Priority | None,
        x_session_id: str | None,
        x_deadline_ms: int | None,
        x_determinism: Determinism | None,
    ) -> ChunkedAnswer | WholeAnswer:
        extras = Extras(x_priority, x_session_id, x_deadline_ms, x_determinism)
        subject = self._subject(body.model)
        request = chat_task(body, extras, self._served(body.model), subject.task_id)
        return self._answer(request, ChatWording(subject), body.stream, body.stream_options)

    async def create_completion(
        self,
        *,
        body: OpenAiCompletionRequest,
        x_priority: Priority | None,
        x_session_id: str | None,
        x_deadline_ms: int | None,
        x_determinism: Determinism | None,
    ) -> ChunkedAnswer | WholeAnswer:
        extras = Extras(x_priority, x_session_id, x_deadline_ms, x_determinism)
        subject = self._subject(body.model)
        request = completion_task(body, extras, self._served(body.model), subject.task_id)
        return self._answer(request, TextWording(subject), body.stream, body.stream_options)

    async def create_embedding(
        self,
        *,
        body: OpenAiEmbeddingRequest,
        x_priority: Priority | None,
        x_session_id: str | None,
        x_deadline_ms: int | None,
        x_determinism: Determinism | None,
    ) -> WholeAnswer:
        extras = Extras(x_priority, x_session_id, x_deadline_ms, x_determinism)
        subject = self._subject(body.model)
        request = embedding_task(body, extras, self._served(body.model), subject.task_id)
        is_base64 = body.encoding_format == "base64"
        return WholeAnswer(
            Run(self._service, request, self._waiters),
            lambda _, end: embeddings_answer(subject, end, is_base64=is_base64),
        )

    def _subject(self, model: str) -> Subject:
        return Subject(new_id(), int(self._clock.wall()), model)

    def _answer(
        self, request: TaskRequest, wording: Wording, is_stream: bool | None, options: OpenAiStreamOptions | None
    ) -> ChunkedAnswer | WholeAnswer:
        run = Run(self._service, request, self._waiters)
        if not is_stream:
            return WholeAnswer(run, wording.whole)
        return ChunkedAnswer(run, Chunks(wording, tells_usage=options is not None and bool(options.include_usage)))
