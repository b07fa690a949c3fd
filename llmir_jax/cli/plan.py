"""``llmir plan``: whether a model fits a slice of accelerators, how it is laid out there, and how fast it could be."""

import json
from pathlib import Path

import click

from llmir_jax.cli import options
from llmir_jax.errors import LlmirError


@click.command("plan", short_help="Whether a model fits a TPU slice or GPUs, and how fast it could be.")
@click.argument("model")
@click.option(
    "--topology", "slice_name", required=True, metavar="NAME", help="v5e:4x4, v6e:2x4, v5p:4x4x4, tpu7x:2x2x1, h100:8 …"
)
@options.quantize_option
@click.option("--kv-cache", type=click.Choice(options.KV_CACHES), help="What keys and values are kept as.")
@click.option("--batch", type=options.COUNT, default=16, show_default=True, help="Sequences that decode at once.")
@click.option(
    "--context", type=options.COUNT, metavar="N", help="Tokens of each.  [default: the model's, 8192 at most]"
)
@click.option(
    "--dtype", type=click.Choice(options.DTYPES), default="bfloat16", show_default=True, help="Compute in this."
)
@click.option(
    "--page-size", type=options.COUNT, default=options.PAGE_SIZE, show_default=True, help="Tokens a page of KV cache."
)
@click.option("--mesh", metavar="AXES", help="This layout: tensor=16, or sequence=2,tensor=8 …  [default: the best]")
@click.option("--compare", is_flag=True, help="Rank all layouts.")
@click.option("--no-compile", is_flag=True, help="Estimate only, even where XLA can compile for the slice.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, in bytes and seconds.")
def plan_command(
    model: str,
    slice_name: str,
    quantize: tuple[str, ...],
    kv_cache: str | None,
    batch: int,
    context: int | None,
    dtype: str,
    page_size: int,
    mesh: str | None,
    compare: bool,
    no_compile: bool,
    as_json: bool,
) -> None:
    """Plan MODEL on a slice, here: no accelerator and no weights are needed.

    MODEL is a config.json, a directory that has one, or anything that the other commands take. The layout is the best
    one of those that fit, or that of --mesh; times are rooflines, which no program beats. With the extra tpu-aot the
    step is compiled for the TPU slice, layer by layer, and what XLA makes of it is said too.

    \b
    llmir plan config.json --topology v5e:4x4 -q int8
    llmir plan config.json --topology v5p:4x4x4 -q int4 --batch 64 --context 8192 --compare
    llmir plan smollm2-135m --topology h100:1 --json
    """
    import_for_planning()
    from llmir_jax.planning import ModelPlan, read_config
    from llmir_jax.slice_plan import plan_slice
    from sharding.errors import ShardingError
    from sharding.mesh import parse_axes
    from sharding.topologies import topology

    try:
        found = topology(slice_name)
        axes = None if mesh is None else parse_axes(mesh)
    except ShardingError as error:
        raise click.UsageError(f"--{error}") from None
    config = read_config(model)
    longest = config.max_seq_len if context is None else context
    if longest > config.max_seq_len:
        raise LlmirError(f"--context {longest} is more than the {config.max_seq_len} tokens that {model} is made for")
    scheme = options.parse_quantize(quantize) if quantize else None
    if options.MIXED.fullmatch(quantize[0] if quantize else ""):
        raise click.UsageError(f"--quantize {quantize[0]} depends on the weights, which are not read: give a scheme")
    planned = ModelPlan(
        config=config,
        batch=batch,
        context=min(longest, 8192) if context is None else longest,
        dtype=dtype,
        quantize=scheme,
        kv_cache=kv_cache,
        page_size=page_size,
    )
    with options.progress(f"planning {Path(model).name}"):
        plan = plan_slice(
            planned,
            found,
            name=model,
            axes=axes,
            compare=compare,
            compile_it=not no_compile,
        )
    click.echo(json.dumps(plan.as_dict()) if as_json else str(plan))


def import_for_planning() -> None:
    """Import JAX without any accelerator, so that libtpu, where it is installed, only compiles."""
    from llmir_jax.libtpu_environment import prepare

    prepare()
    options.import_compiler()
