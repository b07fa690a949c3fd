"""A matrix of small integers with the numbers that turn them back into floats.

GGUF's blocks are such matrices: Q4_0 and Q8_0 symmetric, Q4_1 with a minimum, groups of 32, scales in float16.
"""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from llmir_jax.errors import LlmirError
from llmir_jax.quantization.scheme import Kind, Scheme

if TYPE_CHECKING:
    from llmir_jax.dialects.llm import QuantizedTensorType

AnyArray = TypeVar("AnyArray", np.ndarray, jax.Array)
Layout = Literal["rows", "columns"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class QuantizedArray:
    """A matrix x [N, K] (outputs, inputs; of an embedding: tokens, channels) in integers q of 4 or 8 bits.

    With the group size g, G = K / g groups a row, and the group j = k // g of column k:

        symmetric    x[n, k] = q[n, k] · scales[n, j]                          q signed
        zero_point   x[n, k] = (q[n, k] - zero_points[n, j]) · scales[n, j]    q signed
        minimum      x[n, k] = q[n, k] · scales[n, j] + minima[n, j]           q unsigned

    Per channel: g = K, G = 1. Per tensor: scales, zero_points and minima are [1, 1], which stands for [N, 1].

    Storage in rows, what everything makes and saves:

        bits = 8     values int8[N, K] (uint8 for `minimum`); values[n, k] = q[n, k]
        bits = 4     values uint8[N, K/2]; values[n, i] = (q[n, 2i] mod 16) + 16 · (q[n, 2i+1] mod 16)
        scales       float16, bfloat16 or float32 [N, G]
        zero_points  int8[N, G] in the range of q, for `zero_point`, else None
        minima       [N, G] of the scales' dtype, for `minimum`, else None

    Storage in columns, for the targets that `transforms.hardware_specific_quantization` gives it to: every array is
    transposed, and the integers are elements of their own width, which the device packs (JAX's int4 and uint4):

        values       int8, int4 [K, N] (uint8, uint4 for `minimum`); values[k, n] = q[n, k]
        scales       [G, N]; zero_points and minima alike

    Plain rounding (`quantize`) gives |q| ≤ 2^(bits-1) - 1 for `symmetric`, scales ≥ 0, and errors of at most half
    a scale. Other makers may use -2^(bits-1) and negative scales (Q4_0 does). Arithmetic is in float32, then cast to
    `dtype`.

    A pytree: its leaves are the arrays, in the order values, scales, zero_points, minima. Immutable.
    """

    values: jax.Array
    scales: jax.Array
    zero_points: jax.Array | None = None
    minima: jax.Array | None = None
    bits: int = field(metadata={"static": True})
    group_size: int = field(metadata={"static": True})
    shape: tuple[int, int] = field(metadata={"static": True})
    dtype: Any = field(metadata={"static": True})  # numpy dtype of the floats it stands for
    layout: Layout = field(default="rows", metadata={"static": True})

    def __repr__(self) -> str:
        return f"QuantizedArray({self.format}: {self.dtype.name}{list(self.shape)})"

    @property
    def format(self) -> str:
        """The name of its scheme, and of its layout where that is not in rows."""
        return self.scheme.name + self.layout_name

    @property
    def layout_name(self) -> str:
        """The end of `format` that is about the layout; empty in rows."""
        return "" if self.layout == "rows" else f" in {self.layout}"

    @property
    def kind(self) -> Kind:
        """Which of the three equations holds."""
        if self.minima is not None:
            return "minimum"
        return "symmetric" if self.zero_points is None else "zero_point"

    @property
    def per_tensor(self) -> bool:
        """Whether one scale serves all rows of several."""
        return self.shape[0] > 1 and self.scales.shape[self._row_axis] == 1

    @property
    def _row_axis(self) -> int:
        """The axis of all arrays along which the rows of x lie."""
        return 0 if self.layout == "rows" else 1

    @property
    def scheme(self) -> Scheme:
        """The format as a scheme. `group_size` is None where it is K."""
        return Scheme(
            bits=self.bits,
            group_size=None if self.group_size == self.shape[1] else self.group_size,
            kind=self.kind,
            scale_dtype=jnp.dtype(self.scales.dtype).name,  # type: ignore[arg-type]
            per_tensor=self.per_tensor,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays, where a device packs what is narrower than a byte."""
        return sum(math.prod(x.shape) * _num_bits(x.dtype) // 8 for x in jax.tree.leaves(self))

    @classmethod
    def shapes(cls, scheme: Scheme, shape: tuple[int, int], dtype: DTypeLike = jnp.float32) -> "QuantizedArray":
        """Of a matrix [N, K] in a scheme that fits it, in rows, with `jax.ShapeDtypeStruct`s in place of its arrays."""
        n, k = shape
        group_size = scheme.group_size or k
        groups = (1, 1) if scheme.per_tensor else (n, k // group_size)
        has_minimum = scheme.kind == "minimum"
        values = ((n, k // 2), "uint8") if scheme.bits == 4 else ((n, k), _value_dtype(8, unsigned=has_minimum))
        struct: Any = jax.ShapeDtypeStruct
        return cls(
            values=struct(*values),
            scales=struct(groups, scheme.scale_dtype),
            zero_points=struct(groups, "int8") if scheme.kind == "zero_point" else None,
            minima=struct(groups, scheme.scale_dtype) if has_minimum else None,
            bits=scheme.bits,
            group_size=group_size,
            shape=shape,
            dtype=jnp.dtype(dtype),
        )

    @classmethod
    def from_integers(
        cls,
        integers: ArrayLike,
        scales: ArrayLike,
        *,
        bits: int,
        zero_points: ArrayLike | None = None,
        minima: ArrayLike | None = None,
        dtype: DTypeLike = jnp.float32,
        name: str = "array",
    ) -> "QuantizedArray":
        """From q [N, K] as integers of any type, and scales [N, G] or [1, 1]: packed, and checked if values are known.

        Raises LlmirError, which names `name`, for shapes that do not fit together and for integers out of range.
        """
        q: Any = integers if isinstance(integers, jax.Array) else np.asarray(integers)
        low, high = _storage_range(bits, minima is not None)
        if len(q.shape) != 2 or not q.size:
            raise LlmirError(f"{name}: integers must be a matrix [N, K], got shape {list(q.shape)}")
        if not isinstance(q, jax.core.Tracer) and not (low <= int(q.min()) and int(q.max()) <= high):
            raise LlmirError(f"{name}: integers from {int(q.min())} to {int(q.max())}; expected {low} to {high}")
        if bits == 4 and q.shape[1] % 2:
            raise LlmirError(f"{name}: int4 needs an even number of columns, got {q.shape[1]}")
        stored = pack(q) if bits == 4 else q.astype(np.uint8 if minima is not None else np.int8)
        num_groups = np.shape(scales)[-1] if np.ndim(scales) else 0
        made = cls(
            values=jnp.asarray(stored),
            scales=jnp.asarray(scales),
            zero_points=None if zero_points is None else jnp.asarray(zero_points, jnp.int8),
            minima=None if minima is None else jnp.asarray(minima),
            bits=bits,
            group_size=q.shape[1] // max(num_groups, 1),
            shape=(q.shape[0], q.shape[1]),
            dtype=jnp.dtype(dtype),
        )
        made.check(name)
        return made

    def check(self, name: str = "array") -> None:
        """Raises LlmirError, which names `name`, where shapes, dtypes or the kind do not fit together."""
        if self.bits not in (4, 8):
            raise LlmirError(f"{name}: a quantized array has 4 or 8 bits, got {self.bits}")
        (n, k), g = self.shape, self.group_size
        if g < 1 or k % g:
            raise LlmirError(f"{name}: group size {g} does not divide the {k} columns of {list(self.shape)}")
        if self.zero_points is not None and self.minima is not None:
            raise LlmirError(f"{name}: a quantized array has zero points or minima, not both")
        if self.bits == 4 and (k % 2 or g % 2):
            raise LlmirError(f"{name}: int4 needs an even number of columns, and of columns a group; got {k} and {g}")
        if self.layout not in ("rows", "columns"):
            raise LlmirError(f"{name}: the layout must be 'rows' or 'columns', got {self.layout!r}")
        groups = (1, 1) if self.per_tensor and g == k else (n, k // g)
        packed = self.bits == 4 and self.layout == "rows"
        value_dtype = "uint8" if packed else _value_dtype(self.bits, unsigned=self.minima is not None)
        scale_dtype = jnp.dtype(self.scales.dtype).name
        if scale_dtype not in ("float16", "bfloat16", "float32"):
            raise LlmirError(f"{name}: scales must be float16, bfloat16 or float32, got {scale_dtype}")
        expected = {
            "values": (value_dtype, (n, k // 2 if packed else k)),
            "scales": (scale_dtype, groups),
            "zero_points": ("int8", groups),
            "minima": (scale_dtype, groups),
        }
        for part, (dtype, rows_first) in expected.items():
            array = getattr(self, part)
            shape = rows_first if self.layout == "rows" else rows_first[::-1]
            if array is not None and (jnp.dtype(array.dtype).name, tuple(array.shape)) != (dtype, shape):
                raise LlmirError(
                    f"{name}: {part} of a quantized {list(self.shape)} must be {dtype}{list(shape)}, "
                    f"got {array.dtype}{list(array.shape)}"
                )

    def integers(self) -> jax.Array:
        """q [N, K], int8 (uint8 for `minimum`). Traceable."""
        return self._integers_of(jnp.asarray(self.values))

    def _integers_of(self, values: jax.Array) -> jax.Array:
        """Those of some rows, whose `values` are laid out as all are."""
        if self.layout == "columns":
            return values.T.astype(jnp.int8 if self.minima is None else jnp.uint8)
        return unpack(values, signed=self.minima is None) if self.bits == 4 else values

    def _side(self) -> list[jax.Array | None]:
        """Scales, zero points and minima, [N, G] or [1, 1] each."""
        parts = [_maybe(part) for part in (self.scales, self.zero_points, self.minima)]
        return [part if part is None or self.layout == "rows" else part.T for part in parts]

    def dequantize(self, dtype: DTypeLike | None = None) -> jax.Array:
        """x [N, K] in `dtype`, by default that of this array. Traceable."""
        return _decode(self.integers(), self._side(), self.dtype if dtype is None else dtype)

    def rows(self, ids: ArrayLike, dtype: DTypeLike | None = None) -> jax.Array:
        """x[ids] [*ids.shape, K], of integer ids in [0, N): only these rows are dequantized. Traceable."""
        places = jnp.asarray(ids).reshape(-1)
        q = self._integers_of(jnp.take(jnp.asarray(self.values), places, self._row_axis, mode="clip"))
        # Per tensor, the one scale [1, 1] broadcasts as it is.
        own = [part if part is None or self.per_tensor else part[places] for part in self._side()]
        found = _decode(q, own, self.dtype if dtype is None else dtype)
        return found.reshape(*jnp.shape(ids), self.shape[1])

    def span(self, start: int, stop: int) -> "QuantizedArray":
        """Rows [start, stop) as they are. Traceable."""
        if (start, stop) == (0, self.shape[0]):
            return self
        index = (slice(start, stop),) if self.layout == "rows" else (slice(None), slice(start, stop))
        # Per tensor, the one scale [1, 1] is that of these rows too.
        rows: QuantizedArray = jax.tree.map(lambda part: part if part.shape == (1, 1) else part[index], self)
        return replace(rows, shape=(stop - start, self.shape[1]))

    def laid_out(self, layout: Layout) -> "QuantizedArray":
        """The same integers and scales in a layout: exact both ways, and on the device that holds them. Traceable."""
        if layout == self.layout:
            return self
        moved = _to_columns if layout == "columns" else _to_rows
        return replace(
            self,
            values=moved(jnp.asarray(self.values), bits=self.bits, unsigned=self.minima is not None),
            scales=jnp.asarray(self.scales).T,
            zero_points=None if self.zero_points is None else jnp.asarray(self.zero_points).T,
            minima=None if self.minima is None else jnp.asarray(self.minima).T,
            layout=layout,
        )

    def ir_type(self) -> "QuantizedTensorType":
        """The dialect's type: ``!llm.quantized_tensor<NxKxi4, scale=f16, min=f16, group_size=32>``."""
        from xdsl.dialects.builtin import IntegerType  # here, since a checkpoint is read without the compiler

        from llmir_jax.dense import dtype_element_type
        from llmir_jax.dialects.llm import QuantizedTensorType

        return QuantizedTensorType(
            self.shape,
            IntegerType(self.bits),
            dtype_element_type(self.scales.dtype),
            zero_point_type=None if self.zero_points is None else IntegerType(8),
            min_type=None if self.minima is None else dtype_element_type(self.minima.dtype),
            group_size=None if self.group_size == self.shape[1] else self.group_size,
            layout=self.layout,
        )

    def composite_parts(self) -> tuple[jax.Array, ...]:
        """The arrays that a value of `ir_type` is lowered to: values, scales, zero points or minima, all of N rows."""
        side = [jnp.asarray(part) for part in (self.scales, self.zero_points, self.minima) if part is not None]
        n, num_groups = self.shape[0], self.shape[1] // self.group_size
        groups = (n, num_groups) if self.layout == "rows" else (num_groups, n)
        return jnp.asarray(self.values), *(jnp.broadcast_to(part, groups) for part in side)


def pack(integers: AnyArray) -> AnyArray:
    """Integers [..., K], K even, -8 to 7 or 0 to 15, as bytes uint8[..., K/2]: element 2i in the low four bits."""
    q = integers.astype(np.uint8) & 15
    packed: AnyArray = q[..., 0::2] | (q[..., 1::2] << 4)
    return packed


def unpack(packed: AnyArray, *, signed: bool) -> AnyArray:
    """The inverse of `pack`: int8[..., K] from -8 to 7 where `signed`, else uint8[..., K] from 0 to 15."""
    stack = np.stack if isinstance(packed, np.ndarray) else jnp.stack
    q: AnyArray = stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)
    return (q.astype(np.int8) ^ 8) - 8 if signed else q  # two's complement in four bits


def _value_dtype(bits: int, *, unsigned: bool) -> str:
    return f"{'u' if unsigned else ''}int{bits}"


def _num_bits(dtype: DTypeLike) -> int:
    name = jnp.dtype(dtype).name
    return 4 if name in ("int4", "uint4") else jnp.dtype(dtype).itemsize * 8


@partial(jax.jit, static_argnames=("bits", "unsigned"))  # in one kernel, with no unpacked copy
def _to_columns(values: jax.Array, *, bits: int, unsigned: bool) -> jax.Array:
    q = unpack(values, signed=not unsigned) if bits == 4 else values
    return q.T.astype(_value_dtype(bits, unsigned=unsigned))


@partial(jax.jit, static_argnames=("bits", "unsigned"))
def _to_rows(values: jax.Array, *, bits: int, unsigned: bool) -> jax.Array:
    q = values.T.astype(_value_dtype(8, unsigned=unsigned))
    return pack(q) if bits == 4 else q


def _storage_range(bits: int, unsigned: bool) -> tuple[int, int]:
    return (0, 2**bits - 1) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _maybe(part: jax.Array | None) -> jax.Array | None:
    return None if part is None else jnp.asarray(part)


def _decode(q: jax.Array, side: list[jax.Array | None], dtype: DTypeLike) -> jax.Array:
    """Floats [..., K] of integers [..., K] and the scales, zero points and minima of their groups, [..., G] each."""
    scales, zero_points, minima = side
    assert scales is not None
    groups = q.reshape(*q.shape[:-1], scales.shape[-1], q.shape[-1] // scales.shape[-1]).astype(jnp.int32)
    if zero_points is not None:
        groups = groups - zero_points.astype(jnp.int32)[..., None]
    x = groups.astype(jnp.float32) * scales.astype(jnp.float32)[..., None]
    if minima is not None:
        x = x + minima.astype(jnp.float32)[..., None]
    return x.reshape(q.shape).astype(dtype)
