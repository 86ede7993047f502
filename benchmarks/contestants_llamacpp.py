"""llama.cpp, through the C interface that llama-cpp-python binds."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import llama_cpp as c
import numpy as np

from contestants import ROOM, Throughput

GGUF = "model.gguf"
"""The model's file in its directory."""
_BATCH = 2048  # llama.cpp's default, as its micro-batch of 512
_KV_TYPES = {"f16": c.GGML_TYPE_F16, "q8_0": c.GGML_TYPE_Q8_0, "q4_0": c.GGML_TYPE_Q4_0}


_WARNING = 3  # llama.cpp's level of a message; below it lie pages of information


@c.llama_log_callback
def _log(level: int, text: bytes, _data: object) -> None:
    if level >= _WARNING:
        sys.stderr.write(text.decode(errors="replace"))


class LlamaCpp:
    """bf16 weights, greedy. Its context is made anew for each prompt, before the clock starts, and
    holds the prompt and `ROOM` tokens more.

    Args:
        directory: where the model's GGUF file lies.
        threads: it computes with.
        kv: the type of cached keys and values: "f16", "q8_0" or "q4_0". The last two need `flash`.
        flash: whether flash attention is on.

    Raises:
        RuntimeError: llama.cpp cannot load the file.
    """

    def __init__(self, directory: Path, threads: int, kv: str = "f16", flash: bool = False) -> None:
        self._threads, self._kv, self._flash = threads, kv, flash
        c.llama_log_set(_log, ctypes.c_void_p())
        c.llama_backend_init()
        self._model = c.llama_model_load_from_file(
            str(directory / GGUF).encode(), c.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {directory / GGUF}")
        self._vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self._model))
        self._context: c.llama_context_p | None = None
        self._next = 0

    def prefill(self, prompt: Sequence[int]) -> float:
        """As `Contestant.prefill`."""
        self._open(n_tokens=len(prompt) + ROOM)
        tokens = (ctypes.c_int32 * len(prompt))(*prompt)
        start = time.perf_counter()
        for first in range(0, len(prompt), _BATCH):
            size = min(_BATCH, len(prompt) - first)
            part = ctypes.cast(ctypes.byref(tokens, 4 * first), ctypes.POINTER(ctypes.c_int32))
            self._run(c.llama_batch_get_one(part, size))
        self._next = self._most_likely(-1)
        return time.perf_counter() - start

    def decode(self, n_tokens: int) -> float:
        """As `Contestant.decode`."""
        token = ctypes.c_int32()
        start = time.perf_counter()
        for _ in range(n_tokens):
            token.value = self._next
            self._run(c.llama_batch_get_one(ctypes.pointer(token), 1))
            self._next = self._most_likely(-1)
        return (time.perf_counter() - start) / n_tokens

    @property
    def kv_bytes(self) -> int:
        """Bytes of the sequence's state, as it would be saved: keys and values of its tokens, and
        some bytes of positions."""
        return int(c.llama_state_seq_get_size(self._context, 0))

    def answer(self, prompts: Sequence[Sequence[int]], n_tokens: int) -> Throughput:
        """As `Crowd.answer`: each sequence has a part of the context to itself; prompts are
        computed one after the other, then all sequences decode in one batch."""
        longest = max(map(len, prompts))
        self._open(n_tokens=len(prompts) * (longest + n_tokens), sequences=len(prompts))
        batch = c.llama_batch_init(_BATCH, 0, 1)
        try:
            return self._answer(batch, prompts, n_tokens)
        finally:
            c.llama_batch_free(batch)

    def _answer(
        self, batch: c.llama_batch, prompts: Sequence[Sequence[int]], n_tokens: int
    ) -> Throughput:
        latest = []
        start = time.perf_counter()
        for sequence, prompt in enumerate(prompts):
            for first in range(0, len(prompt), _BATCH):
                part = prompt[first : first + _BATCH]
                rows = [(token, first + i, sequence) for i, token in enumerate(part)]
                self._run(_filled(batch, rows, wanted=[len(rows) - 1]))
            latest.append(self._most_likely(-1))
        begin = time.perf_counter()
        everyone = range(len(prompts))
        for step in range(n_tokens - 1):
            rows = [(latest[s], len(prompts[s]) + step, s) for s in everyone]
            self._run(_filled(batch, rows, wanted=everyone))
            latest = [self._most_likely(s) for s in everyone]
        end = time.perf_counter()
        return Throughput(
            tokens_per_s=len(prompts) * n_tokens / (end - start),
            decode_tokens_per_s=len(prompts) * (n_tokens - 1) / (end - begin),
        )

    def _open(self, n_tokens: int, sequences: int = 1) -> None:
        """Make a context of so many tokens in the place of the one before."""
        if self._context is not None:
            c.llama_free(self._context)
        params = c.llama_context_default_params()
        params.n_ctx = n_tokens
        params.n_batch = _BATCH
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = self._threads
        params.type_k = params.type_v = _KV_TYPES[self._kv]
        params.flash_attn_type = (
            c.LLAMA_FLASH_ATTN_TYPE_ENABLED if self._flash else c.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self._context = c.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context of {n_tokens} tokens, {self._kv} KV")

    def _run(self, batch: c.llama_batch) -> None:
        status = c.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")

    def _most_likely(self, row: int) -> int:
        logits = c.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self._vocab,)).argmax())


def _filled(
    batch: c.llama_batch, rows: Sequence[tuple[int, int, int]], wanted: Sequence[int]
) -> c.llama_batch:
    """The batch with rows of (token, position, sequence), logits of some of them wanted."""
    batch.n_tokens = len(rows)
    for i, (token, position, sequence) in enumerate(rows):
        batch.token[i] = token
        batch.pos[i] = position
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = sequence
        batch.logits[i] = 0
    for i in wanted:
        batch.logits[i] = 1
    return batch
