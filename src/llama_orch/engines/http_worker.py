"""The Worker that both real engines share: a WorkerProcess that speaks llama-server's dialect, and its client.

Invariant: when `generate` has ended, in whatever way, the slot does not decode any more, or the process is being
killed. A cancel is not over when the connection is closed but when /slots says so.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from dataclasses import replace

from msgspec import structs

from llama_orch.engines import reading
from llama_orch.engines.base import (
    Chunk,
    Completion,
    EngineError,
    Job,
    JobRefused,
    LoadFailed,
    Message,
    Reading,
    ReadJob,
    ReplicaSpec,
    WorkerFacts,
    WorkerLost,
    load_failed,
)
from llama_orch.engines.client import (
    CompletionBody,
    CompletionEvent,
    CompletionStream,
    LlamaClient,
    Props,
    Timings,
    completion_body,
)
from llama_orch.engines.exact_prefix import ExactPrefixes, other_than
from llama_orch.engines.likelihoods import Likelihoods
from llama_orch.engines.process import STALL_TIMEOUT_S, WorkerProcess

_START_WAIT_S = 0.25
_LAST_WORDS_WAIT_S = 1.0
_POLL_FIRST_S = 0.001
_POLL_MAX_S = 0.05


class HttpWorker:
    """One running replica of llamacpp or ctransformers. `exact`: what keeps its prefixes where the engine itself cannot
    tell which of them leave an answer's bytes as they are; None: it can (`has_exact_cache`), or nobody can."""

    def __init__(
        self,
        process: WorkerProcess,
        client: LlamaClient,
        spec: ReplicaSpec,
        *,
        has_chat_template: bool,
        writes: bool = True,
        has_exact_cache: bool = False,
        exact: ExactPrefixes | None = None,
    ) -> None:
        self._process = process
        self._client = client
        self._spec = spec
        self._has_chat_template = has_chat_template
        self._writes = writes  # else it reads only, and keeps nothing between two jobs
        self._has_exact_cache = has_exact_cache
        self._exact = exact
        self._launched_at = asyncio.get_running_loop().time()

    async def ready(self) -> WorkerFacts:
        """See Worker.ready. Facts are what the engine granted, which may be another context than was asked for."""
        line = await self._process.ready()
        try:
            props = await self._props()
        except BaseException:
            await self._process.kill()
            raise
        return WorkerFacts(
            engine_version=line.engine_version,
            slots=props.total_slots,
            ctx=props.default_generation_settings.n_ctx,
            load_ms=round((asyncio.get_running_loop().time() - self._launched_at) * 1000),
            pid=self._process.pid,
            buffer_bytes=dict(self._process.log.buffer_bytes),
        )

    async def lost(self) -> str:
        return await self._process.lost()

    async def count_tokens(self, text: str) -> int:
        return await self._client.count_tokens(text)

    async def render_chat(self, messages: list[Message], tools: list[Message] | None = None) -> str:
        # llama.cpp would fall back to a template of its own that this model was never trained on.
        if not self._has_chat_template:
            raise JobRefused("the model has no chat template: send a prompt instead of messages")
        return await self._client.apply_template(messages, tools)

    async def evict(self, slot: int) -> None:
        if not 0 <= slot < self._spec.slots:
            raise JobRefused(f"there is no slot {slot}")
        if not self._writes:
            return
        if self._exact is not None:
            self._exact.forget(slot)
        await self._client.erase(slot)

    async def read(self, job: ReadJob) -> Reading:
        began = asyncio.get_running_loop().time()
        asking = asyncio.ensure_future(reading.read(self._client, job))
        try:
            found = await asyncio.shield(asking)
        except asyncio.CancelledError:
            await self._let_finish(asking, job)
            raise
        return replace(found, ms=(asyncio.get_running_loop().time() - began) * 1000)

    async def generate(self, job: Job) -> AsyncGenerator[Chunk | Completion, None]:
        body, tokens = await self._prepared(job)
        stream = self._client.complete(body, job.idle_timeout_s)
        last = CompletionEvent()
        likelihoods = Likelihoods(job.logprobs)
        try:
            async for batch in stream.batches():
                for event in batch:
                    new = event.tokens_predicted - last.tokens_predicted
                    if new < 0:
                        raise WorkerLost("the engine counts its tokens backwards")
                    if tokens is not None and new and self._exact is not None:
                        self._exact.keep(job.slot, tokens)
                        tokens = None
                    last = event
                    if event.content or new:
                        yield Chunk(event.content, new, likelihoods.of(event))
        except GeneratorExit:
            await self._cancel(stream, job)
            raise
        except asyncio.CancelledError:
            # The cancel itself must go on upwards; a worker that does not stop is killed, and `lost` tells.
            with suppress(WorkerLost):
                await self._cancel(stream, job)
            raise
        finally:
            stream.close()
        # Outside of the block above: who leaves after the last item has nothing to cancel.
        yield _completion(last)

    async def _prepared(self, job: Job) -> tuple[CompletionBody, list[int] | None]:
        """What to send, and the prompt's tokens where they will be worth remembering."""
        body = completion_body(job, self._spec.slots)
        if self._exact is not None:
            if job.kv_reuse == "exact":
                return await self._exactly(body, job, self._exact)
            self._exact.forget(job.slot)
        if job.kv_reuse == "exact":
            return structs.replace(body, cache_prompt=self._has_exact_cache, cache_exact=self._has_exact_cache), None
        return body, None

    async def _exactly(
        self, body: CompletionBody, job: Job, exact: ExactPrefixes
    ) -> tuple[CompletionBody, list[int] | None]:
        """llama.cpp takes over all that matches. So the slot is cut back first to the whole batches that may be, by a
        run over them and one token that does not belong there; the engine's own count says whether that went well."""
        tokens = await self._client.tokenize(job.prompt)
        reusable = exact.reusable(job.slot, tokens)
        exact.forget(job.slot)
        is_cut = False
        if reusable:
            cut = [*tokens[:reusable], other_than(tokens[reusable], tokens)]
            done = await self._run_to_its_end(structs.replace(body, prompt=cut, n_predict=1, cache_prompt=True), job)
            is_cut = done is not None and done.cache_n == reusable
        return structs.replace(body, prompt=tokens, cache_prompt=is_cut), tokens

    async def _run_to_its_end(self, body: CompletionBody, job: Job) -> Timings | None:
        stream = self._client.complete(body, job.idle_timeout_s)
        timings = None
        try:
            async for event in stream.events():
                timings = event.timings
        except asyncio.CancelledError:
            with suppress(WorkerLost):
                await self._cancel(stream, job)
            raise
        finally:
            stream.close()
        return timings

    async def stop(self, grace_s: float) -> None:
        await self._process.stop(grace_s)

    async def _let_finish(self, asking: asyncio.Future[Reading], job: ReadJob) -> None:
        """The slot is free once the engine has read the text; closing the connection would not tell."""
        try:
            _, late = await asyncio.wait((asking,), timeout=job.idle_timeout_s)
        except asyncio.CancelledError:
            late = {asking}
        if late:
            asking.cancel()
            self._process.kill_soon()
        elif not asking.cancelled():
            asking.exception()  # nobody is left to whom it matters

    async def _props(self) -> Props:
        try:
            return await self._client.props()
        except EngineError as error:
            why = f"the worker loaded the model but does not answer: {error}{await self._last_words()}"
            raise load_failed(why) from error

    async def _last_words(self) -> str:
        """What a worker that is dying says of it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_WAIT_S):
                return f"; {await self._process.lost()}"
        return ""

    async def _cancel(self, stream: CompletionStream, job: Job) -> None:
        """Close the stream and wait until the slot is free. The engine looks up between two batches of a prompt, which
        may take long: a worker is killed for going on only where silence would have ended it as well."""
        await stream.has_started(_START_WAIT_S)
        stream.close()
        try:
            async with asyncio.timeout(job.idle_timeout_s):
                await self._slot_is_free(job.slot)
        except TimeoutError as error:
            self._process.kill_soon()
            late = f"slot {job.slot} went on decoding for {job.idle_timeout_s:g} s after its cancel"
            raise WorkerLost(late) from error
        except (asyncio.CancelledError, WorkerLost):  # nobody knows whether it still decodes
            self._process.kill_soon()
            raise

    async def _slot_is_free(self, slot: int) -> None:
        pause_s = _POLL_FIRST_S
        while any(state.id == slot and state.is_processing for state in await self._client.slots()):
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, _POLL_MAX_S)


async def launch_worker(
    module: str,
    engine: str,
    spec: ReplicaSpec,
    *,
    has_chat_template: bool,
    writes: bool = True,
    settings: Mapping[str, object],
    has_exact_cache: bool = False,
    exact_batch: int | None = None,
    stall_timeout_s: float = STALL_TIMEOUT_S,
) -> HttpWorker:
    """Start workers/<module> for `spec`, with the engine's own `settings` beside those that every worker takes.
    `exact_batch`: tokens of a prompt that it evaluates at once, where its slots may be cut back to whole batches."""
    fields = {"engine": engine, "pool_id": spec.pool_id, "replica_id": spec.replica_id}
    try:
        process = WorkerProcess(f"llama_orch.workers.{module}", fields, stall_timeout_s)
    except OSError as error:
        raise LoadFailed(f"the worker has no folder to live in: {error.strerror or error}") from error
    socket_path = process.folder / "engine.sock"
    api_key = secrets.token_hex(32)
    configuration = {
        "model_path": str(spec.file.absolute()),
        "socket_path": str(socket_path),
        "api_key": api_key,
        "slots": spec.slots,
        "ctx": spec.ctx,
        "threads": spec.threads,
        "gpu": spec.backend == "cuda",
        "tensor_split": list(spec.tensor_split),
        "slot_save_path": f"{process.folder}/",
        **settings,
    }
    await process.start(configuration, spec.device_uuids, secret=api_key)
    return HttpWorker(
        process,
        LlamaClient(socket_path, api_key),
        spec,
        has_chat_template=has_chat_template,
        writes=writes,
        has_exact_cache=has_exact_cache,
        exact=None if exact_batch is None else ExactPrefixes(exact_batch),
    )


def _completion(event: CompletionEvent) -> Completion:
    timings = event.timings or Timings()
    return Completion(
        tokens_in=event.tokens_evaluated,
        tokens_out=event.tokens_predicted,
        tokens_cached=timings.cache_n,
        prefill_ms=timings.prompt_ms or 0.0,
        decode_ms=timings.predicted_ms or 0.0,
        finish_reason="length" if event.stop_type == "limit" else "stop",
    )
