"""``llmir compile``: the decoder of a model, its report, and the IR of each stage."""

import json
from pathlib import Path

import click

from llmir_jax.cli import options


@click.command("compile", short_help="Compile a model; show its report or its IR.")
@click.argument("model")
@click.option("--emit", type=click.Choice(["stablehlo", "llm", "target"]), help="Print the IR of this stage.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write there, not to stdout.")
@click.option("--tokens", type=options.COUNT, metavar="N", help="Rows of tokens of the step that is shown or compiled.")
@click.option("--max-seqs", type=options.COUNT, default=1, show_default=True, help="Sequences served at once.")
@options.target_option
@options.mesh_option
@options.quantization_options
@options.model_options
@click.option("--json", "as_json", is_flag=True, help="The report as one JSON object.")
def compile_command(
    model: str,
    emit: str | None,
    output: Path | None,
    tokens: int | None,
    max_seqs: int,
    target: str | None,
    mesh: str | None,
    as_json: bool,
    quantize: tuple[str, ...],
    calibrate: Path | None,
    kv_cache: str | None,
    dtype: str,
    no_verify: bool,
    num_pages: int | None,
    page_size: int,
    max_seq_len: int | None,
) -> None:
    """Compile the decoder of MODEL: a name, a directory or a .gguf file.

    Without --emit, everything that serving needs is compiled, and kept on disk for later starts; the report says what
    was matched, how each part is served, and what the self-check found. With --emit, only the passes run, and the IR
    of a stage is printed: "stablehlo" as traced, "llm" over the paged cache, "target" as XLA compiles it. On a CPU the
    step is native code where it can be; --target reference has XLA compile all of it, and with --mesh it is partitioned
    over the devices that JAX has.

    \b
    llmir compile smollm2-135m
    llmir compile smollm2-135m -q int4 --kv-cache int8
    llmir compile ./checkpoint --emit llm -o decoder.mlir
    """
    if emit and as_json:
        raise click.UsageError("--json is for the report: leave out --emit")
    quantization = options.decoder_quantization(quantize, calibrate, kv_cache)
    with options.progress(f"loading {model}", "deriving the decoder", "compiling") as advance:
        options.import_compiler()
        loaded = options.load_model(model, dtype)
        cache = options.CacheOptions(
            context=loaded.config.max_seq_len, num_pages=num_pages, page_size=page_size, max_seq_len=max_seq_len
        )
        advance()
        decoder = loaded.decoder(
            max_seqs=max_seqs,
            buckets=None if tokens is None else [tokens],
            verify=not no_verify and emit is None,
            **cache.sizes(1, num_seqs=max_seqs),
            **options.target_choice(target, mesh),
            **quantization,
        )
        advance()
        if emit is None:
            decoder.warmup()
    if emit is not None:
        text = decoder.ir(emit)
    else:
        report = decoder.report()
        text = (json.dumps(report.as_dict()) if as_json else str(report)) + "\n"
    if output is None:
        click.echo(text, nl=False)
    else:
        output.write_text(text, encoding="utf-8")
