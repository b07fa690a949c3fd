"""GGUF's Q4_0, Q4_1 and Q8_0 as quantized arrays: the file's own integers and scales, without a detour through floats.

A row is blocks of 32 elements:

    Q8_0   float16 d, int8 q[32]             x = d·q
    Q4_0   float16 d, uint8 p[16]            x = d·(q - 8)
    Q4_1   float16 d, float16 m, uint8 p[16] x = d·q + m        q[i], q[i + 16] = low and high four bits of p[i]

Source: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
"""

from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from llmir_jax.quantization import QuantizedArray, Scheme
from llmir_jax.quantization.array import pack

GGML = gguf.GGMLQuantizationType
BLOCK = 32
_SCHEMES: dict[Any, Scheme] = {
    GGML.Q4_0: Scheme(bits=4, group_size=BLOCK),
    GGML.Q4_1: Scheme(bits=4, group_size=BLOCK, kind="minimum"),
    GGML.Q8_0: Scheme(bits=8, group_size=BLOCK),
}


def block_scheme(kind: Any) -> Scheme | None:
    """The format of a type of tensor; None for one that has no counterpart."""
    return _SCHEMES.get(kind)


def quantized_from_blocks(raw: np.ndarray, kind: Any, dtype: DTypeLike) -> QuantizedArray:
    """The matrix [N, K] that stands for `dtype`, of the bytes of its rows uint8[N, bytes of a row]."""
    n = raw.shape[0]
    num_side = 2 if kind == GGML.Q4_1 else 1
    blocks = raw.reshape(n, -1, gguf.GGML_QUANT_SIZES[kind][1])
    num_blocks = blocks.shape[1]
    side = np.ascontiguousarray(blocks[..., : 2 * num_side]).view(np.float16)  # [N, blocks, d and m]
    stored = blocks[..., 2 * num_side :]
    if kind == GGML.Q8_0:
        values = np.ascontiguousarray(stored).view(np.int8)
    else:
        q = np.concatenate([stored & 15, stored >> 4], -1)
        # q - 8 in two's complement of four bits is q with its highest bit turned over.
        values = pack(q if kind == GGML.Q4_1 else q ^ 8)
    return QuantizedArray(
        values=jnp.asarray(values.reshape(n, -1)),
        scales=jnp.asarray(np.ascontiguousarray(side[..., 0])),
        minima=jnp.asarray(np.ascontiguousarray(side[..., 1])) if kind == GGML.Q4_1 else None,
        bits=_SCHEMES[kind].bits,
        group_size=BLOCK,
        shape=(n, num_blocks * BLOCK),
        dtype=jnp.dtype(dtype),
    )
