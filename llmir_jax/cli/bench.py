"""``llmir bench``: how fast a model is served here, and beside other programs."""

import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmir_jax.checkpoint import smollm2
from llmir_jax.cli import options
from llmir_jax.errors import RequestError
from llmir_jax.threads import num_threads

if TYPE_CHECKING:
    from llmir_jax.bench.baseline import Choice, Model
    from llmir_jax.bench.workload import Workload
    from llmir_jax.decoder import Decoder
    from llmir_jax.load import Loaded

NARROW = re.compile(r"int4|w4|mixed")
"""Schemes to compare with a baseline's weights of 4 bits."""
SHAPES = ("llama-3.2-1b",)
BASELINES = ("jax", "llama.cpp", "openvino", "transformers", "vllm")
SHAPE_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
    *("rope_theta", "rms_norm_eps", "tie_embeddings"),
)


def _parse_batches(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    """Numbers of sequences with commas between them."""
    try:
        batches = () if value is None else tuple(int(text) for text in value.split(","))
    except ValueError:
        batches = (0,)
    if any(batch < 1 for batch in batches):
        raise click.BadParameter(f"{value!r} is not a list of numbers of sequences like 16,64")
    return tuple(dict.fromkeys(batches))


@click.command("bench", short_help="Measure how fast a model is served.")
@click.argument("model", required=False)
@click.option("--shape", type=click.Choice(SHAPES), help="In place of MODEL: its shapes, with random weights in Q4_0.")
@click.option(
    "--prompt", type=options.COUNT, default=16, show_default=True, metavar="N", help="Tokens before decoding."
)
@click.option("--new", type=options.COUNT, default=128, show_default=True, metavar="N", help="Tokens to decode.")
@click.option("--prefill", type=options.COUNT, default=512, show_default=True, metavar="N", help="Tokens to prefill.")
@click.option("--batch", "batches", callback=_parse_batches, metavar="N,…", help="Also N sequences at once.")
@click.option("--context", type=options.COUNT, metavar="N", help="Also decode after so many tokens.")
@click.option("--sampled", is_flag=True, help="Also decode by drawing: temperature 0.8, top-p 0.95, top-k 50, penalty.")
@click.option("--startup", is_flag=True, help="Also the time from `llmir generate` to its first token, in parts.")
@click.option(
    "--repeats", type=options.COUNT, default=3, show_default=True, metavar="N", help="Rounds to take medians of."
)
@options.quantization_options
@click.option(
    "--dtype", type=click.Choice(options.DTYPES), default="float32", show_default=True, help="Compute in this."
)
@click.option(
    "--page-size", type=options.COUNT, default=options.PAGE_SIZE, show_default=True, help="Tokens a page of KV cache."
)
@options.target_option
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    metavar="NAME[:FORMAT]",
    help="Compare with jax (float32, bfloat16: a loop by hand, random weights), llama.cpp (file, q4_0, q4_1, q8_0), "
    "openvino (int4, int8), transformers (float32, bfloat16) or vllm (bfloat16, float32). Beside 4 bits llama.cpp is "
    "q4_0 and openvino int4 unless said. May be given several times.",
)
@click.option(
    "--python",
    "pythons",
    multiple=True,
    metavar="[NAME=]PATH",
    help="The interpreter that has the baselines, or one of them.  [default: this one]",
)
@click.option("--json", "as_json", is_flag=True, help="All numbers as one JSON object.")
def bench_command(
    model: str | None,
    shape: str | None,
    prompt: int,
    new: int,
    prefill: int,
    batches: tuple[int, ...],
    context: int | None,
    sampled: bool,
    startup: bool,
    repeats: int,
    quantize: tuple[str, ...],
    calibrate: Path | None,
    kv_cache: str | None,
    dtype: str,
    page_size: int,
    target: str | None,
    baselines: tuple[str, ...],
    pythons: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure decoding, prefill, time to first token and memory of MODEL, smollm2-135m unless given.

    One sequence, greedy, prompts of random tokens, after a round that is not counted. Each baseline runs in a process
    of its own, in turn with ours: only one of them works at a time, all on the same number of cores
    (LLMIR_NUM_THREADS, or all). Decoders are not checked against their forward here, as --no-verify has it elsewhere.

    \b
    llmir bench -q int4
    llmir bench -q int4 --batch 16,64 --baseline llama.cpp:q4_0 --python .peers/llamacpp/bin/python
    llmir bench --shape llama-3.2-1b -q int4 --baseline llama.cpp
    llmir bench --json --baseline jax --startup
    """
    if model is not None and shape is not None:
        raise click.UsageError(f"MODEL {model!r} and --shape {shape} are two models: give one")
    model = model or shape or smollm2.NAME
    choices = parse_baselines(baselines, pythons, quantize)
    quantization = options.decoder_quantization(quantize, calibrate, kv_cache)
    from llmir_jax.bench.machine import limited_to
    from llmir_jax.bench.workload import Workload

    counts = {"prompt": prompt, "new": new, "prefill": prefill, "context": context, "repeats": repeats}
    workload = Workload(batches=batches, sampled=sampled, **counts)  # type: ignore[arg-type]
    threads = num_threads()
    with limited_to(threads), ExitStack() as stack:
        advance = stack.enter_context(options.progress(*_stages(model, workload, choices, startup=startup)))
        options.import_compiler()
        import jax

        from llmir_jax.bench.run import ratios, run
        from llmir_jax.bench.shapes import shape_file

        name = model if shape is None else str(shape_file(shape))
        loaded = options.load_model(name, dtype)
        _check_length(loaded, workload)
        files = _model_files(name, loaded) if choices else None
        running = {}
        setup = {"threads": threads, "max_len": -(-workload.longest // page_size) * page_size}
        for label, choice in choices.items():
            advance()
            from llmir_jax.bench.baseline import Baseline

            assert files is not None
            running[label] = stack.enter_context(Baseline(choice, files, **setup))

        def build(batch: int | None) -> "Decoder":
            length = workload.longest if batch is None else workload.prompt + workload.new + 1
            num_pages = -(-length // page_size)
            decoder: Decoder = loaded.decoder(
                max_seqs=batch or 1,
                num_pages=num_pages * (batch or 1),
                page_size=page_size,
                max_seq_len=length,
                verify=False,
                **options.target_choice(target),
                **quantization,
            )
            return decoder

        vocab_size = loaded.config.vocab_size
        found = run(workload, build, running, vocab_size=vocab_size, threads=threads, advance=advance)
        device = jax.default_backend()
        if startup:
            from llmir_jax.bench.startup import our_startup, their_startup

            for baseline in running.values():
                baseline.close()
            ids = workload.request(None, 0, vocab_size)["prompt"]
            others = {"dtype": dtype, "page_size": page_size, **options.target_choice(target)}
            arguments = _generate_arguments(name, ids, quantize, calibrate, kv_cache, **others)
            found["startup"] = our_startup(arguments, repeats, advance)
            for label, choice in choices.items():
                advance()
                assert files is not None
                theirs = {"warm": {"command_s": their_startup(choice, files, ids, repeats, **setup)}}
                found["baselines"][label]["startup"] = theirs
                found["baselines"][label]["ratio"]["startup"] = ratios(found["startup"], theirs)
    about: dict[str, Any] = {
        "model": model if shape is None else f"{model}, random weights",
        "quantize": list(quantize),
        "kv_cache": kv_cache,
        "dtype": dtype,
        "target": target,
    }
    about |= {"device": device, "threads": threads, **counts, "batch": list(batches)}
    from llmir_jax.bench.table import render, rounded

    click.echo(json.dumps(rounded(about | found)) if as_json else render(about | found))


def parse_baselines(
    baselines: Sequence[str], pythons: Sequence[str], quantize: Sequence[str]
) -> "Mapping[str, Choice]":
    """What to compare with, by label. Raises click.UsageError for names, formats and interpreters that are none."""
    if pythons and not baselines:
        raise click.UsageError("--python is for --baseline: add it")
    if not baselines:
        return {}
    from llmir_jax.bench.baseline import KINDS, Choice

    interpreters = _parse_pythons(pythons)
    choices = {}
    for text in baselines:
        name, _, form = text.partition(":")
        if name not in KINDS:
            raise click.UsageError(f"--baseline {text!r}: give one of {', '.join(BASELINES)}")
        kind = KINDS[name]
        if form and form not in kind.formats:
            raise click.UsageError(f"--baseline {text!r}: formats of {name} are {', '.join(kind.formats)}")
        is_narrow = any(NARROW.match(scheme.rpartition("=")[2]) for scheme in quantize)
        default = kind.quantized[0 if is_narrow else 1] if quantize else kind.formats[0]
        python = interpreters.get(name, interpreters[""])
        choice = Choice(name=name, format=form or default, python=python)
        choices[choice.label] = choice
    return choices


def _parse_pythons(values: Sequence[str]) -> dict[str, Path]:
    """Interpreters by name of baseline; "" for all that are not named."""
    found = {"": Path(sys.executable)}
    for value in values:
        name, is_named, path = value.partition("=")
        if not is_named or name not in BASELINES:
            name, path = "", value
        program = shutil.which(path)
        if program is None:
            raise click.UsageError(f"--python {value!r}: {path!r} is no program that can be run")
        found[name] = Path(program).absolute()
    return found


def _stages(model: str, workload: "Workload", choices: "Mapping[str, Choice]", *, startup: bool) -> list[str]:
    """What the progress bar says, one for each call of `advance` after the first."""
    names = [f"loading {model}", *(f"starting {label}" for label in choices)]
    for phase in workload.phases:
        names += ["deriving and compiling the decoder", *workload.stages(phase)]
    if startup:
        names += [f"starting, round {i + 1} of {workload.repeats}" for i in range(workload.repeats)]
        names += [f"starting {label}" for label in choices]
    return names


def _check_length(loaded: "Loaded", workload: "Workload") -> None:
    context = loaded.config.max_seq_len
    if workload.longest > context:
        raise RequestError(
            f"sequences of {workload.longest} tokens are more than the {context} of the model's context: make "
            "--prompt, --new, --prefill or --context smaller"
        )


def _model_files(name: str, loaded: "Loaded") -> "Model":
    """The model for baselines."""
    from llmir_jax.bench.baseline import Model
    from llmir_jax.load import locate

    shape = asdict(loaded.config) if is_dataclass(loaded.config) else {}
    return Model(path=locate(name), shape={field: shape[field] for field in SHAPE_FIELDS if field in shape})


def _generate_arguments(
    model: str,
    ids: Sequence[int],
    quantize: Sequence[str],
    calibrate: Path | None,
    kv_cache: str | None,
    **others: Any,
) -> list[str]:
    """Options of `llmir generate` for the same decoder; the model by its path, since its cache is another one."""
    from llmir_jax.load import locate

    arguments = ["-m", str(locate(model)), "--token-ids", ",".join(map(str, ids))]
    for scheme in quantize:
        arguments += ["-q", scheme]
    if calibrate is not None:
        arguments += ["--calibrate", str(calibrate)]
    if kv_cache is not None:
        arguments += ["--kv-cache", kv_cache]
    for name, value in others.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    return arguments
