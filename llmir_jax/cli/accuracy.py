"""``llmir accuracy``: what quantization costs, measured against the plain forward in float32."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmir_jax.cli import options
from llmir_jax.errors import LlmirError, RequestError

if TYPE_CHECKING:
    from llmir_jax.accuracy import Accuracy, Case, Measurement, Sample
    from llmir_jax.load import Loaded

FLOAT = "float32"
KV_CACHE = "kv-"
ROUNDINGS = ("gptq", "mse", "percentile", "min-max")
"""Ways to round weights, of `llmir.Calibration`."""
SCHEMES = (
    FLOAT,
    *("int8", "int4", "w8a16", "w4a16", "w8a8"),
    *("int8-channel", "int4-g64", "int4-g32", "int4-g32-zp", "int4-g32-min"),
    *(f"{KV_CACHE}{name}" for name in ("int8", "int4", "float16")),
)
CALIBRATED = ("int4-g64+gptq", "int4-g64+mse", "int4-g32+gptq", "mixed-4.5", "int8-g32-a8-g32-static")
"""With a text: ways to round, mixed widths at the size of int4-g32, and static scales of activations."""
WINDOW = 512  # tokens


@click.command("accuracy", short_help="Measure what quantization costs.")
@click.argument("model")
@click.option("--text", type=options.FILE, metavar="FILE", help="Text to compare on.")
@click.option(
    "--tokens", type=options.COUNT, default=2048, show_default=True, metavar="N", help="The most tokens of the text."
)
@click.option("--window", type=options.COUNT, metavar="N", help="Tokens that see each other.  [default: 512]")
@click.option("--prompts", type=options.FILE, metavar="FILE", help="JSON of prompts and the outputs they should have.")
@click.option("--calibrate", type=options.FILE, metavar="FILE", help="Another text, for schemes that are calibrated.")
@click.option("--schemes", metavar="LIST", help="Names with commas between them; see above.")
@click.option("--json", "as_json", is_flag=True, help="All numbers as one JSON object.")
def accuracy_command(
    model: str,
    text: Path | None,
    tokens: int,
    window: int | None,
    prompts: Path | None,
    calibrate: Path | None,
    schemes: str | None,
    as_json: bool,
) -> None:
    """Compare decoders of MODEL with its plain forward in float32: a table of one line a scheme.

    On a text, on prompts, or on both: the KL divergence in nats a token, how often the likeliest token is the same, and
    perplexity. Of prompts, {"cases": [{"prompt_ids": […], "output_ids": […]}, …]}, also how many outputs are generated
    as they are there.

    A scheme is float32, one that --quantize takes, or kv-int8 or kv-int4 for a cache; "+" joins: int4+kv-int8. With
    --calibrate also int4-g64+gptq, +mse, +percentile or +min-max, which is how weights are rounded then, static scales
    of activations (…-a8-static), and mixed-4.5 for mixed widths of so many bits a weight.

    \b
    llmir accuracy smollm2-135m --text book.txt --schemes int8,int4,int4+kv-int8
    """
    if text is None and prompts is None:
        raise click.UsageError("nothing to compare on: give --text, --prompts or both")
    names = [*SCHEMES, *(CALIBRATED if calibrate else ())] if schemes is None else schemes.split(",")
    served = {name: parse_scheme_name(name, calibrate) for name in map(str.strip, names)}
    cases = _read_cases(prompts) if prompts else []
    content = options.read_text(text) if text else None
    with options.progress(f"loading {model}", *served) as advance:
        options.import_compiler()
        from llmir_jax.accuracy import Measurement

        loaded = options.load_model(model, FLOAT)
        _check_vocabulary(cases, loaded)
        samples = _samples(content, loaded, tokens=tokens, window=window) if content is not None else []
        measurement = Measurement(loaded=loaded, text=samples, cases=cases)
        rows = {}
        for name, how in served.items():
            advance()
            rows[name] = measurement.of(how)
    if as_json:
        files = {"text": text, "prompts": prompts, "calibrate": calibrate}
        about = {name: None if path is None else str(path) for name, path in files.items()}
        schemes_found = {name: _finite(asdict(row)) for name, row in rows.items()}
        print(json.dumps({"model": model, **about, "num_prompts": len(cases), "schemes": schemes_found}))
    else:
        click.echo(_table(rows, len(cases)))
        click.echo("\n" + _caption(model, measurement, text=text, prompts=prompts, calibrate=calibrate))


def parse_scheme_name(name: str, calibrate: Path | None) -> dict[str, Any]:
    """Options of the decoder that a name stands for. Raises click.UsageError."""
    served: dict[str, Any] = {"quantize": None}  # as floats, even if the checkpoint is quantized
    for part in name.split("+"):
        if part.startswith(KV_CACHE):
            key, value = "kv_cache", part.removeprefix(KV_CACHE)
            if value not in options.KV_CACHES:
                raise click.UsageError(f"--schemes: {part!r} is no cache: give kv-int8, kv-int4, kv-float16 …")
        elif part in ROUNDINGS:
            key, value = "rounding", part
        else:
            key, value = "scheme", part
        if key in served:
            raise click.UsageError(f"--schemes: {name!r} names two of a kind, {served[key]} and {value}")
        served[key] = value
    scheme, rounding = served.pop("scheme", FLOAT), served.pop("rounding", None)
    if rounding is not None and scheme == FLOAT:
        raise click.UsageError(f"--schemes: {name!r} has no weights to round: name a scheme too, such as int4-g64")
    if rounding is not None or scheme.endswith("-static") or options.MIXED.fullmatch(scheme):
        if calibrate is None:
            raise click.UsageError(f"--schemes: {name!r} needs --calibrate FILE")
        how = {} if rounding is None else {"weights": rounding}
        served["calibration"] = options.calibration(calibrate, **how)
    if scheme != FLOAT:
        served["quantize"] = options.parse_quantize([scheme], "--schemes")
    return served


def _read_cases(path: Path) -> "list[Case]":
    from llmir_jax.accuracy import Case

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        cases = [Case(prompt=case["prompt_ids"], output=case["output_ids"]) for case in content["cases"]]
        is_valid = bool(cases) and all(_are_ids(case.prompt) and _are_ids(case.output) for case in cases)
    except (ValueError, KeyError, TypeError):
        is_valid = False
    if not is_valid:
        raise RequestError(
            f'{path}: expected {{"cases": [{{"prompt_ids": [1, 2], "output_ids": [3]}}, …]}}, token ids in each list'
        )
    return cases


def _are_ids(ids: Any) -> bool:
    return isinstance(ids, list) and bool(ids) and all(type(token) is int and token >= 0 for token in ids)


def _check_vocabulary(cases: "Sequence[Case]", loaded: "Loaded") -> None:
    largest = max((max(*case.prompt, *case.output) for case in cases), default=0)
    if largest >= loaded.config.vocab_size:
        raise RequestError(
            f"--prompts has token id {largest}, which is not in the vocabulary of {loaded.name}: its ids go to "
            f"{loaded.config.vocab_size - 1}"
        )


def _samples(text: str, loaded: "Loaded", *, tokens: int, window: int | None) -> "list[Sample]":
    from llmir_jax.accuracy import samples_of_text

    if loaded.tokenizer is None:
        raise RequestError(f"{loaded.name} has no tokenizer, which --text needs: compare on --prompts")
    context = loaded.config.max_seq_len
    if window is not None and window > context:
        raise LlmirError(f"--window {window} is more than the {context} tokens of the model's context")
    return samples_of_text(
        loaded.tokenizer.encode(text), num_tokens=tokens, window=min(WINDOW, context) if window is None else window
    )


def _finite(value: Any) -> Any:
    """With None in place of infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(rows: "Mapping[str, Accuracy]", num_cases: int) -> str:
    """Markdown; columns for what was compared."""
    any_row = next(iter(rows.values()))
    head = ["scheme", "weights, MB", "bits a weight", "cache, bytes a token"]
    if any_row.text is not None:
        head += ["KL", "top-1, %", "perplexity"]
    if any_row.prompts is not None:
        head += ["prompts: KL", "top-1, %", "outputs identical"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, row in rows.items():
        cells = [f"`{name}`", f"{row.parameter_bytes / 1e6:.1f}", f"{row.bits_per_weight:.2f}"]
        cells.append(f"{row.cache_bytes_per_token:,.0f}")
        if row.text is not None:
            cells += [_kl(row.text.kl), f"{100 * row.text.top1:.1f}", f"{row.text.perplexity:.2f}"]
        if row.prompts is not None:
            cells += [_kl(row.prompts.kl), f"{100 * row.prompts.top1:.1f}", f"{row.identical} of {num_cases}"]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _kl(value: float) -> str:
    return f"{round(value, 5) + 0.0:.5f}"  # not -0.00000


def _caption(
    model: str, measurement: "Measurement", *, text: Path | None, prompts: Path | None, calibrate: Path | None
) -> str:
    """What the numbers are of."""
    import jax

    parts = []
    if text is not None:
        window = len(measurement.text[0].inputs)
        scored = sum(len(sample.inputs) for sample in measurement.text)
        parts.append(f"{scored:,} tokens of {text.name} in windows of {window}")
    if prompts is not None:
        outputs = sum(len(case.output) for case in measurement.cases)
        parts.append(f"the {len(measurement.cases)} outputs ({outputs:,} tokens) of {prompts.name}")
    calibrated = f", calibrated on {calibrate.name}" if calibrate is not None else ""
    return (
        f"{model} against its plain forward in float32: KL divergence in nats a token on {' and '.join(parts)}"
        f"{calibrated}. JAX {jax.__version__} on {jax.default_backend()}."
    )
