"""Hosts llama.cpp's own HTTP server, through xllamacpp, on a Unix socket.

Everything that can change the bytes of an answer is pinned here rather than left to a default: batch sizes, separate KV
per slot, no automatic fitting. Flash attention stays automatic: it follows from the model and the device.
"""

from __future__ import annotations

import ctypes
from typing import Any

from llama_orch.workers import lifeline

# Logits depend on how a prompt is cut into batches (17 of 64 streams differed between 64 and 512), so it is fixed. The
# server looks at cancels, and answers /slots, between batches: a whole one is as long as a cancel may take, and a CPU
# needs longer for it than a card.
BATCH_GPU = 512
BATCH_CPU = 128
ALL_LAYERS = 999
# Each open stream holds one HTTP thread; the rest answer /slots, /tokenize and /health meanwhile.
SPARE_HTTP_THREADS = 6
# The lowest level that still prints what was allocated. It prints no prompts (measured with build 11549).
LOG_VERBOSITY = 4


def main(line: lifeline.Lifeline) -> object:
    """Load the model and serve. Returns the server, which ends when it is collected."""
    import xllamacpp

    configuration = line.configuration
    if configuration["gpu"] and not _has_gpu(xllamacpp):
        raise RuntimeError("the installed xllamacpp has no GPU backend, or sees no GPU; install its CUDA wheel")
    try:
        server = xllamacpp.Server(parameters(xllamacpp, configuration))
    except RuntimeError:
        _flush_log(xllamacpp)
        raise
    line.ready(engine_version=_version(xllamacpp), address=server.listening_address)
    return server


def purpose(configuration: dict[str, Any]) -> str:
    """What the model is served for: completion (also where nothing is said), embedding or rerank."""
    return str(configuration.get("purpose", "completion"))


def batch_size(configuration: dict[str, Any]) -> int:
    """Tokens of a prompt that are evaluated at once. What embeds or ranks reads an input as a whole."""
    if purpose(configuration) != "completion":
        return int(configuration["ctx"])
    return BATCH_GPU if configuration["gpu"] else BATCH_CPU


def parameters(xllamacpp: Any, configuration: dict[str, Any]) -> Any:
    """llama.cpp's parameters for our configuration line."""
    slots = configuration["slots"]
    settings = {
        "hostnames": [configuration["socket_path"]],
        "api_keys": [configuration["api_key"]],
        "n_parallel": slots,
        "n_ctx": slots * configuration["ctx"],
        "kv_unified": False,
        "n_batch": batch_size(configuration),
        "n_ubatch": batch_size(configuration),
        "n_gpu_layers": ALL_LAYERS if configuration["gpu"] else 0,
        "n_threads_http": slots + SPARE_HTTP_THREADS,
        "cache_ram_mib": configuration["cache_ram_mib"],
        "cache_idle_slots": False,
        "slot_save_path": configuration["slot_save_path"],
        "endpoint_slots": True,
        "endpoint_metrics": True,
        "endpoint_props": False,
        "ui": False,
        "ui_mcp_proxy": False,
        "server_tools": [],
        "offline": True,
        "fit_params": False,
        "warmup": configuration["gpu"],
        "verbosity": LOG_VERBOSITY,
    }
    params = xllamacpp.CommonParams()
    params.model.path = configuration["model_path"]
    params.cpuparams.n_threads = configuration["threads"]
    params.cpuparams_batch.n_threads = configuration["threads"]
    if configuration["tensor_split"]:
        split = list(configuration["tensor_split"])
        settings["tensor_split"] = split + [0.0] * (len(params.tensor_split) - len(split))
    if purpose(configuration) != "completion":
        settings |= {"embedding": True, "cache_prompt": False}
    if purpose(configuration) == "rerank":
        settings["pooling_type"] = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_RANK
    for name, value in settings.items():
        setattr(params, name, value)
    return params


def _flush_log(xllamacpp: Any) -> None:
    """Let llama.cpp say why the load failed: it logs on a thread of its own, which would leave with this process."""
    try:
        library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
        log, flush = library["_Z15common_log_mainv"], library["_Z16common_log_flushP10common_log"]
    except (OSError, AttributeError):  # another build: then the reason may be lost
        return
    log.restype, flush.argtypes, flush.restype = ctypes.c_void_p, [ctypes.c_void_p], None
    flush(log())


def _has_gpu(xllamacpp: Any) -> bool:
    return any("TYPE_GPU" in str(device["type"]) for device in xllamacpp.get_device_info())


def _version(xllamacpp: Any) -> str:
    build = xllamacpp.BUILD_INFO
    known = f"+b{build['build_number']}.{build['commit']}" if build.get("build_number") else ""
    return f"{xllamacpp.__version__}{known}"


if __name__ == "__main__":
    lifeline.run(main)
