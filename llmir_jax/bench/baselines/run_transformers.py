"""Hugging Face transformers on PyTorch: its model, its dynamic cache, and a loop that takes the likeliest token."""

import time
from collections.abc import Sequence
from typing import Any

import protocol


class Transformers:
    """float32 or bfloat16 weights from a Hugging Face directory."""

    def __init__(self, setup: dict[str, Any]) -> None:
        import torch
        import transformers

        self._torch = torch
        torch.set_num_threads(setup["threads"])
        torch.set_grad_enabled(False)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            setup["model"], dtype=getattr(torch, setup["format"])
        ).eval()
        version = f"transformers {transformers.__version__}, PyTorch {torch.__version__}"
        self.about = {"version": version, "format": setup["format"]}
        self._cache: Any = None

    def _next(self, ids: Any) -> Any:
        """[batch, 1] after `ids` [batch, tokens] and what is cached."""
        out = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def token_times(self, prompt: Sequence[int], num_tokens: int) -> list[float]:
        self._cache, ids = None, self._torch.tensor([list(prompt)])
        times: list[float] = protocol.timed_loop(lambda: self._next(ids), self._next, num_tokens)
        return times

    def batch(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> tuple[int, float]:
        self._cache = None
        tokens = self._next(self._torch.tensor([list(prompt) for prompt in prompts]))
        start = time.perf_counter()
        for _ in range(num_tokens):
            tokens = self._next(tokens)
        return len(prompts) * num_tokens, time.perf_counter() - start


if __name__ == "__main__":
    protocol.serve(Transformers)
