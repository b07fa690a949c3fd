"""``llmir quantize``: a checkpoint of a model with its weights quantized."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmir_jax.cli import options

if TYPE_CHECKING:
    from llmir_jax.load import Loaded


@click.command("quantize", short_help="Quantize a model's weights and save them.")
@click.argument("model")
@options.quantize_option
@options.calibrate_option
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="A directory, which is made.")
@click.option(
    "--dtype", type=click.Choice(options.DTYPES), default="float32", show_default=True, help="Of what stays floats."
)
@click.option("--json", "as_json", is_flag=True, help="What became of each parameter, as one JSON object.")
def quantize_command(
    model: str, quantize: tuple[str, ...], calibrate: Path | None, output: Path, dtype: str, as_json: bool
) -> None:
    """Quantize the weights of MODEL, a name, a directory or a .gguf file, and save the checkpoint.

    What is saved is loaded as any other model is, and served as it is. Norms, biases and all else that is no matrix
    stay floats.

    \b
    llmir quantize smollm2-135m -q int4 -o smollm2-int4
    llmir quantize ./checkpoint -q int4-g64 --calibrate book.txt -o ./checkpoint-int4
    llmir generate -m smollm2-int4 "What is the capital of France?"
    """
    how = options.decoder_quantization(quantize, calibrate)
    if how.get("quantize") is None:
        raise click.UsageError("no --quantize: give a scheme, such as -q int4")
    with options.progress(f"loading {model}", "quantizing", "writing") as advance:
        options.import_compiler()
        from llmir_jax.checkpoint.orbax import check_new

        check_new(output)  # not after the work
        loaded = options.load_model(model, dtype)
        advance()
        quantized = loaded.quantize(how.pop("quantize"), **how)
        advance()
        quantized.save(output)
    parameters = _describe(quantized)
    if as_json:
        click.echo(json.dumps({"model": model, "path": str(output), **_summary(parameters, quantized)}))
    else:
        click.echo(_table(output, parameters, quantized))


def _describe(quantized: "Loaded") -> dict[str, tuple[str, int]]:
    """Format and bytes of each parameter."""
    import jax.numpy as jnp

    source, found = quantized.source, {}
    for path, parameter in source.parameters.items():
        if (scheme := source.stored.get(path)) is not None:
            array = source.read_quantized(path, scheme)
            found[path] = array.scheme.name, array.nbytes
        else:
            dtype = jnp.dtype(parameter.dtype)
            found[path] = dtype.name, parameter.size * dtype.itemsize
    return found


def _summary(parameters: Mapping[str, tuple[str, int]], quantized: "Loaded") -> dict[str, Any]:
    num_bytes = sum(size for _, size in parameters.values())
    formats: dict[str, dict[str, int]] = {}
    for kind, size in parameters.values():
        entry = formats.setdefault(kind, {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += size
    return {
        "bytes": num_bytes,
        "bits_per_weight": 8 * num_bytes / quantized.source.num_elements,
        "formats": formats,
        "parameters": {path: kind for path, (kind, _) in parameters.items()},
    }


def _table(output: Path, parameters: Mapping[str, tuple[str, int]], quantized: "Loaded") -> str:
    summary = _summary(parameters, quantized)
    lines = [f"{output}: {summary['bytes'] / 1e6:.1f} MB, {summary['bits_per_weight']:.2f} bits a weight"]
    width = max(map(len, summary["formats"]))
    for kind, entry in sorted(summary["formats"].items(), key=lambda item: -item[1]["bytes"]):
        lines.append(f"  {kind:{width}}  {entry['count']:5} parameters  {entry['bytes'] / 1e6:8.1f} MB")
    return "\n".join(lines)
