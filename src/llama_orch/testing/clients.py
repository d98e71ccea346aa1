"""The clients of a world: each submits one task, does what its kind does, and looks at what it is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from msgspec import structs

from llama_orch.context import correlation_id
from llama_orch.contract.models import AdmissionResponse, TaskRequest, TaskState, TaskStatus
from llama_orch.errors import Conflict, LlorchError, NotFound
from llama_orch.testing import frames
from llama_orch.testing.checks import Checker
from llama_orch.testing.stage import Stage
from llama_orch.testing.world import Arrival

TRIES = 3  # of a client that is told to come back
BATCHES_BEFORE_LEAVING = 2
MUST_SAY_WHEN = (429, 503)  # statuses that come with a time to wait (HP-ERR-2)


class Client:
    """One arrival's client. What it finds wrong goes to the checker."""

    def __init__(self, arrival: Arrival, stage: Stage, checker: Checker, note: Callable[[str], None]) -> None:
        self._arrival = arrival
        self._service = stage.service
        self._checker = checker
        self._note = note
        self._seen: list[frames.Seen] = []
        self.text: str | None = None  # of an answer that came to its own end

    @property
    def name(self) -> str:
        return f"client {self._arrival.number}"

    @property
    def request(self) -> TaskRequest:
        return self._arrival.request

    async def run(self) -> None:
        correlation_id.set(self.name)
        await asyncio.sleep(self._arrival.at_s)
        admission = await self._submit(self._arrival.request)
        if admission is None:
            return
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._act(admission), name=f"{self.name} acts")
                await self._read(admission.task_id)
        except* NotFound:  # forgotten meanwhile, where the time of retention is short
            self._note(f"{self.name} finds its task gone")

    async def _submit(self, request: TaskRequest) -> AdmissionResponse | None:
        for attempt in range(TRIES):
            try:
                return await self._service.submit(request)
            except LlorchError as error:
                self._refused(error)
                if error.retry_after_ms is None or attempt == TRIES - 1:
                    return None
                await asyncio.sleep(error.retry_after_ms / 1000)
        return None

    def _refused(self, error: LlorchError) -> None:
        wait = "" if error.retry_after_ms is None else f", again in {error.retry_after_ms} ms"
        self._note(f"{self.name} refused: {error.code.value}{wait} {error.message}")
        self._checker.expect(
            error.http_status not in MUST_SAY_WHEN or error.retry_after_ms is not None,
            f"{self.name} was refused with {error.code.value} and not told when to come back",
        )
        self._checker.expect(error.http_status < 500 or error.http_status == 503, f"{self.name}: {error!r}")

    # -- what kinds do besides reading ---------------------------------------------------------------------------------

    async def _act(self, admission: AdmissionResponse) -> None:
        kind, request = self._arrival.client, self._arrival.request
        if kind in ("reads", "returns", "leaves"):
            return
        if kind == "repeats":  # at once, while the first may still be on its way in
            await self._repeat(request, admission)
        await asyncio.sleep(self._arrival.client_s)
        match kind:
            case "repeats":
                await self._repeat(request, admission)
            case "contradicts":
                await self._contradict(request)
            case "cancels":
                await self._cancel(admission.task_id)
            case "looks":
                self._look(admission.task_id)

    async def _repeat(self, request: TaskRequest, admission: AdmissionResponse) -> None:
        """The same id and body is the same task, as long as it is known (HP-ADM-8)."""
        known = self._checker.lives.get(admission.task_id)
        try:
            again = await self._service.submit(request)
        except LlorchError as error:
            self._checker.expect(known is None, f"{self.name} repeats its task and is refused: {error.code.value}")
            return
        if known is not None:
            same = (again.task_id, again.pool_id, again.seed) == (
                admission.task_id,
                admission.pool_id,
                admission.seed,
            )
            self._checker.expect(same, f"{self.name} repeats its task and gets another one")

    async def _contradict(self, request: TaskRequest) -> None:
        known = request.task_id in self._checker.lives
        try:
            await self._service.submit(structs.replace(request, max_tokens=7))
        except Conflict:
            return
        except LlorchError:
            pass
        self._checker.expect(not known, f"{self.name} sends another body for a known id and is not told")

    async def _cancel(self, task_id: str) -> None:
        """No token comes once the cancel has returned (HP-STR-6)."""
        await self._service.cancel(task_id)
        status = self._service.get_task(task_id)
        self._note(f"{self.name} cancels: {status.state.value}")
        ended = {TaskState.SUCCEEDED, TaskState.FAILED, TaskState.CANCELED}
        self._checker.expect(status.state in ended, f"{self.name} canceled its task, which is {status.state}")
        text = status.text
        await asyncio.sleep(1.0)
        self._checker.expect(
            self._service.get_task(task_id).text == text, f"{self.name} gets more text after its cancel"
        )

    def _look(self, task_id: str) -> None:
        status = self._service.get_task(task_id)
        self._checker.expect(
            (status.queue_position is None) is (status.state is not TaskState.QUEUED),
            f"{self.name}'s task is {status.state} at position {status.queue_position}",
        )
        self._checker.expect(
            any(item.task_id == task_id for item in self._all_tasks()), f"{self.name}'s task is not in the list"
        )

    def _all_tasks(self) -> list[TaskStatus]:
        items: list[TaskStatus] = []
        cursor: str | None = None
        while True:
            page = self._service.list_tasks(state=None, session_id=None, limit=5, cursor=cursor)
            items += page.items
            cursor = page.next_cursor
            if cursor is None:
                return items

    # -- reading -------------------------------------------------------------------------------------------------------

    async def _read(self, task_id: str) -> None:
        """The stream to its end, in two parts where this client comes back to it."""
        if self._arrival.client in ("returns", "leaves"):
            await self._take(task_id, BATCHES_BEFORE_LEAVING)
            await asyncio.sleep(self._arrival.client_s)
            if self._arrival.client == "leaves":
                return
        if not self._has_last():  # who has it and asks again is given it again
            await self._take(task_id, None)
        self._judge(task_id)

    def _has_last(self) -> bool:
        return bool(self._seen) and self._seen[-1].event in frames.LAST

    async def _take(self, task_id: str, batches: int | None) -> None:
        after = self._seen[-1].number if self._seen else -1
        reader = self._service.open_stream(task_id, after)
        try:
            while (batches is None or batches > 0) and (batch := await reader.batch()) is not None:
                self._seen += frames.parse(batch)
                batches = None if batches is None else batches - 1
        finally:
            reader.close()

    def _judge(self, task_id: str) -> None:
        # A reader that comes back has `metrics` frames that the log has dropped since: only their numbers differ.
        for problem in frames.problems(self._seen):
            self._checker.violate(f"the stream of {self.name} {problem}")
        last = self._seen[-1]
        life = self._checker.lives.get(task_id)
        if life is not None:
            succeeded = life.task.state is TaskState.SUCCEEDED
            self._checker.expect(
                (last.event == "end") is succeeded, f"{self.name} reads {last.event} of a task that {life.task.state}"
            )
        if last.event == "end":
            self.text = "".join(frames.tokens(self._seen))
