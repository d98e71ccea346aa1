"""The defects, each a small patch of the application in this process, and the cheapest gate that must see it.

A patch is applied once, before the application is put together, and never taken back: whoever applies one has a process
for it (`serve.py`, `plugin.py`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import msgspec
from starlette.types import Message, Receive, Scope, Send

from llama_orch.api import app, auth, bodies, edge, hosts, refusals, sse, validation
from llama_orch.contract.models import (
    Capabilities,
    DrainRequest,
    EndFrame,
    Error,
    MetricsFrame,
    PoolHealth,
    Priority,
)
from llama_orch.core import admission, queue, replica, scheduler
from llama_orch.engines import http_worker, likelihoods
from llama_orch.engines.base import EngineBusy, RunLost
from llama_orch.engines.remote import client as remote_client
from llama_orch.engines.remote import worker as remote_worker
from llama_orch.errors import AdmissionReject, Conflict, LlorchError, NotFound, Unauthorized
from llama_orch.observe import metrics
from llama_orch.openai import answers, tools
from llama_orch.policy import rules
from llama_orch.runtime import (
    answer,
    arrivals,
    download,
    fetches,
    intake,
    jobs,
    orchestrator,
    service,
    streams,
    views,
)
from llama_orch.stores import catalog, failures


class Fuzz(NamedTuple):
    """One operation under the fuzz gate. Phases of `st`: coverage is the same on every run, and short."""

    document: str
    operation: str
    phases: str = "coverage"

    def __str__(self) -> str:
        return f"fuzz {self.operation} ({self.phases})"


class Tests(NamedTuple):
    """A test of the default run, or a whole file of them."""

    file: str
    test: str = ""

    @property
    def node(self) -> str:
        return f"{self.file}::{self.test}" if self.test else self.file

    def __str__(self) -> str:
        return self.file


Gate = Fuzz | Tests


class Defect(NamedTuple):
    words: str
    gate: Gate
    apply: Callable[[], None]


DEFECTS: dict[str, Defect] = {}


def defect(gate: Gate) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Registers a patch; what it breaks is its docstring."""

    def register(apply: Callable[[], None]) -> Callable[[], None]:
        DEFECTS[apply.__name__] = Defect((apply.__doc__ or "").rstrip("."), gate, apply)
        return apply

    return register


def on_the_way_out(change: Callable[[Scope, Message], None]) -> None:
    """Passes what the edge sends through `change`."""
    original = edge.Edge.__call__

    async def call(self: edge.Edge, scope: Scope, receive: Receive, send: Send) -> None:
        async def changed(message: Message) -> None:
            change(scope, message)
            await send(message)

        await original(self, scope, receive, changed)

    edge.Edge.__call__ = call


def without(headers: list[tuple[bytes, bytes]], name: bytes) -> list[tuple[bytes, bytes]]:
    return [pair for pair in headers if pair[0] != name]


# -- statuses, headers, errors ---------------------------------------------------------------------------------------


@defect(Fuzz("control", "getPool"))
def correlation_id_missing_on_errors() -> None:
    """Errors have no X-Correlation-Id."""

    def change(scope: Scope, message: Message) -> None:
        if message.get("status", 0) >= 400:
            message["headers"] = without(message["headers"], b"x-correlation-id")

    on_the_way_out(change)


@defect(Fuzz("control", "getPool"))
def correlation_id_reflected() -> None:
    """Any X-Correlation-Id comes back, whatever is in it."""
    edge._is_correlation_id = re.compile(rb"[\x00-\x7f]*").fullmatch


@defect(Fuzz("data", "createTask"))
def retry_after_missing() -> None:
    """429 has no Retry-After."""
    original = LlorchError.headers

    def headers(self: LlorchError) -> dict[str, str]:
        return {name: value for name, value in original(self).items() if name != "Retry-After"}

    LlorchError.headers = headers


@defect(Fuzz("control", "getPool"))
def allow_missing() -> None:
    """405 has no Allow."""

    def change(scope: Scope, message: Message) -> None:
        if message.get("status") == 405:
            message["headers"] = without(message["headers"], b"allow")

    on_the_way_out(change)


@defect(Fuzz("data", "createTask"))
def created_is_200() -> None:
    """A task that was admitted is answered with 200 instead of 202."""

    def change(scope: Scope, message: Message) -> None:
        if message.get("status") == 202:
            message["status"] = 200

    on_the_way_out(change)


@defect(Fuzz("data", "getTask"))
def bad_uuid_is_500() -> None:
    """An id in the path that is no UUID is a 500."""
    original = validation.converted

    def converted(parameter: Any, value: str) -> Any:
        return msgspec.convert(value, parameter.type) if parameter.place == "path" else original(parameter, value)

    validation.converted = converted


@defect(Fuzz("data", "getTask"))
def path_uuid_unchecked() -> None:
    """An id in the path is not checked: what is no UUID is a 404."""
    original = validation.converted
    validation.converted = lambda parameter, value: value if parameter.place == "path" else original(parameter, value)


@defect(Fuzz("data", "createTask"))
def body_uuid_unchecked() -> None:
    """A `session_id` in the body that is no UUID is taken."""
    original = validation.CheckedRequest._decoded

    def decoded(self: validation.CheckedRequest, body: bytes, decoder: msgspec.json.Decoder[Any]) -> Any:
        try:
            given = msgspec.json.decode(body)
            given.pop("session_id")
            body = msgspec.json.encode(given)
        except (msgspec.MsgspecError, UnicodeDecodeError, AttributeError, LookupError, TypeError):
            pass
        return original(self, body, decoder)

    validation.CheckedRequest._decoded = decoded


@defect(Fuzz("control", "drainPool"))
def drain_deadline_unbounded() -> None:
    """A `deadline_ms` below 0, or of more than a week, is taken."""
    original = validation.CheckedRequest._decoded

    def decoded(self: validation.CheckedRequest, body: bytes, decoder: msgspec.json.Decoder[Any]) -> Any:
        try:
            given = msgspec.json.decode(body, type=dict[str, int])
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return original(self, body, decoder)
        return DrainRequest(**given) if given.keys() == {"deadline_ms"} else original(self, body, decoder)

    validation.CheckedRequest._decoded = decoded


@defect(Fuzz("control", "getPool"))
def envelope_without_engine() -> None:
    """The error body has no `engine`."""
    original = refusals.rendered

    def rendered(error: LlorchError, correlation_id: str) -> tuple[list[tuple[bytes, bytes]], bytes]:
        headers, body = original(error, correlation_id)
        shorter = {name: value for name, value in msgspec.json.decode(body).items() if name != "engine"}
        body = msgspec.json.encode(shorter)
        return [*without(headers, b"content-length"), (b"content-length", str(len(body)).encode())], body

    refusals.rendered = rendered


@defect(
    Tests(
        "tests/api/test_bad_input.py",
        "test_bad_input_gets_its_status_the_envelope_and_the_correlation_id[body-too-long]",
    )
)
def body_limit_ignored() -> None:
    """A body may be of any length."""
    original = edge.Edge.__init__

    def init(self: edge.Edge, *given: Any) -> None:
        original(self, *given)
        self._max_body_bytes = 2**40

    edge.Edge.__init__ = init


# -- who may ask -----------------------------------------------------------------------------------------------------


@defect(Fuzz("control", "getPool"))
def an_open_operation() -> None:
    """GET /v1/pools/{id} needs no token."""
    original = app.merged_document

    def document(*, metrics_are_open: bool) -> dict[str, Any]:
        merged = original(metrics_are_open=metrics_are_open)
        merged["paths"]["/v1/pools/{id}"]["get"]["security"] = []
        return merged

    app.merged_document = document


@defect(Tests("tests/api/test_bad_input.py", "test_the_token_is_compared_as_bytes"))
def token_by_prefix() -> None:
    """Whatever begins with the token is taken for it."""
    original = auth.TokenCheck.__init__

    def init(self: auth.TokenCheck, token: str) -> None:
        original(self, token)
        self._token = token

    def call(self: auth.TokenCheck, presented: str) -> dict[str, str]:
        if not presented.encode("latin-1").startswith(self._token.encode()):
            raise Unauthorized("the token is wrong; `llama-orch token` prints the right one")
        return {"sub": self._identity}

    auth.TokenCheck.__init__ = init
    auth.TokenCheck.__call__ = call


@defect(Tests("tests/api/test_routes.py", "test_hosts_that_are_not_ours"))
def any_host() -> None:
    """The Host allow-list is off."""
    hosts.AllowedHosts.check = lambda self, host: None


# -- streams ---------------------------------------------------------------------------------------------------------


def token_frames(payload: Callable[[str, int], dict[str, Any]]) -> None:
    def token(self: streams.TaskStream, text: str) -> None:
        if not self.is_ended:
            self._write("token", msgspec.json.encode(payload(text, len(self._texts))))
            self._texts.append(text)
            self._is_last_metrics = False

    streams.TaskStream.token = token


@defect(Fuzz("data", "streamTask"))
def token_without_index() -> None:
    """`token` frames have no `i`."""
    token_frames(lambda text, index: {"t": text})


@defect(Fuzz("data", "streamTask"))
def token_index_from_one() -> None:
    """`i` of `token` frames counts from 1."""
    token_frames(lambda text, index: {"t": text, "i": index + 1})


@defect(Fuzz("data", "streamTask"))
def two_last_frames() -> None:
    """The last frame comes twice."""
    original = streams.TaskStream.end

    def end(self: streams.TaskStream, frame: EndFrame | Error) -> None:
        original(self, frame)
        self.is_ended = False
        original(self, frame)

    streams.TaskStream.end = end


@defect(Fuzz("data", "streamTask"))
def a_frame_after_the_last() -> None:
    """A `metrics` frame follows the last one."""
    original_end, original_metrics = streams.TaskStream.end, streams.TaskStream.metrics
    last: dict[int, MetricsFrame] = {}

    def metrics_frame(self: streams.TaskStream, frame: MetricsFrame) -> None:
        last[id(self)] = frame
        original_metrics(self, frame)

    def end(self: streams.TaskStream, frame: EndFrame | Error) -> None:
        original_end(self, frame)
        self.is_ended, self._is_last_metrics = False, False
        original_metrics(self, last[id(self)])
        self.is_ended = True

    streams.TaskStream.end = end
    streams.TaskStream.metrics = metrics_frame


@defect(Tests("tests/live/test_life.py", "test_last_event_id_over_http"))
def last_event_id_ignored() -> None:
    """A stream that is opened again begins at its first frame."""
    sse.last_event_id = lambda scope: -1


# -- bodies ----------------------------------------------------------------------------------------------------------


@defect(Fuzz("control", "listPools"))
def list_without_next_cursor() -> None:
    """A list has no `next_cursor`."""
    original = service.LocalService.list_pools

    def list_pools(self: service.LocalService, **given: Any) -> Any:
        return {"items": original(self, **given).items}

    service.LocalService.list_pools = list_pools


@defect(Tests("tests/runtime/test_orchestrator.py", "test_lists_are_newest_first_and_paged"))
def list_ends_early() -> None:
    """The first page of a list says that there is no other."""
    original = service.LocalService.list_tasks

    def list_tasks(self: service.LocalService, **given: Any) -> Any:
        return msgspec.structs.replace(original(self, **given), next_cursor=None)

    service.LocalService.list_tasks = list_tasks


@defect(Fuzz("control", "getCapabilities"))
def capability_of_the_wrong_type() -> None:
    """`concurrency.recommended` is a string."""
    original = service.LocalService.capabilities

    def capabilities(self: service.LocalService) -> Capabilities:
        found = original(self)
        wrong = msgspec.structs.replace(found.concurrency, recommended=str(found.concurrency.recommended))
        return msgspec.structs.replace(found, concurrency=wrong)

    service.LocalService.capabilities = capabilities


@defect(Tests("tests/contract/test_documents.py", "test_a_scrape_is_what_the_table_says"))
def metric_with_another_label() -> None:
    """`slots_busy` has a label that the table does not have."""
    original = metrics.Metrics.text
    metrics.Metrics.text = lambda self: original(self).replace(b"\nslots_busy{", b'\nslots_busy{host="here",')


@defect(Fuzz("data", "createTask,getTask", "stateful"))
def a_task_is_lost() -> None:
    """A `batch` task that was admitted is not there afterwards."""
    original = service.LocalService.get_task

    def get_task(self: service.LocalService, task_id: str) -> Any:
        found = original(self, task_id)
        if found.priority is Priority.BATCH:
            raise NotFound(f"no task {task_id}")
        return found

    service.LocalService.get_task = get_task


@defect(Fuzz("control", "reloadPool"))
def a_second_reload_is_taken() -> None:
    """A reload while another one runs is answered with 202, and nothing comes of it."""
    original = service.LocalService.reload_pool

    async def reload_pool(self: service.LocalService, pool_id: str, new_model_ref: str) -> PoolHealth:
        try:
            return await original(self, pool_id, new_model_ref)
        except Conflict:
            return self.get_pool_health(pool_id)

    service.LocalService.reload_pool = reload_pool


# -- what is promised ------------------------------------------------------------------------------------------------


@defect(Tests("tests/runtime/test_orchestrator.py", "test_cancel_of_a_running_task_frees_its_slot"))
def cancel_does_nothing() -> None:
    """A cancel is answered with 204 and the task goes on."""
    orchestrator.Orchestrator.cancel = lambda self, task_id: None


@defect(Tests("tests/live/test_cancel.py", "test_by_cancel_while_it_decodes[llamacpp]"))
def slot_freed_late() -> None:
    """After a cancel the engine's slot is held for 400 ms longer."""
    original = http_worker.HttpWorker._cancel

    async def cancel(self: http_worker.HttpWorker, *given: Any) -> None:
        await original(self, *given)
        pause = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(0.4, pause.set_result, None)
        await pause

    http_worker.HttpWorker._cancel = cancel


@defect(Tests("tests/live/test_life.py", "test_the_same_seed_gives_the_same_bytes_whatever_else_runs"))
def seed_not_honoured() -> None:
    """The engine gets a seed of its own each time."""
    original = jobs._job
    jobs._job = lambda *given: dataclasses.replace(original(*given), seed=random.randrange(2**32))


@defect(Tests("tests/determinism/test_determinism.py", "test_the_same_under_load[llamacpp]"))
def strict_shares_its_replica() -> None:
    """A strict task holds one slot, and others decode beside it."""
    can_take, take = replica.Replica.can_take, replica.Replica.take
    replica.Replica.can_take = lambda self, exclusive: can_take(self, exclusive=False)
    replica.Replica.take = lambda self, task_id, exclusive, slot=None: take(self, task_id, exclusive=False, slot=slot)


@defect(Tests("tests/runtime/test_orchestrator.py", "test_the_life_of_a_task"))
def seed_not_reported() -> None:
    """`end` names another seed than the one that was used."""
    original = views.end_frame
    views.end_frame = lambda *given: msgspec.structs.replace(original(*given), seed=0)


@defect(Tests("tests/runtime/test_orchestrator.py", "test_position_and_prediction_stay_fresh_while_a_task_waits"))
def predicted_start_invented() -> None:
    """`predicted_start_ms` is a number before anything was measured."""
    original = views.to_ms
    views.to_ms = lambda seconds: 1000 if seconds is None else original(seconds)


@defect(Tests("tests/core/test_scheduler.py", "test_tasks_start_by_priority_and_then_by_arrival"))
def last_in_first_out() -> None:
    """Who came last is served first."""

    def ids(self: queue.TaskQueue) -> Any:
        for line in self._lines.values():
            yield from reversed(line)

    queue.TaskQueue.__iter__ = ids


@defect(Tests("tests/core/test_queue.py", "test_drop_lru_drops_the_oldest_of_the_lowest_priority"))
def interactive_dropped_for_batch() -> None:
    """drop-lru drops an `interactive` task for a `batch` one."""

    def make_room(self: queue.TaskQueue, newcomer: Priority) -> str | None:
        if len(self) < self.capacity:
            return None
        line: OrderedDict[str, None] = next((line for line in self._lines.values() if line), OrderedDict())
        if self.full_policy == "reject" or not line:
            raise queue.QueueFull
        return line.popitem(last=False)[0]

    queue.TaskQueue._make_room = make_room


@defect(Tests("tests/runtime/test_orchestrator.py", "test_equal_submissions_with_one_id_are_one_task"))
def task_id_not_idempotent() -> None:
    """The same submission twice is a conflict."""
    original = scheduler.Scheduler.repeated

    def repeated(self: scheduler.Scheduler, request: Any) -> Any:
        if (task := original(self, request)) is not None:
            raise scheduler.Conflict(f"task {task.task_id} exists")

    scheduler.Scheduler.repeated = repeated


@defect(
    Tests(
        "tests/pact/test_provider.py",
        "test_the_service_keeps_its_word[llama-orch-cli--llama-orch: a dropped tasks stream ends in an error]",
    )
)
def dropped_without_its_code() -> None:
    """A task that drop-lru dropped ends with ADMISSION_REJECT instead of QUEUE_FULL_DROP_LRU."""

    def dropped(pool: Any, wait_ms: int) -> LlorchError:
        return AdmissionReject("dropped", engine=pool.spec.engine, retry_after_ms=wait_ms, policy_label="drop-lru")

    scheduler.refusals.dropped = dropped


# -- catalog, fetches, policy ------------------------------------------------------------------------------------------


@defect(Tests("tests/kills/test_kills.py"))
def answered_before_it_is_kept() -> None:
    """The catalog answers a write a moment before it is on the disk."""

    async def put(self: catalog.CatalogRecords, entry: Any) -> None:
        self._database.submit(lambda: threading.Event().wait(0.1) or self._store.put(entry))

    catalog.CatalogRecords.put = put


@defect(Tests("tests/live/test_bad_disk.py", "test_the_catalog_on_a_disk_that_gets_full"))
def full_disk_is_500() -> None:
    """A full disk is a 500 instead of a 507."""

    def problem(error: Exception) -> str:
        raise error

    failures._sqlite_problem = problem


@defect(Tests("tests/runtime/test_download.py", "test_what_a_write_did_not_take_is_written_too"))
def what_a_full_disk_takes_is_enough() -> None:
    """What a full disk did not take of a fetched file is lost without a word."""

    def write(self: download.Download, file: Any, pieces: list[bytes], etag: str) -> None:
        file.write(b"".join(pieces))
        os.fsync(file.fileno())
        if etag:
            note = download.Note(url=self._url, etag=etag, kept_bytes=file.tell())
            self._note_path.write_bytes(msgspec.json.encode(note))

    download.Download._write = write


@defect(Tests("tests/runtime/test_download.py", "test_what_broke_off_is_taken_up_where_it_ended"))
def a_fetch_begins_anew() -> None:
    """A fetch that broke off begins at the first byte again."""
    download.Download._note = lambda self: None


@defect(Tests("tests/live/test_fetch.py", "test_what_is_not_what_was_declared_gets_no_name"))
def what_was_fetched_is_not_compared() -> None:
    """A file that is not what was declared gets its final name."""
    fetches.trust = SimpleNamespace(contradictions=lambda *given: [])


@defect(Tests("tests/runtime/test_fetches.py", "test_nothing_stays_of_a_fetch_whose_model_is_deleted"))
def a_deleted_fetch_leaves_its_part() -> None:
    """What was fetched of a model stays on the disk when the model is deleted."""
    fetches.Fetches._files_of = lambda self, entry: []


@defect(Tests("tests/live/test_fetch.py", "test_a_model_is_fetched_served_and_deleted"))
def fetched_though_nobody_allowed_it() -> None:
    """A task has its model fetched though `on_demand.fetch` is off."""
    original = arrivals.Arrivals.__init__

    def init(self: arrivals.Arrivals, *given: Any) -> None:
        original(self, *given)
        self._is_on = True

    arrivals.Arrivals.__init__ = init


@defect(Tests("tests/live/test_fetch_on_demand.py", "test_tasks_wait_for_their_model_and_share_its_fetch"))
def a_cancel_stops_the_fetch() -> None:
    """Who cancels a task that waits for a fetch ends the fetch, for all others too."""
    original = orchestrator.Orchestrator.cancel

    def cancel(self: orchestrator.Orchestrator, task_id: str) -> None:
        original(self, task_id)
        for entry in self.catalog.book:
            fetch = self.catalog.fetches and self.catalog.fetches.of(entry)
            if fetch and not fetch.is_over and fetch.task:
                fetch.task.cancel()

    orchestrator.Orchestrator.cancel = cancel


@defect(Tests("tests/core/test_arrivals.py", "test_where_it_does_not_come_all_end_and_the_pool_goes"))
def a_failed_fetch_is_not_told() -> None:
    """Tasks that wait for a fetch go on waiting when it has failed."""
    scheduler.Arrivals.failed = lambda self, pool, error, now: None


@defect(Tests("tests/outbound/test_plugins.py", "test_no_plugin_lifts_an_entry_of_deny"))
def a_plugin_lifts_deny() -> None:
    """A plugin's Allow lets through what `policy.outbound.deny` names."""
    by_deny, by_lists = rules.Rules.by_deny, rules.Rules.by_lists
    rules.Rules.by_lists = lambda self, *given: by_deny(self, *given) or by_lists(self, *given)
    rules.Rules.by_deny = lambda self, *given: None


@defect(Tests("tests/api/test_bodies.py", "test_a_burst_holds_no_more_than_the_bound"))
def bodies_without_a_bound() -> None:
    """The bodies of requests that wait may hold any amount of memory."""
    bodies.Bodies.take = lambda self, count: True


# -- tools and likelihoods -------------------------------------------------------------------------------------------


@defect(Tests("tests/live/test_tools.py", "test_a_call_that_is_asked_for_is_made"))
def tools_without_a_grammar() -> None:
    """The model is shown the tools, and may answer what it likes."""
    intake.grammar_of_tools = lambda *_: "root ::= .*"


@defect(Tests("tests/live/test_tools.py", "test_what_cannot_be_done_is_refused_by_name"))
def tools_ignored_in_silence() -> None:
    """A model whose template knows no tools answers as if there were none."""
    admission.fields_about_tools = lambda _: iter(())


@defect(Tests("tests/live/test_tools.py", "test_a_model_that_calls_by_itself_is_heard"))
def control_tokens_left_out() -> None:
    """What a model marks its calls with does not reach us."""
    original = answer.syntax_of
    jobs.syntax_of = lambda task: (found := original(task)) and dataclasses.replace(found, kept=())


@defect(Tests("tests/openai/test_answers.py", "test_calls_come_in_openais_framing"))
def calls_end_as_texts() -> None:
    """An answer with calls ends with `finish_reason` `stop`."""
    tools.Calls.are_whole = property(lambda self: False)


@defect(Tests("tests/openai/test_answers.py", "test_a_whole_answer_has_its_calls"))
def calls_shown_as_text() -> None:
    """What stands around calls is content."""
    original = answers.ChatWording.whole

    def whole(self: Any, frames: Any, end: EndFrame) -> Any:
        plain = [msgspec.structs.replace(frame, tool_calls=msgspec.UNSET) for frame in frames]
        return original(self, plain, end)

    answers.ChatWording.whole = whole


@defect(Tests("tests/live/test_tools.py", "test_the_bytes_of_tokens_are_the_text"))
def held_back_tokens_told_at_once() -> None:
    """Tokens that the engine holds back are told before their text is, as nothing."""
    original = likelihoods.Likelihoods.of

    def of(self: Any, event: Any) -> Any:
        found = original(self, event)
        return found or ((likelihoods.TextLikelihood("", -1.0),) if event.completion_probabilities else ())

    likelihoods.Likelihoods.of = of


# -- servers elsewhere -----------------------------------------------------------------------------------------------

BROKEN = "tests/engines/remote/test_broken.py"


@defect(Tests(BROKEN, "test_what_breaks_before_the_first_token_is_tried_again[500]"))
def broken_run_not_tried_again() -> None:
    """A run that a server elsewhere fails before its first token ends its task at once."""

    async def broke(self: Any, error: Exception, *, may_retry: bool) -> None:
        raise RunLost(str(error))

    remote_worker._Tries.broke = broke


@defect(Tests(BROKEN, "test_what_breaks_later_is_over[nothing]"))
def run_begun_twice() -> None:
    """A run that breaks after its first token is tried again, and its client reads the beginning twice."""
    original = remote_worker._Tries.broke

    async def broke(self: Any, error: Any, *, may_retry: bool) -> None:
        await original(self, error, may_retry=True)

    remote_worker._Tries.broke = broke


@defect(Tests("tests/engines/remote/test_runs.py", "test_a_busy_server_is_waited_for[429]"))
def busy_server_fails_the_task() -> None:
    """A task that a server elsewhere has no room for now ends with an error."""

    def was_busy(self: Any, error: Exception) -> None:
        raise EngineBusy(str(error))

    remote_worker._Tries.was_busy = was_busy


@defect(Tests(BROKEN, "test_the_jobs_own_fault[400]"))
def key_in_an_error() -> None:
    """What a server elsewhere says is passed on with the key that it repeats."""
    remote_client.RemoteClient.said = lambda self, text: text[:300]
