"""A model behind Ray Serve, speaking OpenAI's API: each replica hosts llama.cpp's own server and hands requests on.

    serve run app:build                                  the model that llama-orch ships, two replicas
    serve run app:build model=/models/x.gguf replicas=4

It stands for whatever you run there in earnest: Ray Serve LLM (see README.md) speaks the same API, and llama-orch does
not tell them apart.
"""

import os
from collections.abc import AsyncIterator
from typing import Any

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray.serve import Application

from ray import serve

NAME = "tiny"
SLOTS = 2  # sequences that a replica decodes at a time
CTX = 1024  # tokens for each of them
# Serve copies the application where the class is decorated: what its routes use stands above, and their annotations are
# read at run time (no `from __future__ import annotations` here).
api = FastAPI()


async def _body(answer: httpx.Response) -> AsyncIterator[bytes]:
    """As it comes; who goes away closes the request that is behind it."""
    try:
        async for piece in answer.aiter_bytes():
            yield piece
    finally:
        await answer.aclose()


# Beyond what its replicas take at a time, and some more that wait for one, Serve answers 503; llama-orch waits
# then, with the task on its slot, and passes the pressure on (docs/remote-engines.md).
@serve.deployment(
    max_ongoing_requests=SLOTS,
    max_queued_requests=4 * SLOTS,
    ray_actor_options={"num_cpus": 0.5},
    health_check_period_s=1,
)
@serve.ingress(api)
class Model:
    def __init__(self, path: str) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.hostnames, params.port = path, ["127.0.0.1"], 0
        params.n_parallel, params.n_ctx = SLOTS, SLOTS * CTX
        params.ui = params.warmup = params.fit_params = False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        self._server = xllamacpp.Server(params)
        self._client = httpx.AsyncClient(base_url=self._server.listening_address, timeout=None, trust_env=False)

    @api.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        model = {"id": NAME, "object": "model", "created": 0, "owned_by": "ray", "max_model_len": CTX}
        return {"object": "list", "data": [model]}

    @api.get("/replica")
    async def replica(self) -> dict[str, int]:
        """Which process answers: for whoever wants to kill one."""
        return {"pid": os.getpid()}

    @api.post("/v1/chat/completions")
    async def chat(self, request: Request) -> Response:
        return await self._passed_on("/v1/chat/completions", request)

    @api.post("/v1/completions")
    async def completion(self, request: Request) -> Response:
        return await self._passed_on("/v1/completions", request)

    async def _passed_on(self, path: str, request: Request) -> Response:
        asked = self._client.build_request("POST", path, content=await request.body())
        answer = await self._client.send(asked, stream=True)
        if answer.status_code != 200:
            await answer.aread()
            return JSONResponse(answer.json(), answer.status_code)
        return StreamingResponse(_body(answer), media_type=answer.headers["content-type"].partition(";")[0])


def build(args: dict[str, str]) -> Application:
    """`model`: path of a GGUF file that every node has; `replicas`: how many."""
    model = args.get("model") or _shipped()
    return Model.options(num_replicas=int(args.get("replicas", 2))).bind(model)


def _shipped() -> str:
    from importlib.resources import files

    return str(files("llama_orch") / "models" / "tiny.gguf")
