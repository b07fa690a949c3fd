"""What is measured and how, for ours and for every baseline; and the baselines' side of the conversation with `bench`.

    decode_tok_s    `new` tokens after the first, divided by the seconds they took; one sequence, greedy
    prefill_tok_s   tokens of the prefill prompt, divided by the seconds until the token that follows it
    ttft_ms         from giving the prompt to having the first token
    itl_ms          between one token and the next: {"p50", "p99"}; those that come together share the time before them
    wait_ms         between tokens and the next ones that come, several or one: {"p50", "p99"}
    batch_tok_s     tokens of all sequences once each has its first one, divided by the seconds they took

Only the standard library is imported here, since a baseline's interpreter has none of what LLMIR needs. The scripts
beside this file import it by its bare name. Each gets one JSON object as its argument (the model, the number of
threads …), prints {"ready": true, …} when it is loaded, then answers each line of stdin with a line on stdout.
"""

import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

Message = dict[str, Any]


class Engine(Protocol):
    """A loaded model that can be timed."""

    @property
    def about(self) -> Message:
        """What measures: "version", and the "format" of the weights."""

    def token_times(self, prompt: Sequence[int], num_tokens: int) -> list[float]:
        """Seconds from giving the prompt to having each of `num_tokens` new tokens, greedy, whichever they are."""

    def batch(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> tuple[int, float]:
        """Greedy decoding of all at once, `num_tokens` each after their first ones.

        Returns how many tokens came after each sequence had its first one, and the seconds that they took.
        """


def measure(engine: Engine, request: Message) -> Message:
    """One round of what `request` asks for."""
    kind, new = request["measure"], request.get("new", 1)
    if kind == "first":
        return {"ttft_ms": 1e3 * engine.token_times(request["prompt"], 1)[0]}
    if kind == "batch":
        num_tokens, seconds = engine.batch(request["prompts"], new)
        return {"batch_tok_s": num_tokens / seconds}
    times = engine.token_times(request["prompt"], new + 1)
    found: Message = {"decode_tok_s": decode_speed(times)}
    found["prefill_tok_s"] = len(request["prefill"]) / engine.token_times(request["prefill"], 1)[0]
    found |= {"ttft_ms": 1e3 * times[0]} | between_tokens(times)
    if request.get("context"):
        found["context_decode_tok_s"] = decode_speed(engine.token_times(request["context"], new + 1))
    return found


def between_tokens(times: Sequence[float]) -> Message:
    """`itl_ms` and `wait_ms`."""
    arrivals = [(time, len(list(together))) for time, together in itertools.groupby(times)]
    waits = [1e3 * (after[0] - before[0]) for before, after in itertools.pairwise(arrivals)]
    shares = [wait / count for wait, (_, count) in zip(waits, arrivals[1:], strict=True) for _ in range(count)]
    return {
        name: {"p50": percentile(values, 50), "p99": percentile(values, 99)}
        for name, values in (("itl_ms", shares), ("wait_ms", waits))
    }


def decode_speed(times: Sequence[float]) -> float:
    """Tokens a second after the first one."""
    return (len(times) - 1) / (times[-1] - times[0])


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` % of all do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def peak_rss_mb() -> float:
    """The most memory that this process has had, in 10^6 bytes."""
    try:
        # What getrusage says begins with the parent's peak, where the process was forked from a large one.
        with open("/proc/self/status") as status:
            kib = next(line.split()[1] for line in status if line.startswith("VmHWM:"))
        return int(kib) * 1024 / 1e6
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def timed_loop(first: Callable[[], Any], step: Callable[[Any], Any], num_tokens: int) -> list[float]:
    """`token_times` of a program that is called once a token: `first()`, then `step(token)` of the last one."""
    start = time.perf_counter()
    token = first()
    times = [time.perf_counter() - start]
    while len(times) < num_tokens:
        token = step(token)
        times.append(time.perf_counter() - start)
    return times


def serve(make: Callable[[Message], Engine]) -> None:
    """Make the engine and answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print to stdout as they like

    def say(message: Message) -> None:
        print(json.dumps(message), file=answers, flush=True)

    try:
        engine = make(json.loads(sys.argv[1]))
    except ModuleNotFoundError as error:
        say({"missing": error.name})
        return
    except Unable as error:
        say({"error": str(error)})
        return
    say({"ready": True, **engine.about})
    for line in sys.stdin:
        say({**measure(engine, json.loads(line)), "peak_rss_mb": peak_rss_mb()})


class Unable(Exception):
    """This baseline cannot run the model; says why."""
