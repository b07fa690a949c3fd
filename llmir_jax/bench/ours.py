"""Our decoder as the thing that is timed."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmir_jax.bench.baselines import protocol
from llmir_jax.runtime.sampling import SamplingParams

if TYPE_CHECKING:
    from llmir_jax.decoder import Decoder

SAMPLED = {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.1}


class Ours:
    """A decoder, through the calls that a program serves with: with text, where there is a tokenizer."""

    def __init__(self, decoder: "Decoder") -> None:
        import jax

        self.decoder = decoder
        self.about: protocol.Message = {"version": f"JAX {jax.__version__}"}

    def token_times(self, prompt: Sequence[int], num_tokens: int, **sampling: Any) -> list[float]:
        """See `protocol.Engine`; with `sampling` the tokens are drawn."""
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, **sampling)
        times: list[float] = []
        start = time.perf_counter()
        for update in self.decoder.stream(prompt, params):
            times += [time.perf_counter() - start] * len(update.token_ids)
        return times

    def batch(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> tuple[int, float]:
        """See `protocol.Engine`."""
        engine = self.decoder.engine
        params = SamplingParams(max_tokens=num_tokens + 1, ignore_eos=True)
        counts = {engine.add_request(prompt, params): 0 for prompt in prompts}

        def step() -> None:
            for update in engine.step():
                counts[update.request_id] += len(update.token_ids)

        while min(counts.values()) == 0:
            step()
        before, start = sum(counts.values()), time.perf_counter()
        while engine.has_requests:
            step()
        return sum(counts.values()) - before, time.perf_counter() - start

    def measure(self, request: protocol.Message, *, sampled: bool) -> protocol.Message:
        """One round; of one sequence, `sampled` adds a round of drawn tokens."""
        found = protocol.measure(self, request)
        if sampled and request["measure"] == "single":
            times = self.token_times(request["prompt"], request["new"] + 1, seed=0, **SAMPLED)
            found["sampled_decode_tok_s"] = protocol.decode_speed(times)
        return found
