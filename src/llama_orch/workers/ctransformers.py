"""Hosts ctransformers 0.2.27 behind llama-server's dialect, around that release's faults.

Its tokenizer sizes its buffer in characters and overruns it: ours is called with a buffer of our own. Its generator
gives one seed to a sampler that reseeds for every token: ours derives a seed for each. It does not stop at the end of
the context and does not check token ids: ours does both. It knows no min_p, so that setting has no effect.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_orch.workers import dialect, lifeline

# A prefill chunk is also how long a cancel can wait. Fixed, because logits depend on how a prompt is cut.
_BATCH = 64
_PENALTY_TOKENS = 64
_GPU_LAYERS = 999
_MASK = (1 << 64) - 1


class CtransformersModel:
    """One loaded model with one sequence. Every call of the library is made under a lock, held for one call only, so
    that counting tokens waits for one chunk and not for a whole answer."""

    def __init__(self, configuration: dict[str, Any]) -> None:
        import ctransformers

        gpu = configuration["gpu"]
        self.build_info = f"ctransformers-{_version()}"
        self._lock = threading.Lock()
        self._llm = ctransformers.LLM(
            configuration["model_path"],
            "gguf",
            config=ctransformers.Config(
                context_length=configuration["ctx"],
                threads=configuration["threads"],
                batch_size=_BATCH,
                gpu_layers=_GPU_LAYERS if gpu else 0,
            ),
            lib="cuda" if gpu else instruction_set(Path("/proc/cpuinfo").read_text()),
        )
        self._template = configuration["chat_template"]
        self.n_ctx = int(self._llm.context_length)
        self._n_vocab = int(self._llm.vocab_size)
        self._n_exact = 0  # held tokens that were evaluated in whole batches from the first one on

    def tokenize(self, text: str, add_special: bool) -> list[int]:
        raw = text.encode()
        if b"\0" in raw:
            raise dialect.Refused("the text has a NUL character, which this engine cannot tokenize")
        buffer = (ctypes.c_int * (len(raw) + 8))()
        with self._lock:
            n_tokens = self._llm.ctransformers_llm_tokenize(raw, add_special, buffer)
        if n_tokens < 0:
            raise dialect.Refused("the text cannot be tokenized")
        return list(buffer[:n_tokens])

    def piece(self, token: int) -> bytes:
        with self._lock:
            return bytes(self._llm.ctransformers_llm_detokenize(token) or b"")

    def is_token(self, token: object) -> bool:
        return isinstance(token, int) and not isinstance(token, bool) and 0 <= token < self._n_vocab

    def is_end(self, token: int) -> bool:
        return bool(self._llm.is_eos_token(token))

    def reuse(self, tokens: list[int], is_exact: bool) -> int:
        held = self._llm._context
        most = min(len(tokens) - 1, self._n_exact if is_exact else len(held))
        n_same = next((i for i in range(most) if tokens[i] != held[i]), most)
        if is_exact:
            n_same -= n_same % _BATCH
        self._cut(n_same)
        return n_same

    def _cut(self, n_tokens: int) -> None:
        del self._llm._context[n_tokens:]
        self._n_exact = min(self._n_exact, n_tokens - n_tokens % _BATCH)

    def erase(self) -> int:
        n_held = len(self._llm._context)
        self._cut(0)
        return n_held

    def prefill(self, tokens: list[int]) -> Iterator[int]:
        for start in range(0, len(tokens), _BATCH):
            chunk = tokens[start : start + _BATCH]
            with self._lock:
                is_in_step = len(self._llm._context) == self._n_exact
                self._llm.eval(chunk, batch_size=_BATCH)
                if is_in_step and len(chunk) == _BATCH:
                    self._n_exact += _BATCH
            yield start + len(chunk)

    def sample(self, body: dialect.Body, index: int) -> int:
        temperature = float(body.get("temperature", 0.8))
        is_greedy = temperature <= 0
        with self._lock:
            return int(
                self._llm.sample(
                    temperature=1.0 if is_greedy else temperature,
                    # The library takes 0 for 1; in the contract it switches top-k off.
                    top_k=1 if is_greedy else int(body.get("top_k", 40)) or self._llm.vocab_size,
                    top_p=float(body.get("top_p", 0.95)),
                    repetition_penalty=float(body.get("repeat_penalty", 1.0)),
                    last_n_tokens=_PENALTY_TOKENS,
                    seed=token_seed(int(body.get("seed", 0)), index),
                )
            )

    def push(self, token: int) -> bool:
        if len(self._llm._context) >= self.n_ctx:
            return False
        with self._lock:
            self._llm.eval([token])
        return True

    def vector(self) -> list[float]:
        with self._lock:
            values = [float(value) for value in self._llm.embeddings]
        length = math.sqrt(sum(value * value for value in values))
        if not (math.isfinite(length) and length > 0):
            raise dialect.Refused("the model makes no numbers of this text")
        return [value / length for value in values]

    def apply_template(self, messages: list[dict[str, str]]) -> str:
        """Render the model's own template, in a sandbox: it comes out of a file that may be hostile."""
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if not self._template:
            raise dialect.Refused("the model has no chat template")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise_exception
        try:
            # No bos_token: tokenizing adds it.
            return environment.from_string(self._template).render(
                messages=messages, add_generation_prompt=True, bos_token="", eos_token="</s>"
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, ArithmeticError, RecursionError) as error:
            raise dialect.Refused(f"the chat template failed: {error}") from error


def token_seed(seed: int, index: int) -> int:
    """The sampler's seed for one token: splitmix64 of both, 31 bits wide, so never -1 (which is "random")."""
    z = (seed * 0x9E37_79B9_7F4A_7C15 + index * 0xBF58_476D_1CE4_E5B9 + 0x94D0_49BB_1331_11EB) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58_476D_1CE4_E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D0_49BB_1331_11EB) & _MASK
    return (z ^ (z >> 31)) & 0x7FFF_FFFF


def instruction_set(cpuinfo: str) -> str:
    """The library of the wheel that this CPU can run; it does not look for itself."""
    flags: set[str] = set()
    for line in cpuinfo.splitlines():
        if line.startswith("flags"):
            flags = set(line.partition(":")[2].split())
            break
    if {"avx2", "fma", "f16c"} <= flags:
        return "avx2"
    return "avx" if {"avx", "f16c"} <= flags else "basic"


def main(line: lifeline.Lifeline) -> object:
    """Load the model and serve. Returns the server."""
    configuration = line.configuration
    if configuration["slots"] != 1:
        raise ValueError("ctransformers runs one sequence at a time")
    model = CtransformersModel(configuration)
    server = dialect.serve(configuration["socket_path"], configuration["api_key"], model)
    line.ready(engine_version=_version())
    return server


def _version() -> str:
    from importlib.metadata import version

    return version("ctransformers")


def _raise_exception(message: str) -> None:
    raise ValueError(message)


if __name__ == "__main__":
    lifeline.run(main)
