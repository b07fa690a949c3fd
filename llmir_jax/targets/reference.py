"""What each op of the llm dialect computes, as a JAX function of its operands: correct on any backend.

`decomposition` gives the function of an op. Operands of a quantized or sharded type come as the tensors that hold them
(their ``parts``), one argument each; optional operands that the op lacks are left out. Collectives, which are no
functions of one device's values, and the ops of an abstract KV cache are lowered by passes.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike
from xdsl.dialects.builtin import DenseIntOrFPElementsAttr, IntegerType, TensorType
from xdsl.ir import Attribute, Operation

from llmir_jax.dense import dense_to_numpy, element_dtype
from llmir_jax.dialects import llm
from llmir_jax.dialects.llm.common import (
    bool_of,
    float_of,
    int_of,
    optional_float_of,
    optional_int_of,
)
from llmir_jax.errors import InvalidIRError
from llmir_jax.targets.paged_reference import Pages, QuantizedPages, attend_pages, write_pages
from llmir_jax.targets.quantized_reference import (
    Decode,
    dequantize_parts,
    encode_mixed,
    encode_parts,
    is_in_columns,
    observe_absmax,
    observe_gram,
    observe_histogram,
    quantized_gather,
    quantized_matmul,
    round_activations,
)
from llmir_jax.targets.ring_reference import Ring
from llmir_jax.transforms.sharding_attributes import mesh_of

Reference = Callable[..., Array | tuple[Array, ...]]


def accumulator(*dtypes: DTypeLike) -> np.dtype[Any]:
    """The dtype that sums are taken in: float32, or float64 where any of the dtypes is."""
    return np.dtype(jnp.result_type(jnp.float32, *dtypes))


# -- attention ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How an attention op turns products of queries and keys into weights; see `llm.AttentionOp`."""

    scale: float
    causal: bool = True
    window: int | None = None
    softcap: float | None = None

    @staticmethod
    def of(
        op: llm.AttentionOp | llm.AttendPagesOp | llm.SequenceParallelAttentionOp | llm.DistributedAttentionOp,
        head_dim: int,
    ) -> "Scoring":
        """The properties of an op; the scale is 1/√head_dim where it has none."""
        return Scoring(
            scale=head_dim**-0.5 if op.scale is None else float_of(op.scale),
            causal=bool_of(op.causal),
            window=optional_int_of(op.window),
            softcap=optional_float_of(op.softcap),
        )

    def visible(self, q_pos: Array, k_pos: Array) -> Array:
        """Which keys each query sees, for positions that broadcast against each other."""
        seen = jnp.broadcast_to(True, jnp.broadcast_shapes(q_pos.shape, k_pos.shape))
        if self.causal:
            seen &= k_pos <= q_pos
        if self.window is not None:
            seen &= k_pos > q_pos - self.window
        return seen

    def scores(self, products: Array, distance: Array, slopes: Array | None) -> Array:
        """Scores of products q·k [Hkv, M, T, L] at distances k_pos − q_pos [T, L]; slopes [Hkv · M]."""
        scores = products * self.scale
        if self.softcap is not None:
            scores = self.softcap * jnp.tanh(scores / self.softcap)
        if slopes is None:
            return scores
        per_head = slopes.astype(scores.dtype).reshape(*scores.shape[:2], 1, 1)
        return scores + per_head * distance.astype(scores.dtype)


def softmax_of_visible(scores: Array, seen: Array) -> Array:
    """Softmax over the last dimension, over what is seen; zeros where nothing is."""
    masked = jnp.where(seen, scores, -jnp.inf)
    largest = jnp.max(masked, axis=-1, keepdims=True)
    weights = jnp.exp(masked - jnp.where(jnp.isfinite(largest), largest, 0))
    return weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), np.finfo(scores.dtype).tiny)


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    scoring: Scoring,
    q_positions: Array,
    slopes: Array | None = None,
    seq_ids: Array | None = None,
) -> Array:
    """Attention of queries to keys, accumulated in float32: [T, H, Dv].

    Args:
        q: [T, H, D].
        k, v: [L, Hkv, D] and [L, Hkv, Dv], or with ``seq_ids`` [S, L, Hkv, D] and [S, L, Hkv, Dv].
        scoring: scale, soft-cap and visibility.
        q_positions: int32 [T]; key j is at position j.
        slopes: [H], added to scores times (key position − query position).
        seq_ids: int32 [T], which of the S sequences each query belongs to.
    """
    num_rows, num_heads, head_dim = q.shape
    length, num_kv_heads = k.shape[-3:-1]
    dtype = accumulator(q.dtype, k.dtype, v.dtype)
    grouped = q.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim).astype(dtype)
    keys, values = (x.astype(dtype) if seq_ids is None else x[seq_ids].astype(dtype) for x in (k, v))
    key_dims = "lgd" if seq_ids is None else "tlgd"
    products = jnp.einsum(f"tgmd,{key_dims}->gmtl", grouped, keys)
    q_pos = q_positions[:, None]
    k_pos = jnp.arange(length, dtype=q_positions.dtype)[None, :]
    scores = scoring.scores(products, k_pos - q_pos, slopes)
    weights = softmax_of_visible(scores, scoring.visible(q_pos, k_pos))
    attended = jnp.einsum(f"gmtl,{key_dims}->tgmd", weights, values)
    return attended.reshape(num_rows, num_heads, -1)


def _attention(op: llm.AttentionOp) -> Reference:
    names = _present(op, "q", "k", "v", "slopes", "seq_ids", "positions")
    scoring = Scoring.of(op, _shape(op.q.type)[2])
    dtype = _dtype(op.output.type)

    def run(*operands: Array) -> Array:
        given = dict(zip(names, operands, strict=True))
        positions = given.pop("positions", None)
        if positions is None:
            positions = jnp.arange(given["q"].shape[0], dtype=jnp.int32)
        with matmul_precision(op):
            return attention(**given, scoring=scoring, q_positions=positions).astype(dtype)

    return run


def matmul_precision(op: llm.AttentionOp) -> AbstractContextManager[Any]:
    """A context in which products are as precise as the attention's are to be."""
    return jax.default_matmul_precision("highest") if op.is_precise else nullcontext()


def _sequence_parallel_attention(op: llm.SequenceParallelAttentionOp) -> Reference:
    scoring = Scoring.of(op, _shape(op.q.type)[-1])
    dtype = _dtype(op.output.type)
    has_batch = len(_shape(op.q.type)) == 4
    start, length = int_of(op.seq_start), int_of(op.seq_length)

    def run(q: Array, k: Array, v: Array) -> Array:
        attend = partial(attention, scoring=scoring, q_positions=jnp.arange(start, start + length, dtype=jnp.int32))
        return (jax.vmap(attend) if has_batch else attend)(q, k, v).astype(dtype)

    return run


def _attend_pages(op: llm.AttendPagesOp) -> Reference:
    scoring = Scoring.of(op, _shape(op.q.type)[2])
    dtype, ring = _dtype(op.output.type), _ring(op)
    shards = 1 if op.shards is None else int_of(op.shards)

    def run(q: Array, *operands: Array) -> Array:
        (k_pages, v_pages), rest = _pages((op.k_pages.type, op.v_pages.type), operands)
        attend = partial(attend_pages, shards=shards) if ring is None else ring.attend_pages
        attended = attend(
            q,
            k_pages,
            v_pages,
            *rest,
            scale=scoring.scale,
            causal=scoring.causal,
            window=scoring.window,
            softcap=scoring.softcap,
        )
        return attended.astype(dtype)

    return run


def _ring(op: llm.AttendPagesOp | llm.WritePagesOp) -> Ring | None:
    return None if op.ring is None else Ring(mesh=mesh_of(op.ring.data))


def _write_pages(op: llm.WritePagesOp) -> Reference:
    ring = _ring(op)

    def run(*operands: Array) -> tuple[Array, ...]:
        (k_pages, v_pages), rest = _pages((op.k_pages.type, op.v_pages.type), operands)
        if ring is not None:
            return ring.write_pages(k_pages, v_pages, *rest)
        return write_pages(k_pages, v_pages, *rest, shards=1 if op.shards is None else int_of(op.shards))

    return run


def _pages(kinds: Sequence[Attribute], operands: Sequence[Array]) -> tuple[list[Pages], list[Array]]:
    """Page arrays of these types from the operands that hold them, and the other operands."""
    remaining = list(operands)
    pages: list[Pages] = []
    for kind in kinds:
        if not isinstance(kind, llm.QuantizedTensorType):
            pages.append(remaining.pop(0))
            continue
        parts = tuple(remaining.pop(0) for _ in kind.parts())
        encode, decode = partial(encode_parts, kind), dequantize_parts(kind)
        pages.append(QuantizedPages(parts=parts, encode=encode, decode=decode, shape=kind.get_shape()))
    return pages, remaining


# -- layers ------------------------------------------------------------------------------------------------------------


def rms_norm(x: Array, w: Array, *, epsilon: float, offset: float) -> Array:
    """Root-mean-square norm of [..., C] by weights [C], in float32, of x's dtype."""
    wide = x.astype(accumulator(x.dtype, w.dtype))
    scaled = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (scaled * (w.astype(wide.dtype) + offset)).astype(x.dtype)


def layer_norm(x: Array, w: Array, b: Array, *, epsilon: float) -> Array:
    """Layer norm of [..., C] by weights and biases [C], in float32, of x's dtype."""
    wide = x.astype(accumulator(x.dtype, w.dtype, b.dtype))
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    scaled = centred * lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + epsilon)
    return (scaled * w.astype(wide.dtype) + b.astype(wide.dtype)).astype(x.dtype)


def rope(x: Array, cos: Array, sin: Array, *, interleaved: bool) -> Array:
    """Rotary positions: [T, H, D] by cos, sin [T, rotary_dim / 2], of x's dtype."""
    half = cos.shape[-1]
    rotated, kept = x[..., : 2 * half], x[..., 2 * half :]
    c, s = cos[:, None, :], sin[:, None, :]
    pairs = rotated.reshape(*x.shape[:-1], half, 2) if interleaved else rotated.reshape(*x.shape[:-1], 2, half)
    axis = -1 if interleaved else -2
    a, b = lax.index_in_dim(pairs, 0, axis, False), lax.index_in_dim(pairs, 1, axis, False)
    turned = jnp.stack([a * c - b * s, b * c + a * s], axis=axis).reshape(rotated.shape)
    return jnp.concatenate([turned.astype(x.dtype), kept], axis=-1)


def matmul(x: Array, w: Array, *, transpose_w: bool, dtype: DTypeLike) -> Array:
    """x·w (x·wᵀ) over the last dimension of x, accumulated in ``dtype``: [..., N]."""
    common = jnp.promote_types(x.dtype, w.dtype)
    dims = (((x.ndim - 1,), (1 if transpose_w else 0,)), ((), ()))
    return lax.dot_general(x.astype(common), w.astype(common), dims, preferred_element_type=np.dtype(dtype))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def _rms_norm(op: llm.RMSNormOp) -> Reference:
    return partial(rms_norm, epsilon=float_of(op.epsilon), offset=float_of(op.offset))


def _layer_norm(op: llm.LayerNormOp) -> Reference:
    return partial(layer_norm, epsilon=float_of(op.epsilon))


def _rope(op: llm.RopeOp) -> Reference:
    return partial(rope, interleaved=bool_of(op.interleaved))


def _linear(op: llm.LinearOp) -> Reference:
    dtype, transpose_w = _dtype(op.output.type), bool_of(op.transpose_w)

    def run(x: Array, w: Array, b: Array | None = None) -> Array:
        product = matmul(x, w, transpose_w=transpose_w, dtype=accumulator(dtype))
        return (product if b is None else product + b.astype(product.dtype)).astype(dtype)

    return run


def _gated_mlp(op: llm.GatedMLPOp) -> Reference:
    activation = ACTIVATIONS[op.activation.data]
    transposes = [bool_of(flag) for flag in (op.transpose_gate, op.transpose_up, op.transpose_down)]
    dtype = _dtype(op.output.type)

    def run(x: Array, gate_w: Array, up_w: Array, down_w: Array) -> Array:
        wide = accumulator(x.dtype)
        gate, up = (
            matmul(x, w, transpose_w=transposed, dtype=wide).astype(x.dtype)
            for w, transposed in zip((gate_w, up_w), transposes[:2], strict=True)
        )
        return matmul(activation(gate) * up, down_w, transpose_w=transposes[2], dtype=wide).astype(dtype)

    return run


# -- quantization ------------------------------------------------------------------------------------------------------


def _channel_values(attr: Attribute) -> np.ndarray[Any, Any]:
    """A scale or zero point given as an attribute: a scalar, or one number for each index of the last dimension."""
    if not isinstance(attr, DenseIntOrFPElementsAttr):
        return np.asarray(attr.value.data)  # type: ignore[attr-defined]
    values = np.asarray(dense_to_numpy(attr))
    return np.broadcast_to(values, attr.get_shape())


def _given_scales(op: llm.QuantizeOp | llm.DequantizeOp) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    assert op.scale is not None
    zero_point = np.int32(0) if op.zero_point is None else _channel_values(op.zero_point).astype(np.int32)
    return _channel_values(op.scale).astype(np.float32), np.asarray(zero_point)


def _quantize(op: llm.QuantizeOp) -> Reference:
    output_type = op.output.type
    if isinstance(output_type, llm.MixedQuantizedTensorType):
        assert op.wide_rows is not None
        return partial(encode_mixed, output_type, [int(row) for row in op.wide_rows.get_values()])
    if isinstance(output_type, llm.QuantizedTensorType):
        return partial(encode_parts, output_type)
    assert isinstance(output_type, TensorType)
    assert isinstance(output_type.element_type, IntegerType)
    low, high = llm.storage_range(output_type.element_type)
    scale, zero_point = _given_scales(op)
    dtype = _dtype(output_type)

    def run(x: Array) -> Array:
        rounded = jnp.round(x.astype(jnp.float32) / scale) + zero_point.astype(np.float32)
        return jnp.clip(rounded, low, high).astype(jnp.int32).astype(dtype)

    return run


def _dequantize(op: llm.DequantizeOp) -> Reference:
    dtype = _dtype(op.output.type)
    q_type = op.q.type
    if isinstance(q_type, llm.QuantizedTensorType | llm.MixedQuantizedTensorType):
        decode = dequantize_parts(q_type)
        return lambda *parts: decode(*parts).astype(dtype)
    scale, zero_point = _given_scales(op)
    return lambda q: ((q.astype(jnp.int32) - zero_point).astype(jnp.float32) * scale).astype(dtype)


def _quantized_matmul(op: llm.QuantizedMatmulOp) -> Reference:
    decode: Decode | None = None
    if isinstance(op.w.type, llm.QuantizedTensorType | llm.MixedQuantizedTensorType):
        decode = dequantize_parts(op.w.type)
    multiply = partial(
        quantized_matmul,
        decode=decode,
        group_size=optional_int_of(op.group_size),
        transpose_w=bool_of(op.transpose_w),
        dtype=_dtype(op.output.type),
        in_columns=is_in_columns(op.w.type),
    )
    if op.activation_bits is None:
        return multiply
    group_size = optional_int_of(op.activation_group_size)
    if op.activation_scales is None:
        return lambda x, *weight: multiply(round_activations(x, group_size), *weight)

    def run(x: Array, *operands: Array) -> Array:
        *weight, scales = operands
        return multiply(round_activations(x, group_size, scales), *weight)

    return run


def _quantized_gather(op: llm.QuantizedGatherOp) -> Reference:
    assert isinstance(op.w.type, llm.QuantizedTensorType | llm.MixedQuantizedTensorType)
    return partial(
        quantized_gather,
        decode=dequantize_parts(op.w.type),
        dtype=_dtype(op.output.type),
        in_columns=is_in_columns(op.w.type),
    )


def _observe(op: llm.ObserveOp) -> Reference:
    return {"absmax": observe_absmax, "gram": observe_gram, "histogram": observe_histogram}[op.statistic.data]


# -- shards ------------------------------------------------------------------------------------------------------------


def _sharded_linear(op: llm.ShardedLinearOp) -> Reference:
    dim, num_shards, shard_id = int_of(op.shard_dim), int_of(op.num_shards), int_of(op.shard_id)
    is_whole = isinstance(op.w.type, TensorType)
    dtype = _dtype(op.output.type)

    def part(whole: Array, axis: int) -> Array:
        size = whole.shape[axis] // num_shards
        return lax.slice_in_dim(whole, shard_id * size, (shard_id + 1) * size, axis=axis)

    def run(x: Array, w: Array, b: Array | None = None) -> Array:
        shard = part(w, dim) if is_whole else w
        product = matmul(x, shard, transpose_w=False, dtype=accumulator(dtype))
        if b is not None and dim == 1:
            product += part(b, 0).astype(product.dtype)
        if b is not None and dim == 0 and shard_id == 0:
            product += b.astype(product.dtype)
        return product.astype(dtype)

    return run


# -- ops to functions --------------------------------------------------------------------------------------------------


def _shape(type_: Attribute) -> tuple[int, ...]:
    assert isinstance(type_, TensorType)
    return type_.get_shape()


def _dtype(type_: Attribute) -> np.dtype[Any]:
    assert isinstance(type_, TensorType)
    return element_dtype(type_.element_type)


def _present(op: Operation, *names: str) -> Sequence[str]:
    return [name for name in names if getattr(op, name) is not None]


DECOMPOSITIONS: dict[type[Operation], Callable[[Any], Reference]] = {
    llm.AttendPagesOp: _attend_pages,
    llm.AttentionOp: _attention,
    llm.DequantizeOp: _dequantize,
    llm.GatedMLPOp: _gated_mlp,
    llm.LayerNormOp: _layer_norm,
    llm.LinearOp: _linear,
    llm.ObserveOp: _observe,
    llm.QuantizeOp: _quantize,
    llm.QuantizedGatherOp: _quantized_gather,
    llm.QuantizedMatmulOp: _quantized_matmul,
    llm.RMSNormOp: _rms_norm,
    llm.RopeOp: _rope,
    llm.SequenceParallelAttentionOp: _sequence_parallel_attention,
    llm.ShardedLinearOp: _sharded_linear,
    llm.WritePagesOp: _write_pages,
}
"""From an op to its function, by type."""


def decomposition(op: Operation) -> Reference:
    """The JAX function that computes the op's results from its operands.

    It takes one array for each operand that the op has, in order, and for an operand of a quantized or sharded type
    one for each of its parts; it returns an array, or a tuple of them, of the types of the results (or their parts).

    Raises:
        InvalidIRError: the op computes nothing that is a function of its operands on one device.
    """
    found = DECOMPOSITIONS.get(type(op))
    if found is None:
        raise InvalidIRError(f"{op.name} has no reference decomposition")
    return found(op)
