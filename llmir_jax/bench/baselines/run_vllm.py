"""vLLM's CPU build, its engine in this process: bfloat16 or float32 weights from a Hugging Face directory.

It has no cache of prefixes here, as the others have none, and one step of it gives a token of every sequence.
"""

import os
import time
from collections.abc import Sequence
from typing import Any

import protocol

CACHE_GB = 4
MOST_SEQS = 256


class VLLM:
    """One engine, for one sequence and for batches."""

    def __init__(self, setup: dict[str, Any]) -> None:
        cores = sorted(os.sched_getaffinity(0))[: setup["threads"]]
        os.environ |= {
            "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GB),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),  # else it keeps a core for its server
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "HF_HUB_OFFLINE": "1",
        }
        import vllm

        self._vllm = vllm
        self._engine = vllm.LLM(
            setup["model"],
            dtype=setup["format"],
            max_model_len=setup["max_len"],
            max_num_seqs=MOST_SEQS,
            enable_prefix_caching=False,
            disable_log_stats=True,
        ).llm_engine
        self.about = {"version": f"vLLM {vllm.__version__}", "format": setup["format"]}
        self._requests = 0

    def _add(self, prompt: Sequence[int], num_tokens: int) -> str:
        self._requests += 1
        params = self._vllm.SamplingParams(
            temperature=0.0, max_tokens=num_tokens, min_tokens=num_tokens, ignore_eos=True, detokenize=False
        )
        name = str(self._requests)
        self._engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)
        return name

    def _step(self, counts: dict[str, int]) -> None:
        """How many new tokens each request has had so far."""
        for output in self._engine.step():
            counts[output.request_id] = len(output.outputs[0].token_ids)

    def token_times(self, prompt: Sequence[int], num_tokens: int) -> list[float]:
        start, times = time.perf_counter(), list[float]()
        name = self._add(prompt, num_tokens)
        counts = {name: 0}
        while self._engine.has_unfinished_requests():
            self._step(counts)
            times += [time.perf_counter() - start] * (counts[name] - len(times))
        return times

    def batch(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> tuple[int, float]:
        if len(prompts) > MOST_SEQS:
            raise RuntimeError(f"at most {MOST_SEQS} sequences, got {len(prompts)}")
        counts = {self._add(prompt, num_tokens + 1): 0 for prompt in prompts}
        while min(counts.values()) == 0:
            self._step(counts)
        before, start = sum(counts.values()), time.perf_counter()
        while self._engine.has_unfinished_requests():
            self._step(counts)
        return sum(counts.values()) - before, time.perf_counter() - start


if __name__ == "__main__":
    protocol.serve(VLLM)
