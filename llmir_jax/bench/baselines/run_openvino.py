"""OpenVINO GenAI on the CPU: weights in int4 (symmetric, groups of 64) or int8, exported by optimum once and kept.

One sequence goes through LLMPipeline, and its own clock is read; a batch through its continuous batching, step by step.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import protocol

GROUP_SIZE = 64
CACHE_GB = 4  # of a batch


class OpenVINO:
    """Pipelines are made when they are first used, and one is kept."""

    def __init__(self, setup: dict[str, Any]) -> None:
        import openvino
        import openvino_genai

        self._ov, self._genai = openvino, openvino_genai
        self._properties = {"INFERENCE_NUM_THREADS": setup["threads"]}
        self._folder = _exported(setup)
        self.about = {
            "version": f"openvino-genai {openvino_genai.__version__.split('-')[0]}",
            "format": setup["format"],
        }
        self._pipeline: Any = None
        self._num_seqs = 0

    def _config(self, num_tokens: int) -> Any:
        config = self._genai.GenerationConfig()
        config.do_sample, config.ignore_eos = False, True
        config.max_new_tokens = config.min_new_tokens = num_tokens
        return config

    def _tensor(self, ids: Sequence[int]) -> Any:
        import numpy as np

        return self._ov.Tensor(np.asarray([ids], np.int64))

    def token_times(self, prompt: Sequence[int], num_tokens: int) -> list[float]:
        if self._pipeline is None or self._num_seqs:
            self._pipeline, self._num_seqs = None, 0  # the old one goes before there is a new one
            self._pipeline = self._genai.LLMPipeline(self._folder, "CPU", **self._properties)
        metrics = self._pipeline.generate(self._tensor(prompt), self._config(num_tokens)).perf_metrics
        times = metrics.raw_metrics.m_new_token_times  # ms
        first = metrics.get_ttft().mean / 1e3
        return [first + (t - times[0]) / 1e3 for t in times]

    def batch(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> tuple[int, float]:
        if self._pipeline is None or self._num_seqs != len(prompts):
            scheduler = self._genai.SchedulerConfig()
            scheduler.cache_size, scheduler.max_num_batched_tokens = CACHE_GB, max(1024, len(prompts))
            scheduler.max_num_seqs = len(prompts)
            self._pipeline, self._num_seqs = None, len(prompts)
            self._pipeline = self._genai.ContinuousBatchingPipeline(self._folder, scheduler, "CPU", self._properties)
        pipeline, config = self._pipeline, self._config(num_tokens + 1)
        handles = [pipeline.add_request(i, self._tensor(prompt), config) for i, prompt in enumerate(prompts)]
        counts = [0] * len(handles)

        def step() -> None:
            pipeline.step()
            for i, handle in enumerate(handles):
                while handle.can_read():
                    counts[i] += sum(len(output.generated_ids) for output in handle.read().values())

        while min(counts) == 0:
            step()
        before, start = sum(counts), time.perf_counter()
        while pipeline.has_non_finished_requests():
            step()
        return sum(counts) - before, time.perf_counter() - start


def _exported(setup: dict[str, Any]) -> str:
    """The folder of the model in OpenVINO's format, made unless it is there."""
    folder = os.path.join(setup["cache"], f"openvino-{setup['format']}")
    if os.path.exists(folder):
        return folder
    import optimum.intel  # noqa: F401  # what is missing is said before it is needed

    os.makedirs(setup["cache"], exist_ok=True)
    with tempfile.TemporaryDirectory(dir=setup["cache"]) as scratch:
        out = os.path.join(scratch, "model")
        command = [
            sys.executable,
            "-m",
            "optimum.commands.optimum_cli",
            "export",
            "openvino",
            "--model",
            setup["model"],
        ]
        command += ["--task", "text-generation-with-past", "--weight-format", setup["format"], out]
        if setup["format"] == "int4":
            command += ["--sym", "--group-size", str(GROUP_SIZE), "--ratio", "1.0"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            lines = [line for line in result.stderr.splitlines() if line.strip()]
            raise protocol.Unable(f"optimum-cli export failed: {lines[-1].strip() if lines else 'no reason given'}")
        os.replace(out, folder)
    return folder


if __name__ == "__main__":
    protocol.serve(OpenVINO)
