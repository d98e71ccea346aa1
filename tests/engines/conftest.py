"""Fixtures of the engine tests: the packaged model, and a stand-in for the llama-server binary."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest

import llama_orch

# Real llama.cpp behind the flag names of the real binary: the release archives of llama-server are not on PyPI.
# A load waits while somebody has the lock of the file `<model>.gate`, and runs out of memory on the card whose UUID is
# in the file `<model>.full`.
_STAND_IN = """#!{python}
import argparse, fcntl, os, sys, threading
p = argparse.ArgumentParser()
for name in ("model", "host", "api-key-file", "slot-save-path", "fit", "tensor-split"):
    p.add_argument("--" + name)
for name in ("parallel", "ctx-size", "batch-size", "ubatch-size", "threads", "threads-batch", "threads-http"):
    p.add_argument("--" + name, type=int)
for name in ("n-gpu-layers", "cache-ram", "log-verbosity"):
    p.add_argument("--" + name, type=int)
for name in ("no-kv-unified", "slots", "metrics", "no-webui", "offline", "no-warmup", "version",
             "embeddings", "reranking", "no-cache-prompt"):
    p.add_argument("--" + name, action="store_true")
a = p.parse_args()
if a.version:
    print("version: 11549 (64fbe0f)")
    raise SystemExit
if os.path.exists(a.model + ".gate"):
    with open(a.model + ".gate") as gate:
        fcntl.flock(gate, fcntl.LOCK_SH)
if os.path.exists(a.model + ".full") and open(a.model + ".full").read() == os.environ["CUDA_VISIBLE_DEVICES"]:
    print("ggml_backend_cuda_buffer_type_alloc_buffer: cudaMalloc failed: out of memory", file=sys.stderr)
    raise SystemExit(1)
import xllamacpp
c = xllamacpp.CommonParams()
c.model.path, c.hostnames, c.api_keys = a.model, [a.host], [open(a.api_key_file).read().strip()]
c.n_parallel, c.n_ctx, c.n_batch, c.n_ubatch = a.parallel, a.ctx_size, a.batch_size, a.ubatch_size
c.cpuparams.n_threads, c.cpuparams_batch.n_threads, c.n_threads_http = a.threads, a.threads_batch, a.threads_http
c.n_gpu_layers, c.cache_ram_mib, c.slot_save_path = a.n_gpu_layers, a.cache_ram, a.slot_save_path
c.kv_unified, c.endpoint_slots, c.endpoint_metrics = not a.no_kv_unified, a.slots, a.metrics
c.ui, c.offline, c.warmup, c.fit_params, c.verbosity = not a.no_webui, a.offline, not a.no_warmup, a.fit != "off", 4
c.embedding, c.cache_prompt = a.embeddings or a.reranking, not a.no_cache_prompt
if a.reranking:
    c.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_RANK
server = xllamacpp.Server(c)
threading.Event().wait()
"""


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The model that comes with the package."""
    return Path(llama_orch.__file__).parent / "models" / "tiny.gguf"


def a_llama_server(folder: Path) -> Path:
    """An executable that takes llama-server's flags and is llama.cpp."""
    path = folder / "llama-server"
    path.write_text(_STAND_IN.format(python=sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def llama_server(tmp_path: Path) -> Path:
    """The same, one for each test."""
    return a_llama_server(tmp_path)
