"""The typed client, in both its forms, against a service over HTTP."""

from __future__ import annotations

import inspect
import json
import uuid
from itertools import islice

import httpx
import pytest

from llama_orch.client import ApiError, AsyncClient, Client, TaskFailed, UnreachableError
from llama_orch.contract.models import EndFrame, Error, ErrorCode, StartedFrame, TaskRequest, TokenFrame
from tests.cli.contract_service import CUT_OFF, DRAINS, END, HEALTH, RELOADS, ContractService, Refusal, error
from tests.client.conftest import NewClient

BUSY = error("ADMISSION_REJECT", retriable=True, retry_after_ms=30)


def _request(prompt: str) -> TaskRequest:
    return TaskRequest(model_ref="builtin:tiny", prompt=prompt)


def _text(client: Client, prompt: str) -> str:
    admission = client.submit(_request(prompt))
    return "".join(frame.t for frame in client.stream(admission.task_id) if isinstance(frame, TokenFrame))


def test_a_task_from_submission_to_end(client: Client) -> None:
    """A submitted task streams typed frames: started first, end last."""
    admission = client.submit(_request("hello"))
    frames = list(client.stream(admission.task_id))
    assert isinstance(frames[0], StartedFrame)
    assert [frame.t for frame in frames if isinstance(frame, TokenFrame)] == ["Hello", " wörld"]
    assert isinstance(frames[-1], EndFrame)
    assert frames[-1].seed == 7


def test_error_frame_ends_the_stream(client: Client) -> None:
    """An `error` frame is handed out as the last one."""
    admission = client.submit(_request("lost"))
    last = list(client.stream(admission.task_id))[-1]
    assert isinstance(last, Error)
    assert last.code == ErrorCode.WORKER_RESET


def test_frames_of_a_later_version_are_passed_over(client: Client) -> None:
    """An event that this version does not know is skipped."""
    assert _text(client, "later-frame") == "ok"


@pytest.mark.spec("HP-STR-7")
def test_broken_stream_goes_on(client: Client, service: ContractService, waits: list[float]) -> None:
    """A broken stream is taken up behind the last whole frame: nothing is lost, nothing comes twice."""
    assert _text(client, "broken") == "ab"
    streams = service.headers_of("/stream")
    assert [headers.get("last-event-id") for headers in streams] == [None, "2"]
    assert len(waits) == 1


def test_reads(client: Client, service: ContractService) -> None:
    """Every read of the contract comes back typed."""
    admission = client.submit(_request("hello"))
    client.submit(_request("hello"))
    assert client.get_task(admission.task_id).task_id == admission.task_id
    page = client.list_tasks(limit=1)
    assert len(page.items) == 1
    assert page.next_cursor == "more"
    assert client.pools().items[0] == client.pool("default")
    assert [(pool.on_demand, pool.keep_alive_ms) for pool in client.pools().items] == [(False, None), (True, 300_000)]
    assert client.pool_health("default").replicas[0].id == "default-0"
    assert client.capabilities().api_version == "2.3.0"


def test_cancel(client: Client, service: ContractService) -> None:
    """Cancel reaches the task; of a task that does not exist it is a typed failure."""
    admission = client.submit(_request("forever"))
    client.cancel(admission.task_id)
    assert service.only_task().canceled.is_set()
    with pytest.raises(ApiError) as refused:
        client.cancel(str(uuid.uuid4()))
    assert (refused.value.status, refused.value.error.code) == (404, ErrorCode.NOT_FOUND)


@pytest.mark.spec("HP-CTL-2")
def test_a_drain_and_a_reload(client: Client, service: ContractService) -> None:
    """Both send the contract's body and give the pool's health, typed."""
    drained = client.drain_pool("default", 5000)
    assert (drained.draining, drained.replicas[0].vram_reserved_bytes) == (True, 1536 << 20)
    assert client.reload_pool("default", "builtin:next").last_reload == "waiting for 1 task"
    bodies = {seen.path: seen.body for seen in service.seen}
    assert bodies == {
        "/v1/pools/default/drain": {"deadline_ms": 5000},
        "/v1/pools/default/reload": {"new_model_ref": "builtin:next"},
    }


def test_a_pool_is_watched(client: Client, waits: list[float]) -> None:
    """Each look comes half a second after the one before, and no look before a wait."""
    client.reload_pool("default", "builtin:next")
    words = [health.last_reload for health in islice(client.watch_pool("default"), 4)]
    assert words == [health["last_reload"] for health in RELOADS["builtin:next"][1:] if health] + ["done: it serves"]
    assert waits == [0.5] * 4


def test_a_drain_is_sent_again(client: Client, service: ContractService, waits: list[float]) -> None:
    """A drain whose answer got lost is repeated: the second one sets the same deadline anew."""
    service.refusals = [CUT_OFF]
    assert client.drain_pool("default", 0).draining == (DRAINS["default"][0] or {})["draining"]
    assert [seen.body for seen in service.seen] == [{"deadline_ms": 0}] * 2
    assert len(waits) == 1


def test_a_reload_that_may_have_begun_is_not_sent_again(
    client: Client, service: ContractService, waits: list[float]
) -> None:
    """A second reload would be in conflict with the first; one that was refused for now has not begun."""
    service.refusals = [CUT_OFF]
    with pytest.raises(UnreachableError, match="no answer"):
        client.reload_pool("default", "builtin:next")
    assert (len(service.seen), waits) == (1, [])
    service.refusals = [Refusal(503, BUSY)]
    client.reload_pool("default", "builtin:next")
    assert (len(service.seen), waits) == (3, [0.03])


def test_an_id_cannot_leave_its_place(client: Client, service: ContractService) -> None:
    """An id with slashes stays one segment of the path."""
    with pytest.raises(ApiError):
        client.get_task("../pools?x=#y")
    assert service.seen[-1].path == "/v1/tasks/..%2Fpools%3Fx%3D%23y"


@pytest.mark.spec("HP-SEC-2")
def test_correlation_id(client: Client, service: ContractService) -> None:
    """Every request of a client carries its correlation id."""
    _text(client, "hello")
    assert {seen.headers["x-correlation-id"] for seen in service.seen} == {client.correlation_id}


@pytest.mark.spec("HP-ERR-3")
@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({"Retry-After": "2", "X-Backoff-Ms": "1500"}, 1.5),
        ({"Retry-After": "2"}, 2.0),
        ({"Retry-After": "soon"}, 0.03),
        ({}, 0.03),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_the_wait_that_the_server_names_is_kept(
    client: Client, service: ContractService, waits: list[float], headers: dict[str, str], wait_s: float, status: int
) -> None:
    """A 429 or 503 is repeated after X-Backoff-Ms, else Retry-After, else the body's figure."""
    service.refusals = [Refusal(status, BUSY, headers)] * 2
    client.pools()
    assert waits == [wait_s, wait_s]


@pytest.mark.spec("HP-ERR-3", "HP-ADM-8")
def test_a_repeated_submission_is_the_same_task(client: Client, service: ContractService) -> None:
    """The task's id is chosen before the first attempt, so that a repeat cannot run twice."""
    service.refusals = [Refusal(503, BUSY)]
    client.submit(_request("hello"))
    bodies = [seen.body for seen in service.seen]
    assert len(bodies) == 2
    assert bodies[0] == bodies[1]
    assert bodies[0]["task_id"]


@pytest.mark.spec("HP-ERR-3")
def test_retries_are_bounded(client: Client, service: ContractService, waits: list[float]) -> None:
    """A service that stays busy is given up on, with its own error."""
    service.refusals = [Refusal(429, BUSY)] * 100
    with pytest.raises(ApiError) as refused:
        client.pools()
    assert refused.value.code == ErrorCode.ADMISSION_REJECT
    assert len(waits) == 7


@pytest.mark.spec("HP-ERR-3")
def test_waits_are_bounded(new_client: NewClient, service: ContractService, waits: list[float]) -> None:
    """A wait that would exceed the caller's limit is not begun; the random part alone is cut to what is left."""
    client = new_client(service.url, service.token, attempts_max=100, wait_max_s=0.1, dice=lambda: 0.999)
    service.refusals = [Refusal(429, BUSY)] * 100
    with pytest.raises(ApiError) as refused:
        client.pools()
    assert refused.value.retry_after_s == 0.03
    assert waits == [pytest.approx(0.0375, rel=0.01), pytest.approx(0.0375, rel=0.01)]
    waits.clear()
    service.refusals = [Refusal(429, BUSY, {"X-Backoff-Ms": "90"})]
    client.pools()
    assert waits == [0.1]


@pytest.mark.spec("HP-ERR-3")
@pytest.mark.parametrize("dice", [0.0, 0.5, 0.999])
def test_waits_are_spread(
    new_client: NewClient, service: ContractService, waits: list[float], closed_url: str, dice: float
) -> None:
    """A random part comes on top of what the service asks, and of what the client waits of its own; never below."""
    service.refusals = [Refusal(429, BUSY, {"X-Backoff-Ms": "1000"})]
    new_client(service.url, service.token, dice=lambda: dice).pools()
    with pytest.raises(UnreachableError):
        new_client(closed_url, "t", attempts_max=2, dice=lambda: dice).pools()
    assert waits == [pytest.approx(1 + dice / 4), pytest.approx(0.25 * (1 + dice / 4))]


@pytest.mark.spec("HP-ERR-3")
@pytest.mark.parametrize(
    "refusal",
    [
        Refusal(429, error("BUDGET_EXHAUSTED", retriable=False), {"Retry-After": "1"}),
        Refusal(429, BUSY, {"Retry-After": "3600"}),
        Refusal(400, error("INVALID_PARAMS")),
        Refusal(500, error("INTERNAL"), {"Retry-After": "1"}),
    ],
    ids=["cannot pass", "takes too long", "is the client's fault", "is a defect"],
)
def test_what_is_not_repeated(client: Client, service: ContractService, waits: list[float], refusal: Refusal) -> None:
    """A refusal that cannot pass, or not in time, is raised at once."""
    service.refusals = [refusal]
    with pytest.raises(ApiError) as refused:
        client.pools()
    assert refused.value.status == refusal.status
    assert waits == []


@pytest.mark.spec("HP-ERR-3")
def test_a_full_service_delays_a_stream(client: Client, service: ContractService, waits: list[float]) -> None:
    """A stream that is refused for now is opened later."""
    admission = client.submit(_request("hello"))
    service.refusals = [Refusal(503, error("REPLICA_EXHAUSTED", retriable=True), {"X-Backoff-Ms": "20"})]
    assert isinstance(list(client.stream(admission.task_id))[-1], EndFrame)
    assert waits == [0.02]


def test_foreign_failure(client: Client, service: ContractService) -> None:
    """A failure without our error body, as a proxy answers it, is still a typed one."""
    service.refusals = [Refusal(502, {"no": "error"})]
    with pytest.raises(ApiError) as refused:
        client.pools()
    assert f"is {service.url} the right address?" in refused.value.error.message
    assert refused.value.error.correlation_id == client.correlation_id


def test_foreign_answer(client: Client, service: ContractService) -> None:
    """An answer that is not the contract's is a failure that says so, not a crash."""
    service.refusals = [Refusal(200, {"what": "ever"})]
    with pytest.raises(UnreachableError, match="different versions"):
        client.pools()


@pytest.mark.spec("HP-SEC-7")
def test_is_there_keeps_the_token(client: Client, service: ContractService) -> None:
    """Whether a server is there is found out without showing the token to it."""
    assert client.is_there()
    assert "authorization" not in service.seen[-1].headers


def test_nothing_there(new_client: NewClient, closed_url: str, waits: list[float]) -> None:
    """A refused connection is told apart, and is not there; a client that need not wait says so at once."""
    client = new_client(closed_url, "t", waits_for_start=False)
    assert not client.is_there()
    with pytest.raises(UnreachableError) as refused:
        client.pools()
    assert refused.value.is_refused
    assert waits == []


def test_nothing_there_in_time(new_client: NewClient, closed_url: str, waits: list[float]) -> None:
    """A service that is to come is waited for, within the limits; each wait is twice the one before, up to 4 s."""
    with pytest.raises(UnreachableError) as refused:
        new_client(closed_url, "t").pools()
    assert refused.value.is_refused
    assert waits == [0.25, 0.5, 1.0, 2.0, 4.0, 4.0, 4.0]


@pytest.mark.spec("HP-ERR-3")
def test_a_service_that_restarts_is_waited_for(new_client: NewClient, waits: list[float]) -> None:
    """A refused connection is a restart where somebody was there before: the request is sent again, and answered. Even
    one that is otherwise sent only once, since nothing has happened."""
    is_away = iter([False, True, True, False])

    def answer(request: httpx.Request) -> httpx.Response:
        if next(is_away):
            raise httpx.ConnectError("refused", request=request)
        return httpx.Response(200, json=HEALTH)

    client = new_client("http://service", "t", waits_for_start=False, transport=httpx.MockTransport(answer))
    client.pool_health("default")
    assert client.reload_pool("default", "builtin:next").ready
    assert waits == [0.25, 0.5]


@pytest.mark.spec("HP-ERR-3", "HP-ADM-8")
def test_an_answer_that_got_lost_is_asked_for_again(client: Client, service: ContractService) -> None:
    """A submission whose connection broke is sent again under the same id, whether it came through or not."""
    service.refusals = [CUT_OFF]
    admission = client.submit(_request("hello"))
    bodies = [seen.body for seen in service.seen]
    assert [body["task_id"] for body in bodies] == [admission.task_id] * 2
    assert len(service.tasks) == 1


def test_silence_is_not_repeated(new_client: NewClient, waits: list[float]) -> None:
    """A server that takes the request and says nothing in time is not asked again."""

    def silence(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("nothing came", request=request)

    with pytest.raises(UnreachableError, match="no answer"):
        new_client("http://service", "t", transport=httpx.MockTransport(silence)).pools()
    assert waits == []


def test_a_whole_run(client: Client) -> None:
    """`run` gives the text and the last frame; a task that fails is an exception with its error and its text so far."""
    answer = client.run(_request("hello"))
    assert (answer.text, answer.end.seed) == ("Hello wörld", 7)
    with pytest.raises(TaskFailed, match="it is WORKER_RESET") as failed:
        client.run(_request("lost"))
    assert (failed.value.error.code, failed.value.text) == (ErrorCode.WORKER_RESET, "a")


@pytest.mark.spec("HP-STR-7")
def test_no_frame_comes_twice(new_client: NewClient) -> None:
    """What somebody in between replays is left out, and a reader that was cut off for its slowness goes on."""
    tokens = [f'id: {n}\nevent: token\ndata: {{"t":"{n}","i":{n}}}\n\n' for n in range(4)]
    cut = f"id: 1\nevent: error\ndata: {json.dumps(error('POLICY_DENIED', policy_label='slow-reader'))}\n\n"
    end = f"id: 4\nevent: end\ndata: {json.dumps(END)}\n\n"
    parts = iter([[*tokens[:2], cut], tokens[:3], [*tokens[1:], end]])
    asked: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers.get("Last-Event-ID"))
        return httpx.Response(200, text="".join(next(parts)))

    client = new_client("http://service", "t", transport=httpx.MockTransport(answer))
    frames = list(client.stream("0"))
    assert [frame.t for frame in frames if isinstance(frame, TokenFrame)] == ["0", "1", "2", "3"]
    assert isinstance(frames[-1], EndFrame)
    assert asked == [None, "1", "2"]


@pytest.mark.spec("HP-SEC-7")
def test_a_token_that_cannot_be_sent_is_not_shown(new_client: NewClient) -> None:
    """A token with a line end is refused, in words that do not have it."""
    with pytest.raises(ValueError, match="control characters") as refused:
        new_client("http://service", "secret\n")
    assert "secret" not in str(refused.value)


def test_both_clients_have_the_same_methods() -> None:
    """And the same parameters, so that one page describes both."""

    def surface(kind: type) -> dict[str, list[str]]:
        public = {name: value for name, value in vars(kind).items() if not name.startswith("_") and callable(value)}
        return {name: list(inspect.signature(value).parameters) for name, value in public.items()}

    assert surface(Client) == surface(AsyncClient)
    assert list(inspect.signature(Client).parameters) == list(inspect.signature(AsyncClient).parameters)


def test_no_proxy_for_loopback(
    new_client: NewClient, service: ContractService, closed_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy of the environment does not come between a program and its own machine."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, closed_url)
    assert new_client(service.url, service.token).pools().items


def test_reconnects_are_bounded(client: Client, waits: list[float]) -> None:
    """A stream that breaks again and again without a new frame is given up."""
    with pytest.raises(UnreachableError, match="could not be taken up"):
        _text(client, "gone")
    assert len(waits) == 7


def test_reconnects_to_a_server_that_went_are_bounded(
    new_client: NewClient, closed_url: str, waits: list[float]
) -> None:
    """Neither is a server that no longer listens asked for ever."""
    with pytest.raises(UnreachableError, match="nothing answers"):
        list(new_client(closed_url, "t").stream(str(uuid.uuid4())))
    assert len(waits) == 7
