"""The model of fast memory: padding, copies, and what is said of tiles that do not fit."""

import jax.numpy as jnp
import pytest

from pallas_kernels.chips import chip_named
from pallas_kernels.tiles import Buffer, TileError, check_fits, choose, native_tile, round_up, usable_bytes

V5E, H100 = chip_named("v5e"), chip_named("h100")


def test_native_tiles() -> None:
    assert [native_tile(dtype) for dtype in (jnp.float32, jnp.bfloat16, jnp.int8, jnp.int4)] == [
        (8, 128), (16, 128), (32, 128), (64, 128)
    ]  # fmt: skip
    assert native_tile(jnp.float32, 1) == (1, 128)
    assert native_tile(jnp.int8, 5) == (8, 128)


@pytest.mark.parametrize(
    ("shape", "dtype", "copies", "padded"),
    [
        ((8, 128), jnp.float32, 1, 8 * 128 * 4),
        ((9, 129), jnp.float32, 2, 2 * 16 * 256 * 4),
        ((64, 256), jnp.int4, 1, 64 * 256 // 2),
        ((65, 256), jnp.uint4, 1, 128 * 256 // 2),
        ((3, 17, 128), jnp.bfloat16, 1, 3 * 32 * 128 * 2),
        ((128,), jnp.float32, 1, 128 * 4),
        ((), jnp.float32, 1, 128 * 4),
    ],
)
def test_vmem_is_padded_and_shared_memory_is_not(
    shape: tuple[int, ...], dtype: object, copies: int, padded: int
) -> None:
    buffer = Buffer(name="x", shape=shape, dtype=dtype, copies=copies)  # type: ignore[arg-type]
    assert buffer.vmem_bytes() == padded
    elements = 1
    for size in shape:
        elements *= size
    bits = 4 if "int4" in str(jnp.dtype(dtype)) else jnp.dtype(dtype).itemsize * 8  # type: ignore[arg-type]
    assert buffer.shared_bytes() == copies * elements * bits // 8


def test_what_does_not_fit_is_an_error_with_the_numbers() -> None:
    big = Buffer(name="w", shape=(32768, 2048), dtype=jnp.int8, copies=2)
    with pytest.raises(TileError) as caught:
        check_fits("quantized_matmul", [big], V5E, "take a smaller tile_n")
    assert str(caught.value) == (
        "quantized_matmul: needs 134,217,728 bytes of VMEM, v5e has 120,795,955 "
        "(w 2 × int8[32768, 2048]: 134,217,728); take a smaller tile_n"
    )
    assert check_fits("quantized_matmul", [Buffer(name="w", shape=(32, 128), dtype=jnp.int8)], V5E, "") == 4096


def test_the_cheapest_that_fits_is_chosen() -> None:
    def buffers(tile: int) -> list[Buffer]:
        return [Buffer(name="tile", shape=(tile, 128), dtype=jnp.float32)]

    widths = [64, 128, 256, 512, 1024]
    assert choose("op", widths, buffers, lambda tile: -tile, H100, "") == 256  # 131,072 of 232,448 bytes
    assert usable_bytes(H100) == 227 * 1024
    with pytest.raises(TileError, match=r"op, tiles 512: needs 262,144 bytes of shared memory, h100 has 232,448"):
        choose("op", [1024, 512], buffers, lambda tile: tile, H100, "")
    with pytest.raises(TileError, match="there are no tiles for it; pad it"):
        choose("op", [], buffers, lambda tile: tile, H100, "pad it")


def test_round_up() -> None:
    assert [round_up(size, 8) for size in (0, 1, 8, 9)] == [0, 8, 8, 16]
