"""Keys and values in the pages of a cache, read where they lie."""

from collections.abc import Callable

from xdsl.dialects.builtin import TensorType
from xdsl.ir import Attribute, SSAValue

from llmir_jax.dense import element_dtype
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import shape_of
from llmir_jax.targets.cpu.elementwise import FLOATS
from llmir_jax.targets.cpu.expressions import Buffer
from llmir_jax.targets.cpu.halves import half_to_float, widen
from llmir_jax.targets.cpu.host import Host
from llmir_jax.targets.cpu.index import Index, Var, dynamic
from llmir_jax.targets.cpu.kernel import Kernel
from llmir_jax.targets.cpu.llvm import Function, Number, Value, constant, vector


def page_row(
    f: Function,
    scalar: Callable[[SSAValue, list[Index], dict[Var, Number]], Value],
    op: llm.AttendPagesOp,
    page_size: int,
    key: Number,
    sequence: Value,
) -> Number:
    """The number of a key's row in the page arrays; `scalar` reads an int32 input as i64."""
    seqs, entries = shape_of(op.block_tables)
    entry = dynamic(f.value(f.div(key, page_size)), entries)
    page = scalar(op.block_tables, [dynamic(sequence, seqs), entry], {})
    return f.add(f.mul(page, page_size), f.rem(key, page_size))


def row_values(kernel: Kernel, pages: Buffer, place: Number, dim: int, width: int) -> list[Value]:
    """The key or value of a row and head, number `place` of all, as floats [dim] in vectors of `width`.

    Those of 8 bits without their scale.
    """
    f = kernel.f
    base = f.at(kernel.pointer(pages), f.mul(place, pages.width * pages.shape[-1]))
    if pages.minima is not None:
        scale, minimum = (
            half_to_float(f, f.load("half", kernel.pointer(side), f.mul(place, 2), align=2)) for side in pages.parts[1:]
        )
        return [
            f.fma(_nibbles(f, base, at, width), f.splat(scale, width), f.splat(minimum, width))
            for at in range(0, dim, width)
        ]
    found = [
        f.load(vector(pages.element, width), base, pages.width * at, align=pages.width) for at in range(0, dim, width)
    ]
    if pages.element == "i8":
        return [f.cast("sitofp", f.cast("sext", x, "i32"), "float") for x in found]
    return [widen(f, x) for x in found]


def _nibbles(f: Function, base: Value, at: int, width: int) -> Value:
    """Elements [at, at + width) of 4 bits, two a byte, the first in the low bits; as floats."""
    if width == 1:
        byte = f.cast("zext", f.load("i8", base, at // 2), "i32")
        shifted = f.binary("lshr", byte, constant("i32", 4 * (at % 2)))
        return f.cast("sitofp", f.binary("and", shifted, constant("i32", 15)), "float")
    half = width // 2
    raw = f.load(vector("i8", half), base, at // 2)
    low = f.binary("and", raw, constant("i8", 15, half))
    high = f.binary("lshr", raw, constant("i8", 4, half))
    order = [i // 2 + half * (i % 2) for i in range(width)]
    both = f.join([low, high]) if half == 1 else f.shuffle(low, high, order)
    return f.cast("sitofp", f.cast("zext", both, "i32"), "float")


def page_shape(kind: Attribute) -> tuple[int, ...]:
    """Of pages of a type: [num_pages, page_size, num_kv_heads, head_dim]."""
    assert isinstance(kind, TensorType | llm.QuantizedTensorType)
    return tuple(kind.get_shape())


def element_bits(kind: Attribute) -> int:
    """Of an element in pages of a type."""
    if isinstance(kind, llm.QuantizedTensorType):
        return int(kind.integer_type.width.data)
    assert isinstance(kind, TensorType)
    return 8 * int(element_dtype(kind.element_type).itemsize)


def width_for(size: int, lanes: int) -> int:
    """The widest vector that divides a size."""
    while size % lanes:
        lanes //= 2
    return lanes


def pages_reason(kind: Attribute, host: Host) -> str | None:
    """Why pages of a type are not read and written natively."""
    if not isinstance(kind, llm.QuantizedTensorType):
        if _dtype_name(kind) == "float16" and not host.has_half:
            return "of a float16 cache on a machine without float16 instructions"
        return None if _dtype_name(kind) in FLOATS else f"of a cache of {_dtype_name(kind)}"
    bits = kind.integer_type.width.data
    is_known = kind.is_symmetric if bits == 8 else bits == 4 and str(kind.min_type) == "f16"
    if not is_known or str(kind.scale_type) != "f16":
        return f"of a cache of {kind}"
    return None if host.has_half else "of a quantized cache on a machine without float16 instructions"


def _dtype_name(kind: Attribute) -> str:
    """Of a tensor type's elements."""
    assert isinstance(kind, TensorType)
    return str(element_dtype(kind.element_type))


__all__ = ["element_bits", "page_row", "page_shape", "pages_reason", "row_values", "width_for"]
