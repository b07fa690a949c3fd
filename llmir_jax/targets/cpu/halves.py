"""Floats of 16 bits in memory, float32 in registers: loads widen, stores round to nearest even.

bfloat16 is the upper half of a float32, so that plain integer instructions do; where the machine has one for rounding
it is used. float16 needs the machine's own (`Host.has_half`), but for what `half_to_float` reads.
"""

from llmir_jax.targets.cpu.llvm import Function, Value, constant, element_of, lanes_of, vector

WIDTHS = {"float": 4, "half": 2, "bfloat": 2, "i32": 4, "i64": 8, "i8": 1}
"""Bytes of an element in memory."""
HALVES = ("half", "bfloat")


def is_half(type_: str) -> bool:
    """Whether elements of a type are floats of 16 bits."""
    return element_of(type_) in HALVES


def widen(f: Function, x: Value) -> Value:
    """Lanes of 16 bits as float32; others as they are."""
    lanes = lanes_of(x.type)
    if element_of(x.type) == "half":
        return half_to_float(f, x)
    if element_of(x.type) != "bfloat":
        return x
    bits = f.cast("zext", f.bitcast(x, vector("i16", lanes)), "i32")
    return f.bitcast(f.binary("shl", bits, constant("i32", 16, lanes)), vector("float", lanes))


def narrow(f: Function, x: Value, element: str) -> Value:
    """float32 lanes rounded to an element of 16 bits; for any other element, as they are."""
    lanes = lanes_of(x.type)
    if element == "half":
        return f.cast("fptrunc", x, "half")
    if element != "bfloat":
        return x
    if f.module.host.has_bf16:
        return f.cast("fptrunc", x, "bfloat")
    bits = f.bitcast(x, vector("i32", lanes))
    upper = f.binary("lshr", bits, constant("i32", 16, lanes))
    odd = f.binary("and", upper, constant("i32", 1, lanes))
    rounded = f.binary("add", bits, f.binary("add", odd, constant("i32", 0x7FFF, lanes)))
    rounded = f.binary("lshr", rounded, constant("i32", 16, lanes))
    quiet = f.binary("or", upper, constant("i32", 0x40, lanes))  # a NaN stays one
    kept = f.select(f.fcompare("uno", x, x), quiet, rounded)
    return f.bitcast(f.cast("trunc", kept, "i16"), vector("bfloat", lanes))


def pair_of_bfloats(f: Function, pair: Value) -> list[Value]:
    """The lower and the upper bfloat16 of each lane of i32, as float32."""
    lanes = lanes_of(pair.type)
    low = f.binary("shl", pair, constant("i32", 16, lanes))
    high = f.binary("and", pair, constant("i32", -65536, lanes))
    return [f.bitcast(bits, vector("float", lanes)) for bits in (low, high)]


def half_to_float(f: Function, x: Value) -> Value:
    """float16 lanes, finite where the machine has no instruction for it, as float32."""
    lanes = lanes_of(x.type)
    if f.module.host.has_half:
        return f.cast("fpext", x, "float")
    bits = f.cast("zext", f.bitcast(x, vector("i16", lanes)), "i32")
    magnitude = f.binary("shl", f.binary("and", bits, constant("i32", 0x7FFF, lanes)), constant("i32", 13, lanes))
    size = f.binary("fmul", f.bitcast(magnitude, vector("float", lanes)), constant("float", 2.0**112, lanes))
    sign = f.binary("shl", f.binary("and", bits, constant("i32", 0x8000, lanes)), constant("i32", 16, lanes))
    return f.bitcast(f.binary("or", f.bitcast(size, vector("i32", lanes)), sign), vector("float", lanes))


__all__ = ["HALVES", "WIDTHS", "half_to_float", "is_half", "narrow", "pair_of_bfloats", "widen"]
