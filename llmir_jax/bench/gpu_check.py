"""`make gpu-check`: are the GPU's kernels right, and how fast are they, on the machine's NVIDIA GPU.

Four tables. Kernels against their references, at the shapes of published models. Attention by Triton and by Mosaic GPU
against what this GPU was just measured to do, copying memory and multiplying matrices, and against JAX's own attention
over a dense cache of the same keys. Products with int4 and int8 weights against the same, and against a matmul of as
many floats. Tokens a second of decoders with the shapes of Llama 3.2 1B and Llama 3.1 8B, random weights.

Times are of a loop on the device, so that starting a program does not count: medians of five loops. ``--dry-run`` goes
through all of it on any machine: the kernels in their interpreters, everything small, and no time means anything.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llmir_jax.bench.gpu_right import correctness
from llmir_jax.bench.gpu_scale import GIB, Scale, dry, full
from llmir_jax.bench.gpu_speed import attention_speed, ceilings, product_speed
from llmir_jax.models.llama import LlamaConfig
from pallas_kernels.chips import UnknownChipError, chip_named, limits_of


class GpuCheckError(RuntimeError):
    """What keeps the check from being made at all."""


def models(scale: Scale, dtype: str, memory: int | None) -> Iterator[list[str]]:
    """Rows of: model, tokens a second of one sequence, of a batch, and what serves attention."""
    yield ["model", "one sequence, tokens/s", f"{scale.max_seqs} sequences, tokens/s", "attention by"]
    for name, config in scale.models:
        needed = 2 * parameter_count(config) * 1.3
        if memory is not None and needed > memory:
            reason = f"not measured: {needed / GIB:.0f} GiB are needed, there are {memory / GIB:.0f}"
            yield [f"{name}, {dtype}", reason, "", ""]
            continue
        yield [f"{name}, {dtype}", *_decode_speed(scale, config, dtype)]


def parameter_count(config: LlamaConfig) -> int:
    """Parameters of the matrices, which are all but a few of them."""
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    layer = config.hidden_size * (heads + 3 * config.intermediate_size)
    tables = 1 if config.tie_embeddings else 2
    return config.num_layers * layer + tables * config.vocab_size * config.hidden_size


def _decode_speed(scale: Scale, config: LlamaConfig, dtype: str) -> list[str]:
    from flax import nnx

    import llmir_jax as llmir
    from llmir_jax.bench.ours import Ours
    from llmir_jax.models.llama import Llama

    model = Llama(config, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    length = 16 + scale.new_tokens + 1
    page_size = 16
    decoder = llmir.jit(lambda model, tokens: model(tokens)).decoder(
        model,
        num_pages=scale.max_seqs * -(-length // page_size),
        page_size=page_size,
        max_seqs=scale.max_seqs,
        max_seq_len=length,
        target="reference" if scale.interpret else None,
        verify=scale.interpret,
    )
    ours = Ours(decoder)
    rng = np.random.default_rng(0)
    prompts = [[int(token) for token in rng.integers(0, config.vocab_size, 16)] for _ in range(scale.max_seqs)]
    for _ in range(2):  # the first compiles
        times = ours.token_times(prompts[0], scale.new_tokens)
        tokens, taken = ours.batch(prompts, scale.new_tokens)
    one = (len(times) - 1) / max(times[-1] - times[0], 1e-9)
    return [f"{one:,.1f}", f"{tokens / taken:,.0f}", decoder.report().served_by["llm.attend_pages"]]


def render(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, whose first row is its head."""
    head, *rest = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rest))


def run(*, dry_run: bool, print_line: Callable[[str], None] = print) -> bool:
    """Make the check; whether every kernel is right.

    Raises GpuCheckError without a GPU, UnknownChipError on one that kernels are not for.
    """
    platform = jax.default_backend()
    if dry_run:
        scale, dtype, memory, chip = dry(), "float32", None, chip_named("h100")
        print_line(f"dry run on {platform}: kernels interpreted, everything small; the times mean nothing")
    else:
        if platform != "gpu":
            raise GpuCheckError(
                f"no NVIDIA GPU: JAX {jax.__version__} runs on {platform!r} here; install jax[cuda12] on a machine "
                "that has one, or use --dry-run"
            )
        device = jax.devices()[0]
        chip = limits_of(device)
        dtype = "bfloat16" if "bfloat16" in chip.peak_flops else "float16"
        scale, memory = full(dtype), (device.memory_stats() or {}).get("bytes_limit")
        print_line(f"{device.device_kind}, JAX {jax.__version__}, {time.strftime('%Y-%m-%d')}")
    checked = list(correctness(scale, chip))
    print_line("\n" + render(checked))
    measured = ceilings(scale, dtype)
    for rows in (
        attention_speed(scale, dtype, chip, measured),
        product_speed(scale, dtype, measured),
        models(scale, dtype, memory),
    ):
        print_line("\n" + render(list(rows)))
    return all(row[-1] == "ok" for row in checked[1:])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 where all is right, 1 where something is wrong or cannot be checked."""
    parser = argparse.ArgumentParser(prog="gpu-check", description="Check and measure the kernels on an NVIDIA GPU.")
    parser.add_argument("--dry-run", action="store_true", help="go through it without a GPU, on a small scale")
    options = parser.parse_args(arguments)
    try:
        is_right = run(dry_run=options.dry_run)
    except (GpuCheckError, UnknownChipError, ImportError) as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 1
    if not is_right:
        print("gpu-check: a kernel is wrong, see the first table", file=sys.stderr)
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
