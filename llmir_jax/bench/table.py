"""Results for people: a table in Markdown, and what bounds the decoder."""

from collections.abc import Iterator
from typing import Any

from llmir_jax.bench.run import OURS, Results

Row = tuple[str, tuple[str, ...], str]
"""What it is, where it is in the results, and its format."""

ROWS: tuple[Row, ...] = (
    ("decode, tokens/s", ("decode_tok_s",), ".1f"),
    ("decode after {context} tokens, tokens/s", ("context_decode_tok_s",), ".1f"),
    ("decode sampled, tokens/s", ("sampled_decode_tok_s",), ".1f"),
    ("prefill, tokens/s", ("prefill_tok_s",), ",.0f"),
    ("time to first token, ms", ("ttft_ms",), ".1f"),
    ("between tokens, ms: median", ("itl_ms", "p50"), ".2f"),
    ("between tokens, ms: 99 %", ("itl_ms", "p99"), ".2f"),
    ("until new tokens come, ms: 99 %", ("wait_ms", "p99"), ".2f"),
)
LAST_ROWS: tuple[Row, ...] = (
    ("peak memory, MB", ("peak_rss_mb",), ",.0f"),
    ("weights, MB", ("weights_mb",), ",.1f"),
    ("KV cache, MB", ("kv_cache_mb",), ",.1f"),
    ("start to first token, s: cold", ("startup", "cold", "command_s"), ".1f"),
    ("start to first token, s: warm", ("startup", "warm", "command_s"), ".1f"),
)


def render(results: Results) -> str:
    """The table; of a baseline also ours divided by theirs."""
    baselines = results.get("baselines", {})
    head = ["", OURS, *(name.replace(":", " ") for name in baselines)]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for label, path, spec in _rows(results):
        ours = _find(results, path)
        if ours is None:
            continue
        cells = [label.format(**results), format(ours, spec)]
        for theirs in baselines.values():
            value, ratio = _find(theirs, path), _find(theirs["ratio"], path)
            cells.append("" if value is None else f"{value:{spec}} ({ratio:.2f}×)")
        lines.append(cells)
    parts = ["\n".join(f"| {' | '.join(line)} |" for line in lines), caption(results)]
    if "sampled_ratio" in results:
        parts.append(f"Sampled decoding has {results['sampled_ratio']:.2f} of the greedy speed.")
    parts.append(f"{results['roofline'][0].upper()}{results['roofline'][1:]}.")
    parts += [_startup(name, results["startup"][name]) for name in results.get("startup", {})]
    return "\n\n".join(parts)


def caption(results: Results) -> str:
    """What the numbers are of."""
    weights = ", ".join(results["quantize"]) or results["dtype"]
    cache = f", {results['kv_cache']} cache" if results["kv_cache"] else ""
    times = f"; × is {OURS} divided by the other" if "baselines" in results else ""
    threads = "1 thread" if results["threads"] == 1 else f"{results['threads']} threads"
    rounds = "round" if results["repeats"] == 1 else "rounds"
    return (
        f"{results['model']} ({weights}{cache}) on {results['device']}, {threads}: {results['new']} "
        f"tokens after {results['prompt']}, prefill of {results['prefill']}; medians of {results['repeats']} {rounds}"
        f"{times}."
    )


def _rows(results: Results) -> Iterator[Row]:
    yield from ROWS
    for batch in results.get("batch_tok_s", {}):
        yield f"{batch} sequences at once, tokens/s", ("batch_tok_s", batch), ",.1f"
    yield from LAST_ROWS


def _find(results: Results, path: tuple[str, ...]) -> Any:
    """The number at a path; None if there is none."""
    value: Any = results
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _startup(name: str, parts: dict[str, float]) -> str:
    named = ", ".join(f"{part.removesuffix('_s').replace('_', '-')} {value:.1f}" for part, value in parts.items())
    return f"Start, {name}, in seconds: {named}."


def rounded(value: Any, digits: int = 6) -> Any:
    """With all floats at so many significant digits."""
    if isinstance(value, dict):
        return {name: rounded(each, digits) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each, digits) for each in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value
