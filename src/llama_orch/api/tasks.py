"""Tasks: submit, read, stream, cancel."""

from __future__ import annotations

from llama_orch.api.answer import Answer
from llama_orch.api.service import Service
from llama_orch.api.sse import EventStream
from llama_orch.contract.models import AdmissionResponse, TaskList, TaskRequest, TaskState, TaskStatus


class Tasks:
    _service: Service

    async def create_task(self, *, body: TaskRequest) -> AdmissionResponse | Answer:
        admission = await self._service.submit(body)
        headers = self._service.budgets_left(body.session_id).headers()
        return Answer(admission, headers) if headers else admission

    async def list_tasks(
        self, *, state: TaskState | None, session_id: str | None, limit: int, cursor: str | None
    ) -> TaskList:
        session = session_id.lower() if session_id else None
        return self._service.list_tasks(state=state, session_id=session, limit=limit, cursor=cursor)

    async def get_task(self, *, id: str) -> TaskStatus:
        return self._service.get_task(id.lower())

    async def stream_task(self, *, id: str) -> EventStream:
        task_id = id.lower()
        return EventStream(
            lambda after: self._service.open_stream(task_id, after), self._service.budgets_left_of(task_id).headers()
        )

    async def cancel_task(self, *, id: str) -> None:
        await self._service.cancel(id.lower())
