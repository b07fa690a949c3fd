"""Kernels of a GPU against their references, at the shapes of published models: the first table of `gpu_check`."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmir_jax.bench.gpu_flash import flash_results
from llmir_jax.bench.gpu_scale import Scale, arguments_of, masking_of
from pallas_kernels.chips import Chip, chip_named
from pallas_kernels.paged_attention import mosaic_gpu
from pallas_kernels.paged_attention.arg_specs import ArgSpec
from pallas_kernels.paged_attention.gpu import choose_tiles, make_launch, merge, paged_attention_gpu
from pallas_kernels.paged_attention.reference import paged_attention_reference
from pallas_kernels.paged_attention.types import KVPages, Sizes
from pallas_kernels.quantized_matmul import Hooks, QuantizedWeight, quantized_matmul
from pallas_kernels.quantized_matmul import arg_specs as products
from pallas_kernels.quantized_matmul.gpu import finish, launch_of, prepare

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}
"""Of the largest result, by the dtype of the queries: float32's rounding over thousands of keys, 8 and 11 bits."""

Attention = Callable[..., tuple[jax.Array, KVPages]]


def correctness(scale: Scale, chip: Chip) -> Iterator[list[str]]:
    """Rows of: kernel, shape, largest difference, what is allowed, verdict; Mosaic GPU's where it takes the shape."""
    yield ["kernel", "shape", "largest difference", "allowed", ""]
    for spec in scale.specs:
        arguments = arguments_of(spec)
        q, k, v, before, batch, slopes = arguments
        expected, expected_pages = paged_attention_reference(q, k, v, before, batch, masking_of(spec), slopes)
        runs = [("paged attention", _run_attention)]
        if mosaic_gpu.chip_reason(Sizes.of(q, k, before, batch), chip) is None:
            runs.append(("paged attention, Mosaic GPU", _run_mosaic_gpu))
        for name, run in runs:
            result = partial(run, spec, arguments, interpret=scale.interpret)
            yield _row(name, spec.name, result, expected, TOLERANCE[spec.dtype], expected_pages)
    for product in scale.products:
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.standard_normal((product.m, product.k)), product.x_dtype)
        weight = products.random_weight(
            product.n, product.k, bits=product.bits, group_size=product.group_size, kind=product.kind,
            scale_dtype=product.scale_dtype, layout="rows", seed=1,
        )  # fmt: skip
        hooks = Hooks(activation_group_size=product.activation_group_size)
        y = quantized_matmul(x, weight, hooks, backend="reference")
        multiply = partial(_run_product, x, weight, hooks, interpret=scale.interpret)
        yield _row("quantized matmul", product.name, multiply, y, TOLERANCE[product.x_dtype])
    for name, shape, attend, y in flash_results(scale.flash, interpret=scale.interpret):
        yield _row(name, shape.name, attend, y, TOLERANCE[shape.dtype])


def _row(
    kernel: str,
    shape: str,
    run: Callable[[], Any],
    expected: Any,
    tolerance: float,
    expected_pages: KVPages | None = None,
) -> list[str]:
    """Of what `run` gives: an array, or where pages are expected an array and pages."""
    try:
        result = jax.block_until_ready(run())
    except Exception as error:  # whatever a compiler says: the rest is to be checked all the same
        return [kernel, shape, "", "", f"FAILED: {first_line(error)}"]
    same = expected_pages is None or _are_same_pages(result[1], expected_pages)
    out = result if expected_pages is None else result[0]
    wanted = np.asarray(expected, np.float32)
    difference = float(np.max(np.abs(np.asarray(out, np.float32) - wanted)) / np.max(np.abs(wanted)))
    verdict = "ok" if difference <= tolerance and same else "WRONG"
    return [kernel, shape, f"{difference:.1e}", f"{tolerance:.0e}", verdict]


def _run_product(x: jax.Array, weight: QuantizedWeight, hooks: Hooks, *, interpret: bool) -> jax.Array:
    if not interpret:
        return quantized_matmul(x, weight, hooks, backend="gpu")
    from pallas_kernels.triton_host import Interpreter

    kernel_x, hooks, x_scales = prepare(x, hooks)
    launch = launch_of(kernel_x, weight, hooks, chip=chip_named("t4"), x_scales=x_scales, out_dtype=x.dtype)
    with Interpreter() as interpreter:
        return finish(jnp.asarray(interpreter.run(launch)[0]), hooks, x.dtype)


def _run_attention(spec: ArgSpec, arguments: tuple[Any, ...], *, interpret: bool) -> tuple[Any, KVPages]:
    q, k, v, pages, batch, slopes = arguments
    if not interpret:
        kernel: Attention = jax.jit(paged_attention_gpu, static_argnums=5)
        return kernel(q, k, v, pages, batch, masking_of(spec), slopes)
    from pallas_kernels.triton_host import Interpreter

    tiles = choose_tiles(Sizes.of(q, k, pages, batch), chip_named("t4"))
    wide = spec.dtype == "bfloat16"  # Triton's interpreter multiplies matrices of bfloat16 bit by bit
    launch = make_launch(q, k, v, pages, batch, masking_of(spec), slopes, tiles, wide=wide)
    with Interpreter() as interpreter:
        results = tuple(map(jnp.asarray, interpreter.run(launch)))
    return merge(results, batch, q.dtype, len(launch.updated))


def _run_mosaic_gpu(spec: ArgSpec, arguments: tuple[Any, ...], *, interpret: bool) -> tuple[Any, KVPages]:
    q, k, v, pages, batch, slopes = arguments
    chip = chip_named("h100") if interpret else None
    kernel: Attention = jax.jit(
        partial(mosaic_gpu.paged_attention_mosaic_gpu, chip=chip, interpret=interpret), static_argnums=5
    )
    return kernel(q, k, v, pages, batch, masking_of(spec), slopes)


def first_line(error: Exception) -> str:
    """The beginning of an error's message, for a cell of a table."""
    return (str(error) or repr(error)).splitlines()[0][:60]


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


__all__ = ["TOLERANCE", "correctness", "first_line"]
