"""Flash attention: the reference against attention written out, the TPU's kernel, interpreted, against that."""

import dataclasses
import functools
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.chips import chip_named
from pallas_kernels.flash_attention import FlashAttentionError, Sizes, flash_attention, unsupported_reason
from pallas_kernels.flash_attention.arg_specs import SPECS, ArgSpec, random_arguments
from pallas_kernels.flash_attention.tpu import SCOPED_VMEM_BYTES, Tiles, buffers_of, choose_tiles, num_visible
from pallas_kernels.tiles import TileError, total_bytes

SMALL = ArgSpec(name="small", num_heads=4, num_kv_heads=2, head_dim=16, seq_len=140, batch=2, dtype="float32")
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}
"""Of results that are weighted means of about-normal values: a few roundings of the dtype."""


def _shapes() -> list[tuple[ArgSpec, Tiles | None]]:
    """Shapes that share their compiled programs: every length with every mask, the rest drawn once for each."""
    rng = np.random.default_rng(0)
    lengths = (1, 128, 300)
    masks = ((True, None), (True, 9), (False, None), (False, 9))
    heads = ((4, 2), (3, 1), (2, 2))
    shapes = []
    for number, (seq_len, (causal, window)) in enumerate(product(lengths, masks)):
        num_heads, num_kv_heads = heads[number % len(heads)]
        spec = dataclasses.replace(
            SMALL,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=int(rng.choice([8, 16, 80])),
            value_dim=int(rng.choice([8, 16])),
            seq_len=seq_len,
            batch=int(rng.choice([1, 2])),
            dtype=str(rng.choice(["float32", "bfloat16"])),
            causal=causal,
            window=window,
            softcap=2.0 if rng.random() < 0.5 else None,
        )
        shapes.append((spec, [None, Tiles(queries=128, keys=256), Tiles(queries=256, keys=128)][number % 3]))
    return shapes


SHAPES = _shapes()


@functools.cache
def compiled(spec: ArgSpec, backend: str, tiles: Tiles | None = None) -> Any:
    options = {"interpret": True, "tiles": tiles} if backend == "tpu" else {}
    masks = {"causal": spec.causal, "window": spec.window, "softcap": spec.softcap}

    def call(q: Any, k: Any, v: Any, slopes: Any) -> Any:
        return flash_attention(q, k, v, slopes=slopes, backend=backend, **masks, **options)

    return jax.jit(call)


def written_out(spec: ArgSpec, q: Any, k: Any, v: Any, slopes: Any) -> np.ndarray[Any, Any]:
    """One query and head at a time."""
    out = np.zeros((*q.shape[:3], v.shape[3]), np.float32)
    for batch, t, head in product(*map(range, q.shape[:3])):
        own = head // (spec.num_heads // spec.num_kv_heads)
        last = t + 1 if spec.causal else spec.seq_len
        first = 0 if spec.window is None else max(0, t - spec.window + 1)
        scores = k[batch, first:last, own] @ q[batch, t, head] * spec.head_dim**-0.5
        if spec.softcap is not None:
            scores = spec.softcap * np.tanh(scores / spec.softcap)
        if slopes is not None:
            scores = scores + slopes[head] * (np.arange(first, last) - t)
        weights = np.exp(scores - scores.max())
        out[batch, t, head] = weights / weights.sum() @ v[batch, first:last, own]
    return out


@pytest.mark.parametrize("causal", [True, False])
def test_reference_is_attention_written_out(causal: bool) -> None:
    spec = dataclasses.replace(SMALL, seq_len=21, value_dim=8, causal=causal, window=9, softcap=3.0, alibi=True)
    arguments = random_arguments(spec)
    expected = written_out(spec, *map(np.asarray, arguments))
    np.testing.assert_allclose(compiled(spec, "reference")(*arguments), expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=220, deadline=None, derandomize=True)
@given(case=st.tuples(st.sampled_from(SHAPES), st.integers(0, 10**6)))
def test_random_sequences(case: tuple[tuple[ArgSpec, Tiles | None], int]) -> None:
    (spec, tiles), seed = case
    arguments = random_arguments(spec, seed=seed)
    expected = compiled(spec, "reference")(*arguments)
    got = compiled(spec, "tpu", tiles)(*arguments)
    assert got.dtype == expected.dtype
    tolerance = TOLERANCE[spec.dtype]
    np.testing.assert_allclose(np.float32(got), np.float32(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (9, 2.0)])
def test_gradients_are_the_references(window: int | None, softcap: float | None) -> None:
    spec = dataclasses.replace(SMALL, window=window, softcap=softcap)
    q, k, v, _ = random_arguments(spec)

    def gradients(backend: str) -> Any:
        def loss(q: Any, k: Any, v: Any) -> Any:
            return jnp.sum(jnp.sin(compiled(spec, backend)(q, k, v, None)))

        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    for got, expected in zip(gradients("tpu"), gradients("reference"), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def sizes_of(spec: ArgSpec) -> Sizes:
    return Sizes.of(*spec.structs())


@pytest.mark.parametrize("chip", ["v5e", "v6e", "v5p", "tpu7x"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_tiles_fit_what_the_compiler_gives_a_kernel(spec: ArgSpec, chip: str) -> None:
    tiles = choose_tiles(sizes_of(spec), spec.masking, chip_named(chip))
    assert total_bytes(buffers_of(sizes_of(spec), tiles), chip_named(chip)) <= SCOPED_VMEM_BYTES[chip]
    assert tiles.padded(spec.seq_len) < 2 * spec.seq_len


def test_tiles_that_are_visible_are_counted() -> None:
    for causal, window, queries, keys in product((True, False), (None, 1, 100, 129, 300), (128, 256), (128, 256)):
        spec = dataclasses.replace(SMALL, seq_len=600, causal=causal, window=window)
        tiles = Tiles(queries=queries, keys=keys)
        at = np.arange(tiles.padded(600))
        seen = np.ones((len(at), len(at)), bool)
        if causal:
            seen &= at[None, :] <= at[:, None]
        if window is not None:
            seen &= at[None, :] > at[:, None] - window
        blocks = seen.reshape(len(at) // queries, queries, len(at) // keys, keys).any((1, 3))
        assert num_visible(600, spec.masking, tiles) == blocks.sum()


def test_what_no_kernel_takes_is_said() -> None:
    v5e, masking = chip_named("v5e"), SMALL.masking
    assert unsupported_reason(sizes_of(SMALL), masking, "tpu", v5e) is None
    wrong = dataclasses.replace(SMALL, dtype="float16")
    assert unsupported_reason(sizes_of(wrong), masking, "tpu", v5e) == "queries are float16, not float32 or bfloat16"
    wrong = dataclasses.replace(SMALL, alibi=True)
    assert unsupported_reason(sizes_of(wrong), masking, "tpu", v5e) == "splash attention has no ALiBi slopes"
    wrong = dataclasses.replace(SMALL, head_dim=1 << 15, value_dim=8)
    reason = unsupported_reason(sizes_of(wrong), masking, "tpu", v5e)
    assert reason is not None
    assert "heads of 32768 in float32, tiles Tiles(queries=128, keys=128): needs 67," in reason
    with pytest.raises(FlashAttentionError, match=r"flash_attention on tpu: queries are float16.*backend='reference'"):
        flash_attention(*random_arguments(dataclasses.replace(SMALL, dtype="float16"))[:3], backend="tpu")


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"backend": "xla"}, "backend: expected one of reference, tpu, cudnn, gpu, got 'xla'"),
        ({}, {"interpret": True}, "backend 'reference' has no option interpret"),
        ({}, {"window": 0}, "window: expected at least 1 position, got 0"),
        ({}, {"softcap": -1.0}, "softcap: expected a positive finite number, got -1.0"),
        ({}, {"scale": float("nan")}, "scale: expected a finite number, got nan"),
        ({"num_heads": 3}, {}, "q: expected a number of heads that is a multiple of the 2 KV heads, got 3"),
        ({"dtype": "int32"}, {}, "q: expected float32 or bfloat16 or float16, got int32"),
    ],
)
def test_arguments_that_do_not_fit(changes: dict[str, Any], options: dict[str, Any], message: str) -> None:
    q, k, v, _ = dataclasses.replace(SMALL, **changes).structs()
    with pytest.raises(FlashAttentionError, match=message):
        flash_attention(q, k, v, **options)


def test_keys_of_another_shape() -> None:
    q, k, v, _ = SMALL.structs()
    with pytest.raises(FlashAttentionError, match=r"k: expected shape \[2, 140, 2, 16\], got \[2, 141, 2, 16\]"):
        flash_attention(q, jax.ShapeDtypeStruct((2, 141, 2, 16), k.dtype), v)
    with pytest.raises(FlashAttentionError, match=r"v: expected 4 dimensions, got shape \[140, 2, 16\]"):
        flash_attention(q, k, jax.ShapeDtypeStruct((140, 2, 16), v.dtype))


@pytest.mark.parametrize(
    ("tiles", "error", "message"),
    [
        (Tiles(queries=100, keys=128), FlashAttentionError, "expected multiples of 128 of which one divides the other"),
        (Tiles(queries=256, keys=384), FlashAttentionError, "got 256 queries and 384 keys"),
        (Tiles(queries=4096, keys=4096), TileError, r"needs [\d,]+ bytes of VMEM, v5e has 16,777,215"),
    ],
)
def test_tiles_that_cannot_be(tiles: Tiles, error: type[Exception], message: str) -> None:
    q, k, v, _ = SMALL.structs()
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda q, k, v: flash_attention(q, k, v, backend="tpu", interpret=True, tiles=tiles), q, k, v)
