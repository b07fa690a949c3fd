"""Constants as NumPy arrays, and dtypes as MLIR element types.

Dense elements, as imported from JAX: row-major, one byte for each element narrower than a byte, true as 0xFF (xDSL's
own convention). **A splat holds one element, whatever its shape**: read constants with :func:`dense_to_numpy` and
make them with :func:`dense_from_numpy`.
"""

import re
from typing import Any, cast

import ml_dtypes
import numpy as np
from xdsl.dialects import builtin
from xdsl.dialects.builtin import (
    BytesAttr,
    ComplexType,
    DenseIntOrFPElementsAttr,
    IntegerType,
    Signedness,
    TensorType,
)
from xdsl.ir import Attribute

from llmir_jax.errors import InvalidIRError

_FLOAT_DTYPES: dict[type[Attribute], np.dtype[Any]] = {
    builtin.Float16Type: np.dtype(np.float16),
    builtin.Float32Type: np.dtype(np.float32),
    builtin.Float64Type: np.dtype(np.float64),
    builtin.BFloat16Type: np.dtype(ml_dtypes.bfloat16),
    builtin.Float8E3M4Type: np.dtype(ml_dtypes.float8_e3m4),
    builtin.Float8E4M3Type: np.dtype(ml_dtypes.float8_e4m3),
    builtin.Float8E4M3B11FNUZType: np.dtype(ml_dtypes.float8_e4m3b11fnuz),
    builtin.Float8E4M3FNType: np.dtype(ml_dtypes.float8_e4m3fn),
    builtin.Float8E4M3FNUZType: np.dtype(ml_dtypes.float8_e4m3fnuz),
    builtin.Float8E5M2Type: np.dtype(ml_dtypes.float8_e5m2),
    builtin.Float8E5M2FNUZType: np.dtype(ml_dtypes.float8_e5m2fnuz),
    builtin.Float8E8M0FNUType: np.dtype(ml_dtypes.float8_e8m0fnu),
    builtin.Float6E2M3FNType: np.dtype(ml_dtypes.float6_e2m3fn),
    builtin.Float6E3M2FNType: np.dtype(ml_dtypes.float6_e3m2fn),
    builtin.Float4E2M1FNType: np.dtype(ml_dtypes.float4_e2m1fn),
}
FLOAT_TYPES = {dtype: cls() for cls, dtype in _FLOAT_DTYPES.items()}
_INT_DTYPES: dict[tuple[int, bool], np.dtype[Any]] = {
    (1, True): np.dtype(np.bool_),
    (2, True): np.dtype(ml_dtypes.int2),
    (2, False): np.dtype(ml_dtypes.uint2),
    (4, True): np.dtype(ml_dtypes.int4),
    (4, False): np.dtype(ml_dtypes.uint4),
    **{(8 * size, True): np.dtype(f"i{size}") for size in (1, 2, 4, 8)},
    **{(8 * size, False): np.dtype(f"u{size}") for size in (1, 2, 4, 8)},
}
_INT_TYPES = {
    dtype: IntegerType(width, Signedness.SIGNLESS if signed else Signedness.UNSIGNED)
    for (width, signed), dtype in _INT_DTYPES.items()
}


def element_dtype(element_type: Attribute) -> np.dtype[Any]:
    """The NumPy dtype (``ml_dtypes`` for what NumPy lacks) of a tensor's element type.

    Raises:
        InvalidIRError: JAX has no dtype for the type.
    """
    dtype: np.dtype[Any] | None = None
    if isinstance(element_type, IntegerType):
        signed = element_type.signedness.data != Signedness.UNSIGNED
        dtype = _INT_DTYPES.get((element_type.width.data, signed))
    elif isinstance(element_type, ComplexType):
        dtype = np.dtype(f"c{2 * element_dtype(element_type.element_type).itemsize}")
    elif isinstance(element_type, builtin.IndexType):
        dtype = np.dtype(np.int64)
    else:
        dtype = _FLOAT_DTYPES.get(type(element_type))
    if dtype is None:
        raise InvalidIRError(f"JAX has no dtype for elements of type {element_type}")
    return dtype


def dtype_element_type(dtype: Any) -> Attribute:
    """The element type of a tensor that holds ``dtype``. Raises InvalidIRError for what is not a number or a bool."""
    dtype = np.dtype(dtype)
    if dtype.kind == "c":
        part = FLOAT_TYPES[np.dtype(f"f{dtype.itemsize // 2}")]
        return ComplexType(cast(builtin.AnyFloat, part))
    element_type = FLOAT_TYPES.get(dtype) or _INT_TYPES.get(dtype)
    if element_type is None:
        raise InvalidIRError(f"no tensor holds elements of dtype {dtype}")
    return element_type


def dense_to_numpy(attr: DenseIntOrFPElementsAttr) -> np.ndarray[Any, Any]:
    """The elements of a constant, of the constant's shape; a splat comes as a read-only broadcast of one element."""
    element_type, shape = attr.get_element_type(), attr.get_shape()
    dtype, data = element_dtype(element_type), attr.data.data
    if dtype == np.bool_:
        flat = np.frombuffer(data, np.uint8) != 0
    elif isinstance(element_type, IntegerType) and element_type.width.data < 8:
        flat = np.frombuffer(data, np.int8).astype(dtype)
    else:
        flat = np.frombuffer(data, dtype)
    return np.broadcast_to(flat[0], shape) if flat.size == 1 else flat.reshape(shape)


def dense_from_numpy(array: np.ndarray[Any, Any], *, splat: bool = False) -> DenseIntOrFPElementsAttr:
    """A constant with the array's elements; with ``splat``, all elements are the first one and only it is stored."""
    tensor_type = cast(TensorType[builtin.AnyDenseElement], TensorType(dtype_element_type(array.dtype), array.shape))
    elements = array.reshape(-1)[:1] if splat else array
    return DenseIntOrFPElementsAttr(tensor_type, BytesAttr(element_bytes(elements)))


def element_bytes(array: np.ndarray[Any, Any]) -> bytes:
    """Bytes of a dense attribute as xDSL keeps them."""
    if array.dtype == np.bool_:
        return (array.astype(np.uint8) * np.uint8(0xFF)).tobytes()
    if array.dtype in (ml_dtypes.int2, ml_dtypes.int4):
        return array.astype(np.int8).tobytes()
    if array.dtype in (ml_dtypes.uint2, ml_dtypes.uint4):
        return array.astype(np.uint8).tobytes()
    return array.tobytes()


_ELEMENT = re.compile(r"[^\[\](),\s]+")


def elements_from_text(body: str, element_type: Attribute) -> np.ndarray[Any, Any]:
    """The elements [n], or [1] of a splat, that MLIR prints as ``dense<body>``.

    For the dtypes that jaxlib gives no buffer of. MLIR prints more than a hundred elements as the hexadecimal digits
    of their bytes, NaN and infinity as their bits, and any other number with the digits that identify it: all exact.
    """
    dtype = element_dtype(element_type)
    if isinstance(element_type, IntegerType):  # of less than a byte
        width = element_type.width.data
        values = list(bytes.fromhex(body[3:-1])) if body.startswith('"') else [int(t) for t in _ELEMENT.findall(body)]
        unsigned: np.ndarray[Any, Any] = np.asarray(values, np.int64) & (2**width - 1)
        if dtype in (ml_dtypes.uint2, ml_dtypes.uint4):
            return np.asarray(unsigned, dtype)
        sign = 2 ** (width - 1)
        return np.asarray((unsigned ^ sign) - sign, dtype)
    if body.startswith('"'):
        return np.frombuffer(bytes.fromhex(body[3:-1]), dtype)
    part = np.dtype(f"f{dtype.itemsize // 2}") if dtype.kind == "c" else dtype
    tokens = _ELEMENT.findall(body)
    parts = np.empty(len(tokens), part)
    bits = parts.view(f"u{part.itemsize}")
    for i, token in enumerate(tokens):
        if token.startswith("0x"):
            bits[i] = int(token, 16)
        else:
            parts[i] = float(token)
    return parts.view(dtype)
