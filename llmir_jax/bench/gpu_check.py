"""`make gpu-check`: are the GPU's kernels right, and how fast are they, on the machine's NVIDIA GPU.

Three parts, each a table. Kernels against their references, at the shapes of published models. Kernels against what
this GPU was just measured to do, copying memory and multiplying matrices, and against JAX's own attention over a dense
cache of the same keys. Tokens a second of decoders with the shapes of Llama 3.2 1B and Llama 3.1 8B, random weights.

Times are of a loop on the device, so that starting a program does not count: medians of five loops. ``--dry-run`` goes
through all of it on any machine: the kernels in Triton's interpreter, everything small, and no time means anything.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llmir_jax.bench.gpu_flash import LONGEST, NAMES, flash_call, flash_results, served
from llmir_jax.bench.shapes import SHAPES
from llmir_jax.models.llama import LlamaConfig
from pallas_kernels.chips import UnknownChipError, chip_named, limits_of
from pallas_kernels.flash_attention import arg_specs as flash
from pallas_kernels.flash_attention.api import Backend
from pallas_kernels.paged_attention.arg_specs import SPECS, ArgSpec, random_arguments
from pallas_kernels.paged_attention.gpu import choose_tiles, make_launch, merge, paged_attention_gpu
from pallas_kernels.paged_attention.reference import paged_attention_reference
from pallas_kernels.paged_attention.types import KVPages, Masking, Sizes
from pallas_kernels.quantized_matmul import QuantizedWeight, quantized_matmul
from pallas_kernels.quantized_matmul import arg_specs as products
from pallas_kernels.quantized_matmul.gpu import finish, launch_of, prepare

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}
"""Of the largest result, by the dtype of the queries: float32's rounding over thousands of keys, 8 and 11 bits."""
LOOPS = 5
GIB, TERA = 2**30, 1e12
LLAMA_8B = replace(
    SHAPES["llama-3.2-1b"],
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    head_dim=128,
    windows=(None,) * 32,
    tie_embeddings=False,
)
"""https://huggingface.co/meta-llama/Llama-3.1-8B/blob/main/config.json"""


class GpuCheckError(RuntimeError):
    """What keeps the check from being made at all."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is measured."""

    interpret: bool
    specs: tuple[ArgSpec, ...]
    products: tuple[products.ArgSpec, ...]
    flash: tuple[flash.ArgSpec, ...]
    copy_bytes: int
    matmul_size: int
    iterations: int
    decode: ArgSpec
    prefill: ArgSpec
    models: tuple[tuple[str, LlamaConfig], ...]
    new_tokens: int
    max_seqs: int


def full(dtype: str) -> Scale:
    """What a GPU is measured with; 16-bit shapes in `dtype`."""
    decode = next(spec for spec in SPECS if spec.name == "llama-3-8b-decode")
    llama = replace(decode, seq_len=4096, dtype=dtype, page_dtype=dtype)
    return Scale(
        interpret=False,
        specs=(*SPECS, replace(decode, name="llama-3-8b-decode-float16", dtype="float16", page_dtype="float16")),
        products=products.SPECS,
        flash=tuple(replace(spec, seq_len=min(spec.seq_len, LONGEST)) for spec in flash.SPECS),
        copy_bytes=GIB,
        matmul_size=8192,
        iterations=20,
        decode=replace(llama, num_tokens=64, num_seqs=64),
        prefill=replace(llama, name="llama-3-8b-prefill", num_tokens=4096, num_seqs=1),
        models=(("1B", SHAPES["llama-3.2-1b"]), ("8B", LLAMA_8B)),
        new_tokens=128,
        max_seqs=64,
    )


def dry() -> Scale:
    """The same on a small scale."""
    small = ArgSpec(
        name="small",
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        num_tokens=3,
        num_seqs=3,
        seq_len=32,
        page_size=8,
        dtype="float32",
        page_dtype="float32",
    )
    tiny = replace(
        SHAPES["llama-3.2-1b"],
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        windows=(None,) * 2,
    )
    product = products.ArgSpec(name="small", m=3, n=40, k=128, bits=4, group_size=32, kind="minima", x_dtype="float32")
    rounded = replace(product, name="small-a8", m=17, bits=8, kind="symmetric", activation_group_size=64)
    return Scale(
        interpret=True,
        specs=(small, replace(small, name="small-int8", page_dtype="int8", num_tokens=9)),
        products=(product, rounded),
        flash=(flash.ArgSpec(name="small", num_heads=4, num_kv_heads=2, head_dim=16, seq_len=20, dtype="float32"),),
        copy_bytes=2**20,
        matmul_size=64,
        iterations=2,
        decode=small,
        prefill=replace(small, name="small-prefill", num_tokens=16, num_seqs=1),
        models=(("tiny", tiny),),
        new_tokens=4,
        max_seqs=2,
    )


Attention = Callable[..., tuple[jax.Array, KVPages]]


def _masking(spec: ArgSpec) -> Masking:
    return Masking(scale=spec.head_dim**-0.5, window=spec.window, softcap=spec.softcap)


def _arguments(spec: ArgSpec) -> tuple[Any, ...]:
    """A full batch: single tokens of all sequences but the last, which has all other rows; contexts of many lengths."""
    last = min(spec.num_tokens - spec.num_seqs + 1, spec.seq_len)
    query_lens = [1] * (spec.num_seqs - 1) + [last]
    seq_lens = [max(n, spec.seq_len * (i + 1) // spec.num_seqs) for i, n in enumerate(query_lens)]
    return random_arguments(spec, seq_lens, query_lens)


# -- right -------------------------------------------------------------------------------------------------------------


def correctness(scale: Scale) -> Iterator[list[str]]:
    """Rows of: kernel, shape, largest difference, what is allowed, verdict."""
    yield ["kernel", "shape", "largest difference", "allowed", ""]
    for spec in scale.specs:
        arguments = _arguments(spec)
        out, pages = _run_attention(spec, arguments, interpret=scale.interpret)
        q, k, v, before, batch, slopes = arguments
        expected, expected_pages = paged_attention_reference(q, k, v, before, batch, _masking(spec), slopes)
        same = _are_same_pages(pages, expected_pages)
        yield _row("paged attention", spec.name, out, expected, TOLERANCE[spec.dtype], same=same)
    for product in scale.products:
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.standard_normal((product.m, product.k)), product.x_dtype)
        weight = products.random_weight(
            product.n, product.k, bits=product.bits, group_size=product.group_size, kind=product.kind,
            scale_dtype=product.scale_dtype, layout="rows", seed=1,
        )  # fmt: skip
        group_size = product.activation_group_size
        got = _run_product(x, weight, group_size, interpret=scale.interpret)
        y = quantized_matmul(x, weight, activation_group_size=group_size, backend="reference")
        yield _row("quantized matmul", product.name, got, y, TOLERANCE[product.x_dtype])

    for name, shape, got, y in flash_results(scale.flash, interpret=scale.interpret):
        yield _row(name, shape.name, got, y, TOLERANCE[shape.dtype])


def _row(kernel: str, shape: str, out: Any, expected: Any, tolerance: float, *, same: bool = True) -> list[str]:
    wanted = np.asarray(expected, np.float32)
    error = float(np.max(np.abs(np.asarray(out, np.float32) - wanted)) / np.max(np.abs(wanted)))
    verdict = "ok" if error <= tolerance and same else "WRONG"
    return [kernel, shape, f"{error:.1e}", f"{tolerance:.0e}", verdict]


def _run_product(x: jax.Array, weight: QuantizedWeight, group_size: int | None, *, interpret: bool) -> jax.Array:
    if not interpret:
        return quantized_matmul(x, weight, activation_group_size=group_size, backend="gpu")
    from pallas_kernels.triton_host import Interpreter

    kernel_x, _, x_scales = prepare(
        x, gate=None, gate_function="silu", activation_group_size=group_size, activation_scales=None
    )
    launch = launch_of(kernel_x, weight, chip=chip_named("t4"), x_scales=x_scales, out_dtype=x.dtype)
    with Interpreter() as interpreter:
        return finish(jnp.asarray(interpreter.run(launch)[0]), None, None, x.dtype)


def _run_attention(spec: ArgSpec, arguments: tuple[Any, ...], *, interpret: bool) -> tuple[Any, KVPages]:
    q, k, v, pages, batch, slopes = arguments
    if not interpret:
        kernel: Attention = jax.jit(paged_attention_gpu, static_argnums=5)
        return kernel(q, k, v, pages, batch, _masking(spec), slopes)
    from pallas_kernels.triton_host import Interpreter

    tiles = choose_tiles(Sizes.of(q, k, pages, batch), chip_named("t4"))
    launch = make_launch(q, k, v, pages, batch, _masking(spec), slopes, tiles, wide=False)
    with Interpreter() as interpreter:
        results = tuple(map(jnp.asarray, interpreter.run(launch)))
    return merge(results, batch, q.dtype, len(launch.updated))


def _are_same_pages(got: KVPages, expected: KVPages) -> bool:
    """Floats are equal bit for bit, NaN where nothing was written; integers at a tie may round either way, and scales
    are within an ulp, since XLA may divide by 127 in another way."""
    for array, wanted in ((got.k_scales, expected.k_scales), (got.v_scales, expected.v_scales)):
        if wanted is not None and not np.allclose(
            np.asarray(array), np.asarray(wanted), rtol=3e-7, atol=0, equal_nan=True
        ):
            return False
    slack = 0 if got.k_scales is None else 1
    for array, wanted in ((got.k, expected.k), (got.v, expected.v)):
        difference = np.asarray(array, np.float32) - np.asarray(wanted, np.float32)
        if np.nanmax(np.abs(difference)) > slack or bool(np.any(jnp.isnan(array) != jnp.isnan(wanted))):
            return False
    return True


# -- fast --------------------------------------------------------------------------------------------------------------


def seconds(body: Callable[[Any], Any], start: Any, iterations: int) -> float:
    """Of one `body(state) -> state`, whose states are alike: the median of loops on the device."""
    loop = jax.jit(lambda state: lax.fori_loop(0, iterations, lambda _, s: body(s), state), donate_argnums=0)
    state = jax.block_until_ready(loop(start))
    times = []
    for _ in range(LOOPS):
        begin = time.perf_counter()
        state = jax.block_until_ready(loop(state))
        times.append((time.perf_counter() - begin) / iterations)
    return statistics.median(times)


def ceilings(scale: Scale, dtype: str) -> tuple[float, float]:
    """Bytes a second that a copy reads and writes, and operations a second of a square matrix product."""
    copied = seconds(lambda x: x + 1, jnp.zeros(scale.copy_bytes // 4, jnp.float32), scale.iterations)
    size = scale.matmul_size
    weight = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype)) / size**0.5
    multiplied = seconds(lambda s: (s[0] @ s[1], s[1]), (jnp.copy(weight), weight), scale.iterations)
    return 2 * scale.copy_bytes / copied, 2 * size**3 / multiplied


def speed(scale: Scale, dtype: str) -> Iterator[list[str]]:
    """Rows of: what, time, rate, share of the measured ceiling, JAX's own."""
    yield ["what", "time, ms", "rate", "share of measured", "JAX's own, ms"]
    bandwidth, flops = ceilings(scale, dtype)
    yield ["copy", "", f"{bandwidth / 1e9:,.0f} GB/s", "1.00", ""]
    yield [f"{dtype} matmul of {scale.matmul_size}", "", f"{flops / TERA:,.1f} TFLOP/s", "1.00", ""]
    decode, prefill = scale.decode, scale.prefill
    taken = _attention_seconds(scale, decode)
    context = sum(decode.seq_len * (i + 1) // decode.num_seqs for i in range(decode.num_seqs))
    itemsize = jnp.dtype(decode.page_dtype).itemsize
    read = 2 * context * decode.num_kv_heads * decode.head_dim * itemsize
    rate = read / taken
    name = f"paged attention, decode of {decode.num_seqs}, {context // decode.num_seqs} keys each"
    yield [
        name,
        f"{1e3 * taken:.3f}",
        f"{rate / 1e9:,.0f} GB/s",
        f"{rate / bandwidth:.2f}",
        _jax_attention(scale, decode),
    ]
    taken = _attention_seconds(scale, prefill)
    length = prefill.num_tokens
    operations = 4 * prefill.num_heads * prefill.head_dim * length * (length + 1) / 2
    rate = operations / taken
    share = f"{rate / flops:.2f}"
    name = f"paged attention, prefill of {length}"
    yield [name, f"{1e3 * taken:.3f}", f"{rate / TERA:,.1f} TFLOP/s", share, _jax_attention(scale, prefill)]
    whole = flash.ArgSpec(
        name="whole",
        num_heads=prefill.num_heads,
        num_kv_heads=prefill.num_kv_heads,
        head_dim=prefill.head_dim,
        seq_len=length,
        dtype=prefill.dtype,
    )
    for backend in () if scale.interpret else served(whole):
        taken = _flash_seconds(scale, whole, backend)
        rate = operations / taken
        name = f"{NAMES[backend]}, {length} tokens"
        yield [name, f"{1e3 * taken:.3f}", f"{rate / TERA:,.1f} TFLOP/s", f"{rate / flops:.2f}", ""]


def _flash_seconds(scale: Scale, spec: flash.ArgSpec, backend: Backend) -> float:
    call = flash_call(spec, backend)
    q, k, v, _ = flash.random_arguments(spec)
    return seconds(lambda state: (call(*state), state[1], state[2]), (q, k, v), scale.iterations)


def _attention_seconds(scale: Scale, spec: ArgSpec) -> float:
    q, k, v, pages, batch, slopes = _arguments(spec)
    attention: Attention = paged_attention_reference if scale.interpret else paged_attention_gpu

    def body(state: tuple[jax.Array, KVPages]) -> tuple[jax.Array, KVPages]:
        return attention(state[0], k, v, state[1], batch, _masking(spec), slopes)

    return seconds(body, (q, pages), scale.iterations)


def _jax_attention(scale: Scale, spec: ArgSpec) -> str:
    """Milliseconds of `jax.nn.dot_product_attention` over a dense cache of as many keys, by each implementation."""
    is_decode = spec.num_tokens == spec.num_seqs
    rows = 1 if is_decode else spec.num_tokens
    shape = (spec.num_seqs, rows, spec.num_heads, spec.head_dim)
    q = jax.random.normal(jax.random.key(0), shape, jnp.dtype(spec.dtype))
    keys = jax.random.normal(
        jax.random.key(1), (spec.num_seqs, spec.seq_len, spec.num_kv_heads, spec.head_dim), jnp.dtype(spec.dtype)
    )
    lengths = jnp.asarray([max(1, spec.seq_len * (i + 1) // spec.num_seqs) for i in range(spec.num_seqs)], jnp.int32)
    found = []
    for implementation in ("xla", "cudnn"):
        if implementation == "cudnn" and scale.interpret:
            continue

        def body(state: tuple[jax.Array, jax.Array], implementation: Any = implementation) -> Any:
            q, keys = state
            masks: dict[str, Any] = {"key_value_seq_lengths": lengths} if is_decode else {"is_causal": True}
            return jax.nn.dot_product_attention(q, keys, keys, implementation=implementation, **masks), keys

        start = (jnp.copy(q), jnp.copy(keys))  # `seconds` donates them
        try:
            found.append(f"{implementation} {1e3 * seconds(body, start, scale.iterations):.3f}")
        except Exception as error:  # whatever it is that this GPU or this JAX lacks
            found.append(f"{implementation}: {(str(error) or repr(error)).splitlines()[0][:60]}")
    return ", ".join(found)


# -- models ------------------------------------------------------------------------------------------------------------


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


# -- the command -------------------------------------------------------------------------------------------------------


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
        scale, dtype, memory = dry(), "float32", None
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
    checked = list(correctness(scale))
    for rows in (checked, list(speed(scale, dtype)), list(models(scale, dtype, memory))):
        print_line("\n" + render(rows))
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
