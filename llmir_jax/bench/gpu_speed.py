"""Kernels of a GPU against what it was just measured to do: the second and third table of `gpu_check`.

Times are of a loop on the device, so that starting a program does not count: medians of five loops.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from llmir_jax.bench.gpu_flash import NAMES, flash_call, served
from llmir_jax.bench.gpu_right import first_line
from llmir_jax.bench.gpu_scale import Scale, arguments_of, masking_of, timed_products
from pallas_kernels.chips import Chip
from pallas_kernels.flash_attention import arg_specs as flash
from pallas_kernels.flash_attention.api import Backend
from pallas_kernels.paged_attention import mosaic_gpu
from pallas_kernels.paged_attention.arg_specs import ArgSpec
from pallas_kernels.paged_attention.gpu import paged_attention_gpu
from pallas_kernels.paged_attention.reference import paged_attention_reference
from pallas_kernels.paged_attention.types import KVPages, Sizes
from pallas_kernels.quantized_matmul import QuantizedWeight, quantized_matmul
from pallas_kernels.quantized_matmul import arg_specs as products

LOOPS = 5
TERA = 1e12
Attention = Callable[..., tuple[jax.Array, KVPages]]


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


def attention_speed(scale: Scale, dtype: str, chip: Chip, measured: tuple[float, float]) -> Iterator[list[str]]:
    """Rows of: what, time, rate, share of what was `measured` (see `ceilings`), JAX's own."""
    yield ["what", "time, ms", "rate", "share of measured", "JAX's own, ms"]
    bandwidth, flops = measured
    yield ["copy", "", f"{bandwidth / 1e9:,.0f} GB/s", "1.00", ""]
    yield [f"{dtype} matmul of {scale.matmul_size}", "", f"{flops / TERA:,.1f} TFLOP/s", "1.00", ""]
    decode, prefill = scale.decode, scale.prefill
    context = sum(decode.seq_len * (i + 1) // decode.num_seqs for i in range(decode.num_seqs))
    read = 2 * context * decode.num_kv_heads * decode.head_dim * jnp.dtype(decode.page_dtype).itemsize
    name = f"paged attention, decode of {decode.num_seqs}, {context // decode.num_seqs} keys each"
    yield from _attention_rows(scale, decode, chip, name, read, bandwidth, ("GB/s", 1e9))
    length = prefill.num_tokens
    operations = 2 * prefill.num_heads * prefill.head_dim * length * (length + 1)
    name = f"paged attention, prefill of {length}"
    yield from _attention_rows(scale, prefill, chip, name, operations, flops, ("TFLOP/s", TERA))
    whole = flash.ArgSpec(
        name="whole",
        num_heads=prefill.num_heads,
        num_kv_heads=prefill.num_kv_heads,
        head_dim=prefill.head_dim,
        seq_len=length,
        dtype=prefill.dtype,
    )
    for backend in () if scale.interpret else served(whole):
        title = f"{NAMES[backend]}, {length} tokens"
        try:
            taken = _flash_seconds(scale, whole, backend)
        except Exception as error:  # whatever a compiler says: the rest is to be measured all the same
            yield [title, f"FAILED: {first_line(error)}", "", "", ""]
            continue
        rate = operations / taken
        yield [title, f"{1e3 * taken:.3f}", f"{rate / TERA:,.1f} TFLOP/s", f"{rate / flops:.2f}", ""]


def _flash_seconds(scale: Scale, spec: flash.ArgSpec, backend: Backend) -> float:
    q, k, v, slopes = flash.random_arguments(spec)
    call = flash_call(spec, backend, slopes)
    return seconds(lambda state: (call(*state), state[1], state[2]), (q, k, v), scale.iterations)


def _attention_rows(
    scale: Scale, spec: ArgSpec, chip: Chip, name: str, amount: float, ceiling: float, unit: tuple[str, float]
) -> Iterator[list[str]]:
    """Triton's kernel beside JAX's own, then Mosaic GPU's, or why it is not measured."""
    q, k, _, pages, batch, _ = spec.structs()
    reason = mosaic_gpu.chip_reason(Sizes.of(q, k, pages, batch), chip)
    for title, kernel, why in (
        (name, paged_attention_gpu, None),
        (f"{name}, Mosaic GPU", mosaic_gpu.paged_attention_mosaic_gpu, reason),
    ):
        if why is not None:
            yield [title, f"not measured: {why}", "", "", ""]
            continue
        try:
            taken = _attention_seconds(scale, spec, kernel)
        except Exception as error:  # whatever a compiler says: the rest is to be measured all the same
            yield [title, f"FAILED: {first_line(error)}", "", "", ""]
            continue
        rate = amount / taken
        own = _jax_attention(scale, spec) if kernel is paged_attention_gpu else ""
        yield [title, f"{1e3 * taken:.3f}", f"{rate / unit[1]:,.1f} {unit[0]}", f"{rate / ceiling:.2f}", own]


def _attention_seconds(scale: Scale, spec: ArgSpec, kernel: Attention) -> float:
    q, k, v, pages, batch, slopes = arguments_of(spec)
    attention: Attention = paged_attention_reference if scale.interpret else kernel

    def body(state: tuple[jax.Array, KVPages]) -> tuple[jax.Array, KVPages]:
        return attention(state[0], k, v, state[1], batch, masking_of(spec), slopes)

    return seconds(body, (q, pages), scale.iterations)


def product_speed(scale: Scale, dtype: str, measured: tuple[float, float]) -> Iterator[list[str]]:
    """Rows of: weight, rows of x, time, rates and their shares of what was `measured`, XLA's matmul of as many floats.

    Bytes are those of the weight with its scales and zero points, of x and of y. Weights are multiplied in turn, more
    of them than a cache holds.
    """
    n, k = scale.weight
    yield [
        f"weight [{n}, {k}]", "rows", "time, ms", "GB/s", "of copy", "TFLOP/s", "of matmul", f"{dtype} matmul, ms",
        "times as fast",
    ]  # fmt: skip
    bandwidth, flops = measured
    floats = {m: _matmul_seconds(scale, m, dtype) for m in scale.rows}
    for spec in timed_products(scale, dtype):
        try:
            taken, num_bytes = _product_seconds(scale, spec)
        except Exception as error:  # whatever a compiler says: the rest is to be measured all the same
            yield [spec.name, str(spec.m), f"FAILED: {first_line(error)}", *[""] * 6]
            continue
        rate, operations = num_bytes / taken, 2 * spec.m * spec.n * spec.k / taken
        yield [
            spec.name,
            str(spec.m),
            f"{1e3 * taken:.3f}",
            f"{rate / 1e9:,.0f}",
            f"{rate / bandwidth:.2f}",
            f"{operations / TERA:,.1f}",
            f"{operations / flops:.2f}",
            f"{1e3 * floats[spec.m]:.3f}",
            f"{floats[spec.m] / taken:.2f}",
        ]


def _in_turn(scale: Scale, product: Callable[[jax.Array, Any], jax.Array], x: jax.Array, weight: Any) -> float:
    """Seconds of one product of x [m, K] with a weight [N, K], N at least K, of several copies of it in turn."""
    weights = tuple(jax.tree.map(jnp.copy, weight) for _ in range(scale.weight_copies))

    def body(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        x, weights = state
        for each in weights:
            x = product(x, each)[:, : x.shape[1]]
        return x, weights

    return seconds(body, (x, weights), scale.iterations) / scale.weight_copies


def _matmul_seconds(scale: Scale, m: int, dtype: str) -> float:
    n, k = scale.weight
    x, weight = jnp.ones((m, k), dtype), jax.random.normal(jax.random.key(0), (k, n), jnp.dtype(dtype)) / k**0.5
    return _in_turn(scale, lambda x, weight: x @ weight, x, weight)


@lru_cache(maxsize=1)
def _weight(spec: products.ArgSpec) -> QuantizedWeight:
    """Kept for the next number of rows: of a large matrix random numbers take seconds."""
    return products.random_weight(
        spec.n, spec.k, bits=spec.bits, group_size=spec.group_size, kind=spec.kind, scale_dtype=spec.scale_dtype,
        layout="rows", seed=1,
    )  # fmt: skip


def _product_seconds(scale: Scale, spec: products.ArgSpec) -> tuple[float, int]:
    """Of one product, and the bytes that it reads and writes."""
    weight = _weight(replace(spec, m=1))
    x = jnp.ones((spec.m, spec.k), spec.x_dtype)
    backend: Literal["reference", "gpu"] = "reference" if scale.interpret else "gpu"
    taken = _in_turn(scale, lambda x, weight: quantized_matmul(x, weight, backend=backend), x, weight)
    y_bytes = spec.m * spec.n * x.dtype.itemsize
    return taken, sum(part.nbytes for part in jax.tree.leaves(weight)) + x.nbytes + y_bytes


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
            found.append(f"{implementation}: {first_line(error)}")
    return ", ".join(found)


__all__ = ["attention_speed", "ceilings", "product_speed", "seconds"]
