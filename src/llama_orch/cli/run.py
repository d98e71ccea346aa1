"""`llama-orch run`: one task, its tokens on stdout as they come and everything else on stderr. `--repeat` asks again.

Invariant: the task does not outlive the command. Ctrl-C (at any moment), SIGTERM, a closed terminal and a closed stdout
cancel it; a server that was started for it ends with it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from llama_orch.cli.connection import answers_reported, client_token, connected, server_url
from llama_orch.cli.output import DONE, FAILED, INTERRUPTED, UsageError, command, note, silence_stdout
from llama_orch.contract.models import Determinism, Priority

if TYPE_CHECKING:
    from llama_orch.cli.run_output import Answer
    from llama_orch.cli.run_records import Record
    from llama_orch.client import Client
    from llama_orch.contract.models import TaskRequest

_BUILTIN_MODEL = "builtin:tiny"
_LOADING_WAIT_MAX_S = 600.0  # for a server of our own, whose model is still being read
_LOADING_ATTEMPTS_MAX = 1000
# A task whose submission was interrupted can reach the server after its cancellation: look again for a moment.
_CANCEL_ATTEMPTS, _CANCEL_WAIT_S = 5, 0.2


@command
def run(
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; - reads it from stdin, less one newline at its end.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="REF", help="Model reference; default: the first pool's model.")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="Engine; default: any that serves the model.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer; default: the pool's.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed; default: chosen and shown at the end.")] = None,
    priority: Annotated[Priority, typer.Option(help="Place in the queue.")] = Priority.INTERACTIVE,
    determinism: Annotated[
        Determinism | None,
        typer.Option(help="strict: the same bytes for the same request; the default wherever the engine can."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt as a chat message.")] = False,
    session: Annotated[str | None, typer.Option(metavar="UUID", help="Session of the task.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the frames as lines of JSON.")] = False,
    repeat: Annotated[
        str | None, typer.Option(metavar="TASK_ID", help="Run an earlier task again; exit code 1 if the bytes differ.")
    ] = None,
    record: Annotated[
        bool, typer.Option(envvar="LLORCH_RECORD", help="Keep the run in LLORCH_HOME/runs for --repeat.")
    ] = True,
) -> int:
    """Run a prompt. Without a server at hand, one runs for the length of the command."""
    if repeat is not None:
        return _repeat(context, repeat, as_json, record)
    if prompt is None:
        raise UsageError("give a prompt, or --repeat and the id of an earlier task")
    text = _prompt(prompt)
    fields: dict[str, Any] = {
        "task_id": str(uuid.uuid4()),
        "engine": engine,
        "max_tokens": max_tokens,
        "seed": seed,
        "priority": priority,
        "session_id": session,
    }
    fields |= {} if determinism is None else {"determinism": determinism}
    fields |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    _request(fields, model or _BUILTIN_MODEL)  # a usage error is one before a server is started
    with _signals_interrupt(), _service(os.environ) as client:
        request = _request(fields, model or _default_model(client, engine))
        code, answer = _run_task(client, request, as_json)
        if record:
            _keep(client, request, answer)
        return code


def _repeat(context: typer.Context, task_id: str, as_json: bool, record: bool) -> int:
    """Ask what an earlier run asked, and say whether the same came of it."""
    from llama_orch.cli.run_records import Records, compare
    from llama_orch.settings import Home

    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE" and name not in ("repeat", "as_json", "record"):
            raise UsageError(f"--repeat takes the request from its record; leave {name.replace('_', '-')} out")
    then = Records(Home.of(os.environ)).get(task_id)
    request = then.again(str(uuid.uuid4()))
    with _signals_interrupt(), _service(os.environ) as client:
        code, answer = _run_task(client, request, as_json)
        now = _record(client, request, answer)
        if record:
            _keep(client, request, answer, now)
    if code != DONE or now is None:
        return code
    return DONE if compare(then, now) else FAILED


def _record(client: Client, request: TaskRequest, answer: Answer) -> Record | None:
    """What is worth keeping of the run; None when it did not come to its end."""
    from llama_orch.cli.run_records import Record, figures_of
    from llama_orch.client import ApiError, UnreachableError

    if answer.end is None:
        return None
    profile = None
    with suppress(ApiError, UnreachableError):  # the answer is there, whatever becomes of the server
        profile = figures_of(client.capabilities().sampler_profiles, answer.end.sampler_profile_version)
    return Record(request=request, text="".join(answer.parts), end=answer.end, profile=profile)


def _keep(client: Client, request: TaskRequest, answer: Answer, record: Record | None = None) -> None:
    """For --repeat."""
    from llama_orch.cli.run_records import Records
    from llama_orch.settings import Home

    record = record or _record(client, request, answer)
    if record is not None and Records(Home.of(os.environ)).put(record):
        note(f"to repeat it: llama-orch run --repeat {request.task_id}")


def _prompt(argument: str) -> str:
    try:
        text = sys.stdin.buffer.read().decode().removesuffix("\n") if argument == "-" else argument
        text.encode()  # an argument that was not UTF-8 fails here
    except UnicodeError as error:
        raise UsageError("the prompt is not UTF-8 text") from error
    if not text:
        raise UsageError("the prompt is empty")
    return text


def _request(fields: dict[str, Any], model: str) -> TaskRequest:
    import msgspec

    from llama_orch.contract.models import TaskRequest

    try:
        return msgspec.convert(fields | {"model_ref": model}, TaskRequest)
    except msgspec.ValidationError as error:
        raise UsageError(f"the task would be refused: {error}") from error


def _default_model(client: Client, engine: str | None) -> str:
    models = (pool.model for pool in client.pools().items if engine in (None, pool.engine))
    return next(models, _BUILTIN_MODEL)


@contextmanager
def _service(env: Mapping[str, str]) -> Iterator[Client]:
    """The server that LLORCH_URL names or that listens at the default address, else one of our own."""
    from llama_orch.client import Client

    if not env.get("LLORCH_URL"):
        with answers_reported(), Client(server_url(env), token="") as probe:
            is_there = probe.is_there()
        if not is_there:
            with _own_service(env) as client:
                yield client
            return
    # A model that is loaded for this very task may take longer than a few attempts; the time is bounded all the same.
    with connected(env, attempts_max=_LOADING_ATTEMPTS_MAX) as client:
        yield client


@contextmanager
def _own_service(env: Mapping[str, str]) -> Iterator[Client]:
    from llama_orch.cli.own_server import StartError, own_server, serve_command
    from llama_orch.client import Client
    from llama_orch.settings import Home

    url, home = server_url(env), Home.of(env).create()
    token = client_token(url, env, create=True)
    note(f"no server at {url}: starting one for this command")
    try:
        with (
            own_server(serve_command(env.get("LLORCH_CONFIG")), env, home.path / "logs" / "run-server.log") as own_url,
            answers_reported(),
            Client(own_url, token, attempts_max=_LOADING_ATTEMPTS_MAX, wait_max_s=_LOADING_WAIT_MAX_S) as client,
        ):
            yield client
    except StartError as error:
        note(f"error: {error}")
        for line in error.log_tail:
            note(f"  {line}")
        raise typer.Exit(FAILED) from error


def _run_task(client: Client, request: TaskRequest, as_json: bool) -> tuple[int, Answer]:
    from llama_orch.cli.run_output import Answer, JsonFrames, Text
    from llama_orch.client import ApiError, UnreachableError

    assert request.task_id is not None
    is_admitted, answer = False, Answer()
    with closing(JsonFrames() if as_json else Text()) as output:
        try:
            admission = client.submit(request)
            is_admitted = True
            output.admitted(admission)
            with closing(client.stream(request.task_id)) as frames:
                for frame in frames:
                    answer.hear(frame)
                    output.show(frame)
            return output.code, answer
        except KeyboardInterrupt:
            output.close()
            _cancel(client, request.task_id, is_admitted)
            with suppress(OSError):  # the terminal may be gone
                note("interrupted: the task is canceled")
            return INTERRUPTED, answer
        except BrokenPipeError:
            silence_stdout()
            _cancel(client, request.task_id, is_admitted)
            return DONE, Answer()  # the reader has what it wanted
        except OSError:  # a full disk behind stdout, for example
            _cancel(client, request.task_id, is_admitted)
            raise
        except ApiError:
            if is_admitted:
                _cancel(client, request.task_id, is_admitted)
            raise
        except UnreachableError:
            if is_admitted:
                note(f"the task may go on: llama-orch tasks get {request.task_id}")
            raise


def _cancel(client: Client, task_id: str, is_admitted: bool) -> None:
    """Cancel as well as can be; the command is on its way out."""
    from llama_orch.client import ApiError, UnreachableError

    for _ in range(1 if is_admitted else _CANCEL_ATTEMPTS):
        with suppress(ApiError, UnreachableError):
            return client.cancel(task_id)
        time.sleep(_CANCEL_WAIT_S)


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM and a closed terminal end the command as Ctrl-C does. What was ignored (nohup) stays ignored."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    wanted = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in wanted if signal.getsignal(number) != signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, interrupt)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
