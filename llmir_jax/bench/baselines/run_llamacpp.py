"""llama.cpp through its Python bindings: the GGUF file itself, or quantized again to another of llama.cpp's formats.

A file that is in that format already, as its metadata has it, is taken as it is.
"""

import ctypes
import os
import time
from collections.abc import Sequence
from typing import Any

import protocol

TOKENS_A_CALL = 512
FORMATS = {"q4_0": 2, "q4_1": 3, "q8_0": 7}  # enum llama_ftype


class LlamaCpp:
    """One sequence in one context; a batch in a context of its own, with a sequence for each of its rows."""

    def __init__(self, setup: dict[str, Any]) -> None:
        import llama_cpp

        self._lib = llama_cpp
        llama_cpp.llama_backend_init()
        self._threads = setup["threads"]
        self._max_len = setup["max_len"]
        self.about = {"version": f"llama-cpp-python {llama_cpp.__version__}", "format": setup["format"]}
        is_file = setup["format"] == "file" or FORMATS[setup["format"]] == self._file_type(setup["model"])
        path = setup["model"] if is_file else self._quantized(setup)
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise protocol.Unable(f"llama.cpp cannot load {path}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._context: Any = None
        self._rows = llama_cpp.llama_batch_init(TOKENS_A_CALL, 0, 1)

    def _file_type(self, path: str) -> int | None:
        """enum llama_ftype of a file, None where it does not say."""
        params = self._lib.llama_model_default_params()
        params.vocab_only = True
        model = self._lib.llama_model_load_from_file(path.encode(), params)
        if not model:
            raise protocol.Unable(f"llama.cpp cannot load {path}")
        text = ctypes.create_string_buffer(32)
        length = self._lib.llama_model_meta_val_str(model, b"general.file_type", text, len(text))
        self._lib.llama_model_free(model)
        return int(text.value) if length > 0 else None

    def _quantized(self, setup: dict[str, Any]) -> str:
        name = setup["format"]
        path = os.path.join(setup["cache"], f"{name}.gguf")
        if not os.path.exists(path):
            params = self._lib.llama_model_quantize_default_params()
            params.ftype, params.allow_requantize, params.nthread = FORMATS[name], True, self._threads
            os.makedirs(setup["cache"], exist_ok=True)
            scratch = f"{path}.{os.getpid()}"
            source, target = setup["model"].encode(), scratch.encode()
            if self._lib.llama_model_quantize(source, target, ctypes.byref(params)):
                raise protocol.Unable(f"llama.cpp cannot quantize {setup['model']} to {name}")
            os.replace(scratch, path)
        return path

    def _open(self, num_seqs: int, length: int) -> Any:
        if self._context is not None:
            self._lib.llama_free(self._context)
        params = self._lib.llama_context_default_params()
        # Its cells come in multiples of 256, of which each sequence has its share.
        params.n_ctx = num_seqs * -(-length // 256) * 256
        params.n_batch, params.n_ubatch, params.n_seq_max = TOKENS_A_CALL, TOKENS_A_CALL, num_seqs
        params.n_threads = params.n_threads_batch = self._threads
        self._context, self._shape = self._lib.llama_init_from_model(self._model, params), (num_seqs, length)
        if not self._context:
            raise RuntimeError("llama.cpp made no context")

    def _likeliest(self, row: int) -> int:
        import numpy as np

        logits = self._lib.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())

    def _feed(self, ids: Sequence[int]) -> int:
        for begin in range(0, len(ids), TOKENS_A_CALL):
            part = ids[begin : begin + TOKENS_A_CALL]
            array = (self._lib.llama_token * len(part))(*part)
            if self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(array, len(part))):
                raise RuntimeError("llama_decode failed")
        return self._likeliest(-1)

    def token_times(self, prompt: Sequence[int], num_tokens: int) -> list[float]:
        if self._context is None or self._shape != (1, self._max_len):
            self._open(1, self._max_len)
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        times: list[float] = protocol.timed_loop(
            lambda: self._feed(prompt), lambda token: self._feed([token]), num_tokens
        )
        return times

    def batch(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> tuple[int, float]:
        if len(prompts) > TOKENS_A_CALL:
            raise RuntimeError(f"at most {TOKENS_A_CALL} sequences, got {len(prompts)}")
        wanted = len(prompts), len(prompts[0]) + num_tokens + 1
        if self._context is None or self._shape != wanted:
            self._open(*wanted)
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        for position, column in enumerate(zip(*prompts, strict=True)):
            tokens = self._step(column, position)
        start = time.perf_counter()
        for i in range(num_tokens):
            tokens = self._step(tokens, len(prompts[0]) + i)
        return len(prompts) * num_tokens, time.perf_counter() - start

    def _step(self, tokens: Sequence[int], position: int) -> list[int]:
        """The next token of each sequence, all at the same position."""
        self._rows.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            self._rows.token[i], self._rows.pos[i], self._rows.logits[i] = token, position, 1
            self._rows.n_seq_id[i], self._rows.seq_id[i][0] = 1, i
        if self._lib.llama_decode(self._context, self._rows):
            raise RuntimeError("llama_decode failed")
        return [self._likeliest(i) for i in range(len(tokens))]


if __name__ == "__main__":
    protocol.serve(LlamaCpp)
