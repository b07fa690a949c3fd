"""Flash attention on NVIDIA GPUs by cuDNN, through `jax.nn.dot_product_attention`.

cuDNN (https://docs.nvidia.com/deeplearning/cudnn/frontend/latest/operations/Attention.html) serves float16 and bfloat16
from compute capability 8.0 on, with causal masks, windows under these, and grouped queries, of any length, and has
gradients. JAX gives it no soft caps and no ALiBi. Whether the cuDNN that there is takes a head of some size is for JAX
to say, which asks it where the program is traced: on the machine that has the GPU.
"""

import jax
from jax import Array

from pallas_kernels.chips import Chip, UnknownChipError, limits_of
from pallas_kernels.flash_attention.types import Masking, Sizes

DTYPES = ("bfloat16", "float16")
LEAST_CAPABILITY = 80


def unsupported_reason(sizes: Sizes, masking: Masking, chip: Chip | None = None) -> str | None:
    """None if cuDNN takes arguments of these sizes, else why not, with the numbers; in JAX's words where it knows."""
    if sizes.dtype.name not in DTYPES:
        return f"cuDNN's queries are {' or '.join(DTYPES)}, not {sizes.dtype}"
    try:
        chip = limits_of(jax.devices()[0]) if chip is None else chip
    except UnknownChipError as error:
        return str(error)
    if chip.capability is None or chip.capability < LEAST_CAPABILITY:
        return f"{chip.name}: cuDNN's attention needs compute capability {LEAST_CAPABILITY / 10} or later"
    if masking.softcap is not None or sizes.has_slopes:
        return f"JAX gives cuDNN no {'soft caps' if masking.softcap is not None else 'ALiBi slopes'}"
    if masking.window is not None and not masking.causal:
        return "cuDNN has windows under a causal mask only"
    if sizes.value_dim != sizes.head_dim:
        return f"JAX gives cuDNN values of the size of keys: {sizes.value_dim} are not {sizes.head_dim}"
    rows = (sizes.batch, sizes.seq_len)
    q = jax.ShapeDtypeStruct((*rows, sizes.num_heads, sizes.head_dim), sizes.dtype)
    k = jax.ShapeDtypeStruct((*rows, sizes.num_kv_heads, sizes.head_dim), sizes.dtype)
    try:
        jax.eval_shape(lambda q, k, v: flash_attention_cudnn(q, k, v, masking), q, k, k)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return f"cuDNN: {(str(error) or repr(error)).splitlines()[0]}"
    return None


def flash_attention_cudnn(
    q: Array, k: Array, v: Array, masking: Masking, slopes: Array | None = None, *, chip: Chip | None = None
) -> Array:
    """As `api.flash_attention`, whose checks it takes as made; `chip` is only asked for by those."""
    assert slopes is None, "unsupported_reason said so"
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=masking.scale,
        is_causal=masking.causal,
        local_window_size=None if masking.window is None else (masking.window - 1, 0),
        implementation="cudnn",
    )


__all__ = ["flash_attention_cudnn", "unsupported_reason"]
