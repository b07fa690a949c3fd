"""Flash attention's part of `make gpu-check`: what each backend gives, and what to time."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.chips import chip_named
from pallas_kernels.flash_attention import Sizes, flash_attention, unsupported_reason
from pallas_kernels.flash_attention.api import Backend
from pallas_kernels.flash_attention.arg_specs import ArgSpec, random_arguments
from pallas_kernels.flash_attention.gpu import choose_tiles, make_launch
from pallas_kernels.flash_attention.reference import flash_attention_reference

NAMES: dict[Backend, str] = {"cudnn": "flash attention, cuDNN", "gpu": "flash attention, Triton"}
LONGEST = 2048
"""Tokens of a sequence that is compared with the reference, which keeps a matrix of scores."""


def flash_call(spec: ArgSpec, backend: Backend, slopes: Array | None) -> Callable[[Array, Array, Array], Array]:
    """The attention of the shape, of q, k and v."""
    masking = spec.masking

    def call(q: Array, k: Array, v: Array) -> Array:
        return flash_attention(
            q,
            k,
            v,
            scale=masking.scale,
            causal=masking.causal,
            window=masking.window,
            softcap=masking.softcap,
            slopes=slopes,
            backend=backend,
        )

    return call


def served(spec: ArgSpec) -> list[Backend]:
    """The backends that take the shape on this GPU."""
    sizes = Sizes.of(*spec.structs())
    return [backend for backend in NAMES if unsupported_reason(sizes, spec.masking, backend) is None]


def flash_results(
    specs: Sequence[ArgSpec], *, interpret: bool
) -> Iterator[tuple[str, ArgSpec, Callable[[], Array], Array]]:
    """Backend and shape, what to run and what the reference gives; with `interpret`, of the Triton kernel alone."""
    for spec in specs:
        q, k, v, slopes = random_arguments(spec)
        expected = flash_attention_reference(q, k, v, spec.masking, slopes)
        if interpret:
            yield NAMES["gpu"], spec, partial(_interpreted, spec, q, k, v, slopes), expected
            continue
        for backend in served(spec):
            yield NAMES[backend], spec, partial(jax.jit(flash_call(spec, backend, slopes)), q, k, v), expected


def _interpreted(spec: ArgSpec, q: Array, k: Array, v: Array, slopes: Array | None) -> Array:
    from pallas_kernels.triton_host import Interpreter

    tiles = choose_tiles(Sizes.of(q, k, v, slopes), chip_named("t4"))
    with Interpreter() as interpreter:
        return jnp.asarray(interpreter.run(make_launch(q, k, v, spec.masking, slopes, tiles, wide=False))[0])


__all__ = ["LONGEST", "NAMES", "flash_call", "flash_results", "served"]
